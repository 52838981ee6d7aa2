"""What a run leaves: parameters under checkpoint keys, one log line a step, and never over earlier results."""

import json
import os

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import from_json, to_json
from rwkv_bone.errors import UserError
from rwkv_bone.training import fit as fit_module
from rwkv_bone.training.place import place
from rwkv_bone.training.prepare import prepare_model
from tests.conftest import random_model
from tests.nvidia import write_smi
from tests.training.conftest import ROWS, adapter_of, largest_difference, log_of

FIELDS = {
    "step", "epoch", "loss", "lr", "tokens", "trained_tokens", "grad_norm", "tokens_per_s", "seconds", "data_wait_ms",
    "peak_memory_mb", "peak_reserved_mb", "crc32",
}  # fmt: skip


@pytest.fixture(scope="module")
def memorised(job):
    """Forty steps on the 11 rows, which are also the held-out data: (proj_dir, the Prepared model)."""
    kept = []
    original = fit_module.prepare_model

    def keep(*args, **options):
        kept.append(original(*args, **options))
        return kept[0]

    fit_module.prepare_model = keep
    try:
        folder = job.run(
            "memorised",
            draws=True,
            precision="bf16",
            micro_bsz=11,
            epoch_count=40,
            epoch_begin=3,
            epoch_save=20,
            save_steps=15,
            lr_init=3e-2,
            eval_data=job.flags["data_file"],
        )
    finally:
        fit_module.prepare_model = original
    return folder, kept[0]


def test_the_loss_falls_on_rows_that_can_be_learned_by_heart(memorised):
    losses = [line["loss"] for line in log_of(memorised[0])]
    assert losses[-1] < 0.6 * losses[0]


def test_held_out_loss_falls_and_is_recorded_before_and_after(memorised):
    report = json.loads((memorised[0] / "evaluation.json").read_text())
    assert report["after"]["loss"] < 0.6 * report["before"]["loss"]
    assert report["before"]["tokens"] == sum(len(response) + 1 for _, response in ROWS)
    assert report["before"]["loss"] == pytest.approx(log_of(memorised[0])[0]["loss"], rel=1e-3)
    assert [(a["prompt"], a["expected"]) for a in report["after"]["answers"]] == ROWS


def test_log_lines_are_complete_and_true(memorised):
    lines = log_of(memorised[0])
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["epoch"] for line in lines] == list(range(40))
    for line in lines:
        assert set(line) == FIELDS
        assert line["trained_tokens"] == sum(len(response) + 1 for _, response in ROWS)
        assert line["tokens"] == sum(len(prompt) + len(response) for prompt, response in ROWS)
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"], rel=0.05)
        assert line["peak_memory_mb"] > 0
    assert lines[0]["lr"] == 3e-2 and lines[-1]["lr"] == 1e-3


def test_files_are_named_by_epoch_and_step(memorised):
    assert sorted(path.name for path in memorised[0].glob("rwkv-*.pth")) == [
        "rwkv-17-s15.pth", "rwkv-22.pth", "rwkv-32-s30.pth", "rwkv-42.pth", "rwkv-best.pth",
    ]  # fmt: skip


def test_the_loss_curve_is_a_png(memorised):
    assert (memorised[0] / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_config_beside_the_results_starts_the_same_run(memorised, job):
    text = (memorised[0] / "config.json").read_text()
    config = from_json(text)
    assert config.run.epoch_count == 40 and config.adapter.bone_r == 8
    assert to_json(config) == text


def test_a_saved_adapter_says_what_it_belongs_to(memorised, job):
    path = memorised[0] / "rwkv-22.pth"
    beside, inside = json.loads(path.with_suffix(".json").read_text()), checkpoints.read_metadata(path)
    assert beside == inside
    base = checkpoints.read_state(job.flags["load_model"])
    assert inside["format"] == 1 and inside["kind"] == "bone" and inside["r"] == 8 and inside["step"] == 20
    assert inside["base"] == checkpoints.fingerprint(base)
    assert inside["architecture"] == checkpoints.architecture_of(base).to_dict()
    assert inside["config"]["optim"]["lr_init"] == 3e-2


def test_the_frozen_base_stays_bf16_and_unchanged_and_the_adapter_fp32(memorised, job):
    folder, prepared = memorised
    base, adapter = checkpoints.read_state(job.flags["load_model"]), adapter_of(folder, "rwkv-42.pth")
    live = dict(prepared.model.named_parameters())
    assert live.keys() == base.keys() | adapter.keys() and not base.keys() & adapter.keys()
    for key, tensor in base.items():
        assert live[key].dtype == torch.bfloat16 and torch.equal(live[key].detach(), tensor)
        assert not live[key].requires_grad
    for key, tensor in adapter.items():
        assert live[key].dtype == tensor.dtype == torch.float32 and torch.equal(live[key].detach(), tensor)


def test_an_existing_folder_of_results_is_kept(memorised, job):
    before = {path.name: path.stat().st_mtime_ns for path in memorised[0].iterdir()}
    with pytest.raises(UserError, match="memorised holds the results of an earlier run.*--overwrite 1"):
        job.run("memorised", resume="never")
    with pytest.raises(
        UserError, match="memorised holds a run of other settings: --lr_init was .*--precision was bf16"
    ):
        job.run("memorised")
    assert {path.name: path.stat().st_mtime_ns for path in memorised[0].iterdir()} == before


def test_continuing_from_an_adapter_starts_at_its_loss(memorised, job):
    folder = job.run("continued", precision="bf16", micro_bsz=11, lr_init=1e-4, lr_final=1e-4,
                     peft_load=memorised[0] / "rwkv-42.pth")  # fmt: skip
    after = json.loads((memorised[0] / "evaluation.json").read_text())["after"]["loss"]
    assert log_of(folder)[0]["loss"] == pytest.approx(after, rel=1e-3)
    moved = largest_difference(adapter_of(folder), adapter_of(memorised[0], "rwkv-42.pth"))
    assert 0 < moved < 2e-4


def test_overwriting_removes_old_results_and_nothing_of_the_users(job):
    folder = job.run("again", epoch_count=2)
    (folder / "notes.txt").write_text("mine")
    job.run("again", overwrite=1)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.glob("rwkv-*.pth")] == ["rwkv-0.pth"]
    assert len(log_of(folder)) == 3


def test_overwriting_the_adapter_a_run_starts_from_is_refused(memorised, job):
    with pytest.raises(UserError, match="rwkv-42.pth, which this run starts from"):
        job.run("memorised", overwrite=1, peft_load=memorised[0] / "rwkv-42.pth")
    assert (memorised[0] / "rwkv-42.pth").is_file()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(job):
    (job.folder / "file").write_text("")
    with pytest.raises(UserError, match="--proj_dir .*file/out is not a writable folder"):
        job.run("file/out", load_model="missing.pth")
    assert not os.path.exists(job.folder / "file/out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_every_weight_keeps_the_bases_keys_and_dtypes_and_file(job, dtype):
    path = job.folder / f"full-{dtype}.pth"
    checkpoints.write_state(path, random_model(vocab_size=256, dtype=dtype).state_dict())
    content = path.read_bytes()
    folder = job.run(f"full-{dtype}", load_model=path, peft="none", lr_init=1e-3, weight_decay=0.1)
    assert path.read_bytes() == content
    base, trained = checkpoints.read_state(path), adapter_of(folder)
    assert list(trained) == list(base)
    for key, tensor in trained.items():
        assert tensor.dtype == base[key].dtype and tensor.shape == base[key].shape
    changed = [key for key in base if not torch.equal(base[key], trained[key])]
    assert len(changed) > 0.9 * len(base)
    assert checkpoints.architecture_of(trained) == checkpoints.architecture_of(base)


def test_trained_base_parts_start_from_the_files_own_values(job):
    path = job.folder / "fp32.pth"
    checkpoints.write_state(path, random_model(vocab_size=256).state_dict())
    flags = {"load_model": path, "precision": "bf16", "train_parts": "ln"}
    config = parse_train(job.argv(flags))
    prepared = prepare_model(config, torch.device("cpu"))
    place(prepared.model, torch.device("cpu"), prepared.dtype)
    base, live = checkpoints.read_state(path), dict(prepared.model.named_parameters())
    assert torch.equal(live["blocks.1.ln1.weight"].detach(), base["blocks.1.ln1.weight"])
    assert live["blocks.1.att.key.weight"].dtype == torch.bfloat16
    assert "blocks.1.ln1.weight" in prepared.output.keys and "emb.weight" not in prepared.output.keys


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"])
def test_an_offloaded_optimiser_gives_the_same_adapter(job, strategy):
    reference = job.run(f"reference-{strategy}")
    folder = job.run(strategy, strategy=strategy)
    assert largest_difference(adapter_of(folder), adapter_of(reference)) < 2e-5


def test_training_from_scratch_on_windows_of_text_gives_a_loadable_bf16_model(job):
    text = job.folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Row {n} says {n * n}. " * 9}) + "\n" for n in range(40)))
    sizes = {"n_layer": 2, "n_embd": 32, "vocab_size": 256, "head_size": 16}
    folder = job.run("scratch", load_model="", peft="none", data_file=text, dataload="get", ctx_len=48,
                     epoch_steps=12, lr_init=5e-3, warmup_steps=2, **sizes)  # fmt: skip
    state = adapter_of(folder)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    arch = checkpoints.architecture_of(state)
    assert (arch.n_layer, arch.n_embd, arch.vocab_size, arch.head_size) == (2, 32, 256, 16)
    lines = log_of(folder)
    assert len(lines) == 12 and lines[-1]["loss"] < lines[0]["loss"] - 1


def test_a_gpu_that_is_not_there_is_said(job):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--accelerator gpu: PyTorch sees no CUDA device"):
        job.run("gpu", accelerator="gpu")
    assert not (job.folder / "gpu").exists()


def test_a_run_with_a_card_that_torch_cannot_use_ends_before_anything_is_loaded(job, tmp_path, monkeypatch):
    write_smi(tmp_path, "525.60.13")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="driver  525.60.13"):
        job.run("idle", accelerator="auto", load_model=tmp_path / "none.pth")
    assert not (job.folder / "idle").exists()
