"""Logits by programs that read Hugging Face folders in fla's layout, each in a process of its own with a time limit.

`rwkv7-hf` is pure PyTorch on transformers, `mlx-lm` runs on MLX: two implementations that share nothing with ours.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

TIME_LIMIT = 180  # seconds


class Answer(NamedTuple):
    logits: np.ndarray  # [T, V]
    ids: list[list[int]]  # of each text
    chat: str  # what a model is given after the message "Hi", if there are texts and a template


def ask(program: str, folder: Path, ids: Sequence[int], texts: Sequence[str] = ()) -> Answer:
    """Logits of `ids` by a program (a key of PROGRAMS); what transformers' AutoTokenizer makes of texts (`tokenizer`).

    AssertionError, with its own words, if the program does not load the folder, or not every tensor of it.
    """
    request = json.dumps({"program": program, "folder": str(folder), "ids": list(ids), "texts": list(texts)})
    done = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, f"{program} ended with {done.returncode}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    return Answer(np.array(found["logits"], np.float32), found["ids"], found["chat"])


# From here on: the other process.


def rwkv7_hf(folder: str, ids: list[int]) -> list:
    import torch
    from rwkv7_hf import RWKV7ForCausalLM

    # It fills what is missing with random numbers and drops what it does not know, both in silence.
    model, info = RWKV7ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().tolist()


def mlx_lm(folder: str, ids: list[int]) -> list:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))  # strict
    model.set_dtype(mx.float32)
    return model(mx.array([ids]))[0].astype(mx.float32).tolist()


def tokenizer(folder: str, texts: list[str]) -> tuple[list[list[int]], str]:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)
    ids = [found.encode(text, add_special_tokens=False) for text in texts]
    messages = [{"role": "user", "content": "Hi"}]
    chat = (
        found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if found.chat_template else ""
    )
    return ids, chat


PROGRAMS = {"rwkv7-hf": rwkv7_hf, "mlx-lm": mlx_lm}


def main() -> None:
    request = json.load(sys.stdin)
    program, folder = request["program"], request["folder"]
    logits, ids, chat = [], [], ""
    if program == "tokenizer":
        ids, chat = tokenizer(folder, request["texts"])
    else:
        logits = PROGRAMS[program](folder, request["ids"])
    print(json.dumps({"logits": logits, "ids": ids, "chat": chat}))


if __name__ == "__main__":
    main()
