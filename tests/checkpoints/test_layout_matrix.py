"""From a model in any layout to a merged .pth, through the programs that users run: the same bits as from a .pth."""

import json

import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.data.preview import parse as parse_preview
from tests.checkpoints.layout_files import (
    FLA_CONFIG,
    OFFICIAL_CONFIG,
    fla_tensors,
    official_tensors,
    state_of,
    web_rwkv_tensors,
    write_folder,
    write_st,
)
from tests.training.conftest import Job, one_thread  # noqa: F401

ROWS = [(f"{n} -> ", str(n)[::-1]) for n in range(37, 45)]
IDS = torch.arange(40)[None] * 5 % 256
# layout -> what writes it, from upstream's tensors.
WRITERS = {
    "official": lambda folder, state: write_folder(folder / "official", official_tensors(state), OFFICIAL_CONFIG, 2),
    "fla": lambda folder, state: write_folder(folder / "fla", fla_tensors(state), FLA_CONFIG),
    "web-rwkv": lambda folder, state: write_st(folder / "model.st", web_rwkv_tensors(state)),
}
DTYPES = {"official": torch.bfloat16, "fla": torch.float32, "web-rwkv": torch.float16}
CASES = [(7, "official"), (7, "fla"), (7, "web-rwkv"), (6, "web-rwkv"), (5, "web-rwkv")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"v{case[0]}-{case[1]}")
def case(request, tmp_path_factory):
    """(layout, model in that layout, the same as .pth, a Job that trains 20 steps)."""
    version, layout = request.param
    folder = tmp_path_factory.mktemp("case")
    state = state_of(version, DTYPES[layout])
    torch.save(state, folder / "base.pth")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in ROWS))
    flags = {"accelerator": "cpu", "precision": "fp32", "micro_bsz": 4, "ctx_len": 32, "epoch_steps": 20}
    flags |= {"peft": "bone", "bone_r": 8, "data_file": data, "lr_init": 1e-2, "lr_final": 1e-3, "tokenizer": "bytes"}
    return layout, WRITERS[layout](folder, state), folder / "base.pth", Job(folder, flags)


def test_load_train_merge_and_load_again_give_the_bits_of_the_pth(case, tmp_path, capsys):
    layout, model, pth, job = case
    assert torch.equal(load_model(model)(IDS), load_model(pth)(IDS))

    adapters = {}
    for name, path in (("theirs", model), ("pth", pth)):
        # The trained low-rank weights are of the tensors that a layout transposes.
        adapters[name] = job.run(name, load_model=path, train_parts="time") / "rwkv-0.pth"
        header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("model "))
        assert ("(" in header.split(": RWKV-")[0]) == (name == "theirs")
    theirs, ours = (checkpoints.read_state(path) for path in adapters.values())
    assert theirs.keys() == ours.keys() and len(theirs) > 30
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)

    merged = {}
    for name, base in (("theirs", model), ("pth", pth)):
        # Each adapter goes on the other form of its base: they are one model.
        adapter = adapters["pth" if name == "theirs" else "theirs"]
        output = tmp_path / f"{name}.pth"
        lines = merge_files(MergeConfig(base_model=str(base), peft_checkpoint=str(adapter), output=str(output)))
        words = {"official": "official Hugging Face folder, 2 shards", "fla": "fla Hugging Face folder"}
        described = words.get(layout, "web-rwkv / Ai00 file")
        assert (f"({described}): RWKV-" in lines[0]) == (name == "theirs")
        merged[name] = checkpoints.read_state(output)
    assert merged["theirs"].keys() == merged["pth"].keys() == checkpoints.load_base(pth).state.keys()
    for key, tensor in merged["pth"].items():
        assert merged["theirs"][key].dtype == tensor.dtype == DTYPES[layout] and tensor.isfinite().all()
        assert torch.equal(merged["theirs"][key], tensor), key
    logits = load_model(tmp_path / "theirs.pth")(IDS)
    assert torch.equal(logits, load_model(tmp_path / "pth.pth")(IDS))
    assert (logits - load_model(pth)(IDS)).abs().max() > 0.1
    # An adapter says which base it was trained on; that holds in the other form as well.
    applied = load_model(model, adapters["pth"])(IDS)
    assert torch.equal(applied, load_model(pth, adapters["theirs"])(IDS))


def test_every_weight_is_trained_from_any_layout_and_saved_as_a_pth(case):
    layout, model, pth, job = case
    saved = {}
    for name, path in (("theirs", model), ("pth", pth)):
        folder = job.run(f"full-{name}", load_model=path, peft="none", epoch_steps=3)
        saved[name] = checkpoints.read_state(folder / "rwkv-0.pth")
    assert saved["theirs"].keys() == saved["pth"].keys() == checkpoints.load_base(pth).state.keys()
    for key, tensor in saved["pth"].items():
        assert saved["theirs"][key].dtype == tensor.dtype == DTYPES[layout]
        assert torch.equal(saved["theirs"][key], tensor), key
    assert not torch.equal(
        saved["pth"]["blocks.1.ffn.key.weight"], checkpoints.read_state(pth)["blocks.1.ffn.key.weight"]
    )


def test_preview_reads_the_vocabulary_of_any_layout(case):
    _, model, _, job = case
    _, _, vocabulary, *_ = parse_preview(["--load_model", str(model), "--data_file", str(job.flags["data_file"])])
    assert vocabulary == 256
