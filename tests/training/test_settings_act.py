"""The table of which setting acts when (config/acts.py) is true: a run differs with the setting where it says so.

The command line, which refuses the other pairs, is left aside: each run is made from its settings. A run is what it
writes: the trained tensors, loss and rate of each step, held-out measurements. Settings whose effect is none of these
(less memory, the folder that is written to) or concerns the form of the data are left to the tests of those.
"""

import json
from dataclasses import asdict, fields
from itertools import product

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config.acts import TRAIN
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import SECTIONS, build
from rwkv_bone.errors import UserError
from rwkv_bone.training.fit import fit

KINDS = {"peft": ("none", "bone", "lora", "pissa", "state")}
TASKS = {"task": ("sft", "dpo", "orpo", "simpo", "kto")}
COMPARED = {"data_file": ("answers",), "epoch_steps": 2}
MASKED = {"loss_mask": ("response", "last", "none", "pad", "se")}
# setting: (another value, the values of the settings that it depends on, settings that bring its effect to light)
CASES = {
    "bone_mode": ("bat", KINDS, {}),
    "bone_r": (16, KINDS, {}),
    "lora_r": (4, KINDS, {}),
    "lora_alpha": (16.0, KINDS, {}),
    "lora_dropout": (0.5, KINDS, {}),
    "lora_rs": (True, KINDS, {}),
    "lora_plus": (4.0, KINDS, {}),
    "quant": ("int8", KINDS, {}),
    "targets": (("att.key",), KINDS, {}),
    "train_parts": (("ln",), KINDS, {}),
    "bptt_chunks": (1, {"chunk_ctx": (0, 8)}, {}),
    "lr_final": (5e-3, {"lr_schedule": ("cos", "exp", "linear", "constant")}, {}),
    "epoch_save": (2, {"epoch_count": (1, 2)}, {}),
    "eval_samples": (1, {"eval_data": ("", "rows"), "eval_split": (0.0, 0.3)}, {"data_type": "sft"}),
    "data_weights": (
        ("2", "1"),
        {"dataload": ("pack", "pad", "get"), "data_file": (("rows",), ("rows", "more"))},
        {"loss_mask": "none", "epoch_steps": 3},
    ),
    "long_samples": ("drop", {"dataload": ("pack", "pad", "get")}, {"loss_mask": "none", "ctx_len": 12}),
    "beta": (0.5, TASKS, COMPARED),
    "gamma": (2.0, TASKS, COMPARED),
    "label_smoothing": (0.25, TASKS, COMPARED),
    "sft_weight": (0.5, TASKS, COMPARED),
    "desirable_weight": (2.0, TASKS, COMPARED),
    "undesirable_weight": (2.0, TASKS, COMPARED),
    "l2wrap": (1.0, TASKS, COMPARED),
    "mask_id": ('{"mask0": "9", "mask1": "4"}', MASKED, {"mask_id": '{"mask0": "9", "mask1": ">"}'}),
}


@pytest.fixture(scope="module")
def outcome(job):
    """A function: settings -> what their run writes, or None where it is refused. Each run is made once."""
    plain = asdict(parse_train([word for word in job.argv({}) if word != "--typed"]))
    known: dict = {}
    files = {"rows": str(job.flags["data_file"]), "more": str(job.folder / "more.jsonl")}
    rows = [{"prompt": f"{n} -> ", "chosen": f"{n + 1}", "rejected": f"{n}!"} for n in range(8)]
    (job.folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job.folder / "more.jsonl").write_text('{"prompt": "0 -> ", "response": "1"}\n' * 3)

    def run(changes):
        key = repr(sorted(changes.items()))
        if key not in known:
            known[key] = written(changes, job.folder / f"run{len(known)}")
        return known[key]

    def written(changes, folder):
        settings = {name: dict(values) for name, values in plain.items()}
        compares = changes.get("task", "sft") != "sft"
        files["answers"] = str(job.folder / "answers.jsonl") if compares else files["rows"]
        for name, value in {**changes, "proj_dir": str(folder)}.items():
            value = files.get(value, value) if isinstance(value, str) else value
            value = tuple(files.get(word, word) for word in value) if name == "data_file" else value
            section = next(section for section, cls in SECTIONS.items() if name in {spec.name for spec in fields(cls)})
            settings[section][name] = value
        try:
            fit(build(settings))
        except UserError:
            return None
        found = {path.name: checkpoints.read_state(path) for path in folder.glob("rwkv-*.pth")}
        log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        steps = [(line["loss"], line["lr"], line["tokens"]) for line in log]
        measured = [path.read_text() for path in sorted(folder.glob("eval*"))]
        return found, steps, measured

    return run


def equal(a, b):
    same = a[1:] == b[1:] and a[0].keys() == b[0].keys()
    return same and all(
        a[0][file].keys() == b[0][file].keys()
        and all(torch.equal(a[0][file][key], b[0][file][key]) for key in a[0][file])
        for file in a[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_setting_changes_the_run_where_the_table_says_that_it_acts_and_nowhere_else(name, outcome):
    value, others, light = CASES[name]
    defaults = {spec.name: spec.default for cls in SECTIONS.values() for spec in fields(cls)}
    seen = set()
    for values in product(*others.values()):
        changes = light | dict(zip(others, values, strict=True))
        acts = TRAIN[name].met({**defaults, **changes})
        plain, changed = outcome(changes), outcome({**changes, name: value})
        if plain is None:
            continue  # these settings do not go together without it either
        differs = changed is not None and not equal(plain, changed)
        assert differs == acts, (changes, acts)
        seen.add(acts)
    assert seen == {True, False}
