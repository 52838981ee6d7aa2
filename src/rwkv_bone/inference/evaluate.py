"""How good a model is on held-out rows: the training loss, and exact answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rwkv_bone.console import progress_bar, with_bar
from rwkv_bone.data import BatchPlan, Dataset
from rwkv_bone.data.tokenizer import Tokenizer, encode_marked
from rwkv_bone.inference.generate import BATCH, StatefulModel, generate


class Answer(NamedTuple):
    """One prompt, the expected answer, and the model's (`got`), without the end of the document."""

    prompt: str
    expected: str
    got: str

    @property
    def correct(self) -> bool:
        return self.got == self.expected


@torch.no_grad()
def heldout_loss(
    model: Callable[..., torch.Tensor], dataset: Dataset, *, micro_bsz: int, device: torch.device | str = "cpu"
) -> tuple[float, int]:
    """(nats per trained token, number of trained tokens) over every sample once, with the mask of training.

    model: a call `model(ids, labels=..., label_rows=..., cu_seqlens=...)` -> the summed loss. Samples are packed,
    micro_bsz x ctx_len tokens at a time.
    """
    plan = BatchPlan(dataset, micro_bsz=micro_bsz, pack=True)
    # Summed on the device, so that a GPU is waited for only once, at the end.
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    steps = plan.total_steps(1)
    for step in with_bar(range(steps), steps, "measuring the held-out loss"):
        batch = plan.batch(0, step, 0, 0).to(device)
        total += model(batch.ids, labels=batch.labels, label_rows=batch.label_rows, cu_seqlens=batch.cu_seqlens)
        tokens += batch.window_tokens
    return total.item() / max(tokens, 1), tokens


def exact_match(
    model: StatefulModel,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = BATCH,
    device: torch.device | str = "cpu",
) -> tuple[float, list[Answer]]:
    """(fraction of prompts whose greedy answer is exactly the response, every answer), `batch` prompts at a time.

    Prompts are read to their end, also beyond the ctx_len of training. An answer may be one token longer than the
    longest response; a longer one could not be right.
    """
    longest = max((len(tokenizer.encode(response)) for _, response in pairs), default=0)
    # A model needs one token to start from. What comes before a document is the end of another.
    prompts = [encode_marked(tokenizer, prompt) or [tokenizer.eod] for prompt, _ in pairs]
    with progress_bar(len(prompts), "answering held-out prompts") as bar:
        how: dict[str, Any] = {"stop_id": tokenizer.eod, "batch": batch, "device": device, "done": bar.update}
        written = generate(model, prompts, max_new=longest + 1, **how)
    answers = [Answer(*pair, tokenizer.decode(ids)) for pair, ids in zip(pairs, written, strict=True)]
    return sum(answer.correct for answer in answers) / max(len(answers), 1), answers
