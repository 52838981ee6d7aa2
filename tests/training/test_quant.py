"""Training on a quantised base is training on the weights that its codes stand for, and merges into those."""

import struct

import numpy as np
import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import ADAPTERS
from rwkv_bone.config import QUANTS, MergeConfig
from rwkv_bone.config.flags import parse_train
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from rwkv_bone.quantization import as_trained, is_quantized
from rwkv_bone.training.fit import fit
from tests.conftest import random_model
from tests.training.conftest import adapter_of, largest_difference, log_of

ROUNDING = 2e-5  # of parameters that Adam has moved by about 1e-2 a step
IDS = torch.tensor([list(b"41 -> 14 and more of it")])


@pytest.fixture(scope="module")
def base(job):
    """The job's base in fp32, so that what a merge writes is exact."""
    path = job.folder / "base-fp32.pth"
    state = checkpoints.read_state(job.flags["load_model"])
    checkpoints.write_state(path, {key: tensor.float() for key, tensor in state.items()})
    return path


def dequantised(base, quant):
    """A plain checkpoint of the weights that the quantised `base` stands for."""
    state = checkpoints.read_state(base)
    path = base.with_name(f"{base.stem}-{quant}.pth")
    rounded = {key: as_trained(tensor, quant) if is_quantized(key) else tensor for key, tensor in state.items()}
    checkpoints.write_state(path, rounded)
    return path


@pytest.mark.parametrize("quant, stage", [("int8", 1), ("nf4", 2), ("fp4", 3)])
def test_a_quantised_run_trains_on_the_dequantised_weights(job, base, quant, stage, capsys):
    flags = {"strategy": f"deepspeed_stage_{stage}", "bone_mode": "bat" if stage == 2 else "bone"}
    folder = job.run(f"quant-{quant}", load_model=base, quant=quant, grad_cp=int(stage == 3), **flags)
    assert f"quant     {quant}: 12 projections in 0.0" in capsys.readouterr().out
    assert checkpoints.read_metadata(folder / "rwkv-0.pth")["quant"] == quant

    plain = job.run(f"dequantised-{quant}", load_model=dequantised(base, quant), **flags)
    losses, expected = ([line["loss"] for line in log_of(run)] for run in (folder, plain))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert largest_difference(adapter_of(folder), adapter_of(plain)) < ROUNDING


@pytest.fixture(scope="module")
def trained(job, base):
    """A run on nf4 that adapts some of the projections; the others were quantised as well."""
    return job.run("to-merge", load_model=base, quant="nf4", targets="ffn")


@torch.no_grad()
def logits(path, **options):
    return load_model(path, dtype=torch.float32, op="torch", **options)(IDS)


def test_the_merged_model_is_the_trained_one(base, trained, tmp_path):
    merged = tmp_path / "merged.pth"
    report = merge_files(MergeConfig(str(base), str(trained / "rwkv-0.pth"), str(merged)))
    assert not any(line.startswith("warning") for line in report)
    live = logits(base, adapter=trained / "rwkv-0.pth")
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=1e-4 * live.abs().max().item())
    assert (live - logits(base)).norm() > 1e-2 * live.norm()

    # By the definitions alone: the adapter's tiles on the dequantised weights.
    adapter, written = adapter_of(trained), checkpoints.read_state(merged)
    for key, tensor in checkpoints.read_state(base).items():
        expected = as_trained(tensor, "nf4") if is_quantized(key) else tensor
        bone = adapter.get(key.replace(".weight", ".bone"))
        if bone is not None:
            expected = expected + bone.t().tile(1, expected.shape[1] // len(bone))
        torch.testing.assert_close(written[key], expected, rtol=0, atol=1e-6)


KINDS = {
    "bone": {"peft": "bone"},
    "bat": {"peft": "bone", "bone_mode": "bat"},
    "bat-col": {"peft": "bone", "bone_mode": "bat-col"},
    "lora": {"peft": "lora", "lora_r": 4, "lora_alpha": 8.0},
    "pissa": {"peft": "pissa", "lora_r": 4, "lr_init": 3e-3},
}


@pytest.mark.parametrize("kind, version, quant", list(zip(ADAPTERS, [5, 6, 7, 5, 6], [*QUANTS, "nf4"], strict=True)))
def test_every_adapter_on_a_half_precision_base_merges_to_its_rounding(job, tmp_path, kind, version, quant):
    base, merged = tmp_path / "base.pth", tmp_path / "merged.pth"
    checkpoints.write_state(base, random_model(vocab_size=256, version=version, dtype=torch.bfloat16).state_dict())
    folder = job.run(f"merge-{kind}", load_model=base, quant=quant, **KINDS[kind])
    adapter = folder / "rwkv-0.pth"
    merge_files(MergeConfig(str(base), str(adapter), str(merged)))
    live, unadapted = logits(base, adapter=adapter), logits(base, quant=quant)
    assert (logits(merged) - live).norm() < 0.1 * (live - unadapted).norm()


def test_merging_into_the_original_weights_warns_and_is_another_model(base, trained, tmp_path):
    merged = tmp_path / "merged.pth"
    config = MergeConfig(str(base), str(trained / "rwkv-0.pth"), str(merged), merge_base="original")
    assert any(line.startswith("warning") and "nf4" in line for line in merge_files(config))
    adapter = trained / "rwkv-0.pth"
    torch.testing.assert_close(logits(merged), logits(base, adapter=adapter, quant="none"), rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(base, adapter=adapter)).norm() > 1e-2 * logits(merged).norm()


def test_an_adapter_goes_on_with_the_weights_it_was_trained_on(job, base, trained):
    flags = {"load_model": base, "targets": "ffn", "peft_load": trained / "rwkv-0.pth"}
    folder = job.run("quant-continued", quant="nf4", **flags)
    assert log_of(folder)[0]["loss"] < log_of(trained)[0]["loss"]
    with pytest.raises(UserError, match="trained with --quant nf4, this run has --quant none: give --quant nf4"):
        job.run("refused", **flags)


def test_the_initial_state_trains_on_a_quantised_base(job, base):
    folder = job.run("state", load_model=base, quant="fp4", peft="state")
    assert set(adapter_of(folder)) == {f"blocks.{layer}.att.time_state" for layer in range(2)}
    assert all(tensor.any() for tensor in adapter_of(folder).values())


def test_what_is_trained_whole_is_never_quantised(job):
    with pytest.raises(UserError, match="--quant nf4 has no effect with --peft none"):
        job.run("quant-whole", quant="nf4", peft="none")


# The Bone repository's run_qbone.sh, whose paths, sizes, accelerator and numbers of steps are filled in.
QBONE = """
--load_model {model} --proj_dir {out} --data_file {data} --data_type binidx --vocab_size 256
--ctx_len 32 --epoch_steps 3 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --micro_bsz 2
--n_layer 2 --n_embd 32 --pre_ffn 0 --head_qk 0 --lr_init 2e-3 --lr_final 2e-3 --warmup_steps 0
--beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing x060
--dataload pad --loss_mask pad --peft bone --bone_config {config} --quant int8
"""
BONE_CONFIG = '{"bone_load":"","bone_r":8}'


def test_the_fields_script_for_bone_on_int8_trains(tmp_path, capsys):
    checkpoints.write_state(
        tmp_path / "model.pth", random_model(version=6, vocab_size=256, dtype=torch.bfloat16).state_dict()
    )
    documents = [list(b"one and two") + [0], list(b"three and four") + [0], list(b"five and six and seven") + [0]]
    lengths = [len(document) for document in documents]
    starts = [2 * sum(lengths[:i]) for i in range(3)]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i3q4q", *lengths, *starts, *range(4))
    (tmp_path / "data.idx").write_bytes(index)
    (tmp_path / "data.bin").write_bytes(np.array(sum(documents, []), dtype=np.uint16).tobytes())
    paths = {"model": tmp_path / "model.pth", "out": tmp_path / "out", "data": tmp_path / "data"}
    fit(parse_train([word.format(config=BONE_CONFIG, **paths) for word in QBONE.split()]))
    assert "quant     int8: 16 projections" in capsys.readouterr().out
    assert len(log_of(tmp_path / "out")) == 3
    adapter = adapter_of(tmp_path / "out")
    assert len(adapter) == 16 and all(tensor.any() for tensor in adapter.values())
    assert checkpoints.read_metadata(tmp_path / "out" / "rwkv-0.pth")["quant"] == "int8"
