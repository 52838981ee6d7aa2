"""Documents of preference data to units: a chosen and a rejected answer of one prompt, or one answer with its label.

Answers stay whole, or a comparison would be one of what the cut has left. So a prompt gives way: it is cut at its
beginning, by the same ids for both answers, until the longer of them fits --ctx_len.
"""

from __future__ import annotations

import numpy as np

from rwkv_bone.console import counted
from rwkv_bone.data.lost import Lost
from rwkv_bone.data.samples import Documents, Samples, count_trained, share


def unit_name(documents: Documents) -> str:
    """What a user calls what is counted."""
    return "sample" if documents.answers is None else "pair" if documents.members == 2 else "answer"


def units_of(documents: Documents, ctx_len: int, long_samples: str) -> Samples:
    """The units of one source. long_samples: auto and cut cut prompts, drop drops units that would need it."""
    name, unit, M = documents.name, unit_name(documents), documents.members
    assert documents.answers is not None and len(documents.starts) % M == 0
    starts, full = np.asarray(documents.starts).reshape(-1, M), np.asarray(documents.lengths).reshape(-1, M)
    prompts = np.asarray(documents.answers).reshape(-1, M)[:, 0]
    targets = count_trained(documents.trained, starts.ravel(), (starts + full).ravel()).reshape(-1, M)
    total, lost = targets.sum(), []

    def places(chosen: np.ndarray) -> str:
        return f"{counted(len(chosen), unit)} ({documents.named(M * chosen)})"

    excess = np.maximum(full.max(axis=1) - (ctx_len + 1), 0)
    too_long, empty = excess > 0, (targets == 0).any(axis=1)
    # At least one id stays before an answer: what predicts its first token.
    left_out = too_long if long_samples == "drop" else too_long & (excess >= prompts)
    cut = too_long & ~left_out & ~empty
    if len(dropped := np.flatnonzero(left_out & ~empty)):
        if long_samples == "drop":
            why = f"dropped (--long_samples drop), longer than --ctx_len {ctx_len}"
        else:
            why = f"left out, as the {'longer ' * (M == 2)}answer alone does not fit --ctx_len {ctx_len}"
        lost.append(
            Lost(f"{name}: {why}: {places(dropped)}", share(targets[dropped].sum(), total), remedy="raise --ctx_len")
        )
    if len(shortened := np.flatnonzero(cut)):
        gone = int(excess[shortened].sum())
        lost.append(
            Lost(
                f"{name}: prompts cut at their beginning, so that answers fit --ctx_len {ctx_len} whole: "
                f"{places(shortened)}, {gone:,} tokens left out",
                share(gone, prompts.sum()),
                "tokens of prompts",
                "raise --ctx_len",
            )
        )
    if len(nothing := np.flatnonzero(empty)):
        lost.append(
            Lost(
                f"{name}: left out, no token to train on in {'one of the answers' if M == 2 else 'the answer'}: "
                f"{places(nothing)}",
                share(len(nothing), len(full)),
                f"{unit}s",
                "check --loss_mask, which marks nothing there",
            )
        )
    kept, off = np.flatnonzero(~left_out & ~empty), np.where(cut, excess, 0)[:, None]
    return Samples(M * kept, (starts + off)[kept], (full - off)[kept], targets[kept].sum(axis=1), lost=lost)
