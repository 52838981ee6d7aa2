"""Results folders as runs leave them, made by hand: the formats of training/log.py and of the measurements."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

PROMPT, EXPECTED = "2577 in words: ", "two thousand five hundred seventy-seven"
HOSTILE = '</script><img src=x onerror="window.broken=1"><b>&amp;\u2028\x07'
CONFIG = {
    "model": {"load_model": "assets/rwkv7-tiny.pth", "quant": "none"},
    "adapter": {"peft": "bone", "bone_mode": "bone", "bone_r": 64},
    "data": {"data_file": ["assets/numbers_train.jsonl"], "eval_data": "assets/numbers_heldout.jsonl", "ctx_len": 128},
    "optim": {"lr_init": 2e-4, "lr_final": 2e-5, "grad_clip": 1.0},
    "run": {"proj_dir": "out/bone", "epoch_count": 2, "random_seed": 42},
}


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(content)
    return {**content, "crc32": f"{zlib.crc32(text.encode()):08x}"}


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(sealed(record)) + "\n" for record in records), encoding="utf-8")


def step_record(step: int, loss: float | None = None) -> dict[str, Any]:
    noise = ((step * 7919) % 101 - 50) / 500
    return {
        "step": step,
        "epoch": 0,
        "loss": loss if loss is not None else round(1.8 * math.exp(-step / 150) + 0.02 + abs(noise) * 0.3, 6),
        "lr": 2e-4 * 0.5 * (1 + math.cos(step / 1000)),
        "tokens": 1000 + step % 7,
        "trained_tokens": 500 + step % 3,
        "grad_norm": round(0.4 + noise, 6),
        "tokens_per_s": 15000.0 + 100 * (step % 11),
        "seconds": 0.066,
        "data_wait_ms": 0.1,
        "peak_memory_mb": 600.0 + min(step, 40),
        "peak_reserved_mb": None,
    }


def measurement(step: int, held: float, general: float | None, exact: float | None = None, best: bool = False) -> dict:
    sets: dict[str, Any] = {"heldout": {"loss": held, "tokens": 6970, "exact_match": exact, "prompts": 100}}
    if general is not None:
        sets["general"] = {"loss": general, "tokens": 20000, "exact_match": None, "prompts": 0}
    role = None if general is None else "general"
    return {"step": step, "seconds": 1.9, "sets": sets, "main": "heldout", "general": role, "best": best}


def make(folder: Path, steps: int = 752, every: int = 75, state: str = "done", prompt: str = PROMPT) -> Path:
    """A run of so many steps, measured before the first, every so many and after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sealed(CONFIG)), encoding="utf-8")
    write_lines(folder / "train_log.jsonl", [step_record(step) for step in range(1, steps + 1)])
    measured = sorted({*range(0, steps, every), steps})
    records, answers = [], []
    for step in measured:
        held = round(1.8203 * math.exp(-step / 180) + 0.006 + 0.02 * max(step / steps - 0.8, 0), 6)
        records.append(
            measurement(step, held, round(1.24 + 0.08 * (1 - math.exp(-step / 300)), 6), round(step / steps * 0.92, 4))
        )
        text = (
            EXPECTED
            if step > steps * 0.6
            else "The Administration has been a strengthened "
            if step == 0
            else "two thousand five"
        )
        answers.append({"step": step, "set": "heldout", "prompt": prompt, "expected": EXPECTED, "text": text})
        answers.append(
            {"step": step, "set": "heldout", "prompt": "41 in words: ", "expected": None, "text": "forty-one"}
        )
    lowest = min(records[1:], key=lambda one: one["sets"]["heldout"]["loss"])
    lowest["best"] = True
    write_lines(folder / "measurements.jsonl", records)
    write_lines(folder / "samples.jsonl", answers)
    warning = {
        "step": 40,
        "warning": "The norm of the gradient is ten times as large as before.",
        "remedy": "A lower --lr_init, or --warmup_steps 20.",
    }
    write_lines(folder / "warnings.jsonl", [warning])
    preview = {
        "state": state,
        "total_steps": steps,
        "data": ["numbers_train.jsonl: 3,000 samples, 41,210 tokens, 20,100 trained"],
        "samples": [
            {
                "origin": "numbers_train.jsonl line 1",
                "tokens": 30,
                "trained": 14,
                "pieces": [[False, prompt], [True, f"{EXPECTED}<end>"]],
                "more": 0,
            }
        ],
        "environment": {
            "rwkv-bone": "0.3.0",
            "Python": "3.11.2",
            "torch": "2.13.0",
            "device": "CPU with 2 cores, 1 process",
        },
        "next": [
            [
                "merge",
                "python merge.py --base_model assets/rwkv7-tiny.pth --peft_checkpoint out/bone/rwkv-1.pth",
            ]
        ],
    }
    (folder / "preview.json").write_text(json.dumps(sealed(preview)), encoding="utf-8")
    return folder


def preference_figures(step: int, total: int, beta: float = 0.1, learnt: float = 1.0) -> dict[str, Any]:
    """What a run with --task dpo measures: the log-probability of rejected answers falls, of chosen ones a little."""
    went = 1 - math.exp(-3 * step / total)
    chosen, rejected = -1.2 - 0.15 * went, -1.25 - 1.6 * went * learnt
    rewards = beta * 40 * (chosen + 1.2), beta * 40 * (rejected + 1.25)
    return {
        "reward_chosen": round(rewards[0], 6),
        "reward_rejected": round(rewards[1], 6),
        "reward_margin": round(rewards[0] - rewards[1], 6),
        "reward_accuracy": round(0.5 + 0.48 * went * learnt, 6),
        "logp_chosen": round(chosen, 6),
        "logp_rejected": round(rejected, 6),
        "nll": None,
        "kl": None,
    }


def make_preference(
    folder: Path, task: str = "dpo", steps: int = 240, every: int = 24, state: str = "done", **preference: Any
) -> Path:
    """As `make`, of a run with --task dpo, orpo, simpo or kto."""
    make(folder, steps, every, state)
    config = json.loads((folder / "config.json").read_text())
    del config["crc32"]
    config["data"] |= {"task": task, "data_file": ["pairs.jsonl"], "eval_data": ["heldout=pairs_heldout.jsonl"]}
    config["preference"] = {"beta": "auto", "gamma": "auto", "label_smoothing": 0.0, "sft_weight": "auto"} | preference
    config["preference"] |= {"desirable_weight": 1.0, "undesirable_weight": 1.0, "reference": "start"}
    (folder / "config.json").write_text(json.dumps(sealed(config)), encoding="utf-8")

    def figures(step: int, noise: float, learnt: float = 1.0) -> dict[str, Any]:
        found = preference_figures(step, steps, learnt=learnt)
        if task == "kto":
            found |= {"reward_accuracy": None, "kl": round(0.02 * step / steps, 6)}
        else:
            found["reward_accuracy"] = round(min(max(found["reward_accuracy"] + noise, 0), 1) * 8) / 8
        return found | ({"nll": round(-found["logp_chosen"], 6)} if task == "orpo" else {})

    log = []
    for step in range(1, steps + 1):
        record = step_record(step)
        noise = (record["grad_norm"] - 0.4) * 2
        loss = math.log(2) * math.exp(-2.5 * step / steps) + abs(noise) / 4
        log.append(record | {"loss": round(loss, 6), "units": 8} | figures(step, noise))
    write_lines(folder / "train_log.jsonl", log)
    records = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    for record in records:
        del record["crc32"]
        record["sets"]["heldout"] |= {
            "loss": round(math.log(2) * math.exp(-2 * record["step"] / steps), 6),
            "preference": preference_figures(record["step"], steps, learnt=0.9)
            | ({"reward_accuracy": None, "kl": 0.01} if task == "kto" else {})
            | {"divergence": round(0.2 * record["step"] / steps, 6)},
        }
    write_lines(folder / "measurements.jsonl", records)
    preview = json.loads((folder / "preview.json").read_text())
    del preview["crc32"]
    one = {"origin": "pairs.jsonl line 1", "tokens": 30, "trained": 14, "more": 0}
    preview["samples"] = [
        one | {"answer": "chosen", "pieces": [[False, PROMPT], [True, f"{EXPECTED}<end>"]]},
        one | {"answer": "rejected", "pieces": [[False, PROMPT], [True, "two thousand five hundred seven<end>"]]},
    ]
    (folder / "preview.json").write_text(json.dumps(sealed(preview)), encoding="utf-8")
    return folder
