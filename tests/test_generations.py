"""What holds for every generation, adapter and operator: it trains, merges, and runs in the `rwkv` package."""

import copy
import json

import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.adapters.registry import split_key
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.models import EVERY_BLOCK, build
from rwkv_bone.training.context import chunked_loss
from tests.conftest import random_model
from tests.rwkv_oracle import logits as oracle_logits
from tests.training.conftest import Job, adapter_of, largest_difference, log_of, one_thread  # noqa: F401

ROWS = [(f"{n} -> ", str(n)[::-1] * (1 + n % 4)) for n in range(37, 45)]
KINDS = {
    "bone": {"peft": "bone", "train_parts": "ln time"},
    "bat": {"peft": "bone", "bone_mode": "bat", "train_parts": "state"},
    "pissa": {"peft": "pissa", "lora_r": 4, "lora_alpha": 8.0, "lr_init": 3e-3},
    "state": {"peft": "state", "lr_init": 0.02},
}


@pytest.fixture(scope="module", params=[5, 6, 7])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def generation_job(version, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"v{version}")
    base, data = folder / "base.pth", folder / "rows.jsonl"
    checkpoints.write_state(base, random_model(vocab_size=256, version=version, dtype=torch.bfloat16).state_dict())
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in ROWS))
    # Every step sees all rows, so that losses compare.
    options = {"accelerator": "cpu", "precision": "fp32", "micro_bsz": 8, "ctx_len": 64, "epoch_count": 2}
    options |= {"peft": "bone", "bone_r": 8, "lr_init": 1e-2, "lr_final": 1e-3}
    return Job(folder, {"load_model": base, "data_file": data, **options})


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request, generation_job):
    """(base, adapter) of a short run through the C++ kernel."""
    flags = {name: value for name, value in KINDS[request.param].items() if name != "train_parts"}
    argv = generation_job.argv({**flags, "proj_dir": generation_job.folder / request.param})
    if "train_parts" in KINDS[request.param]:
        argv += ["--train_parts", *KINDS[request.param]["train_parts"].split()]
    from rwkv_bone.config.flags import parse_train
    from rwkv_bone.training.fit import fit

    fit(parse_train(argv))
    return generation_job.flags["load_model"], generation_job.folder / request.param


def test_training_lowers_the_loss_and_the_merged_file_runs_in_the_rwkv_package(version, trained, tmp_path):
    base, folder = trained
    losses = [line["loss"] for line in log_of(folder)]
    assert losses[-1] < losses[0]
    if folder.name == "state":
        state = adapter_of(folder, "rwkv-1.pth")
        assert set(state) == {f"blocks.{layer}.att.time_state" for layer in range(2)}
        assert all(x.shape == (2, 16, 16) and x.dtype == torch.float32 and x.any() for x in state.values())
    merged = tmp_path / "merged.pth"
    report = merge_files(MergeConfig(str(base), str(folder / "rwkv-1.pth"), str(merged)))
    assert any(line.startswith("logits") for line in report)
    ids = torch.tensor([list(b"41 -> 14 and more of it")])
    with torch.no_grad():
        live = load_model(base, adapter=folder / "rwkv-1.pth", dtype=torch.float32)(ids)[0]
        alone = load_model(merged, dtype=torch.float32)(ids)[0]
        plain = load_model(base, dtype=torch.float32)(ids)[0]
    effect = (live - plain).norm()
    assert (alone - live).norm() < 0.1 * effect  # what rounding to bf16 leaves of the difference
    # The package applies ln0 to the embedding in the file's dtype, so it gets the same values in fp32.
    exact = tmp_path / "merged-fp32.pth"
    checkpoints.write_state(exact, {key: tensor.float() for key, tensor in checkpoints.read_state(merged).items()})
    assert abs(alone.numpy() - oracle_logits(exact, ids[0].tolist(), version)).max() < 1e-3


@pytest.mark.parametrize("op", ["torch", "cpu"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_after_one_backward_every_adapter_parameter_has_a_gradient(version, kind, op):
    model = random_model(version=version)
    for block in model.blocks:
        block.att.op = op
    inject(model, settings=AdapterSettings(kind, 8), train_parts=["state"])
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    missing = [key for key, p in trained.items() if not p.grad.abs().sum() > 0]
    # LoRA's A waits for B, which is zero at first.
    assert missing == [key for key in trained if kind == "lora" and key.endswith("lora_A")]


@pytest.mark.parametrize("kind", [*ADAPTERS, "state"])
def test_chunked_context_has_the_gradient_of_the_whole_sequence(version, kind):
    model = random_model(version=version, n_layer=3)
    generator = torch.Generator().manual_seed(0)
    inject(model, settings=AdapterSettings(kind, 8), train_parts=["ln", "time", "state"], generator=generator)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            if split_key(key) or key.endswith("time_state"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ids, labels = torch.randint(1, 61, (2, 3, 53), generator=generator)
    labels[:, :7] = -100
    labels[1, 20:33] = -100
    exact = copy.deepcopy(model).double()
    exact.dtype = exact.emb.dtype = torch.float64
    for block in exact.blocks:
        block.att.op = "reference"

    def gradients(model, loss) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {key: p.grad.double() for key, p in model.named_parameters() if p.requires_grad}

    true = gradients(exact, exact(ids, labels=labels))

    def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
        return max(((ours[key] - theirs[key]).norm() / theirs[key].norm()).item() for key in theirs)

    # In float64 only the states between chunks are rounded, to fp32. In fp32 a random RWKV-6 loses up to 3e-5 whole,
    # too, whatever its seed.
    for options in ({"chunk": 8}, {"chunk": 16, "recompute": EVERY_BLOCK}):
        assert worst(gradients(exact, chunked_loss(exact, ids, labels, **options)), true) < 1e-6
        assert worst(gradients(model, chunked_loss(model, ids, labels, **options)), true) < 3e-5


def test_a_truncated_gradient_is_another_one(version):
    model = random_model(version=version)
    ids = torch.randint(1, 61, (1, 32), generator=torch.Generator().manual_seed(0))
    norms = []
    for cut in (0, 1, 4):
        model.zero_grad()
        chunked_loss(model, ids, ids, chunk=8, bptt_chunks=cut).backward()
        norms.append(model.blocks[0].att.key.weight.grad.clone())
    assert torch.equal(norms[0], norms[2]) and not torch.allclose(norms[0], norms[1], rtol=1e-3)


def test_chunked_context_on_two_processes_saves_the_adapter_of_the_whole_run(generation_job, version):
    stage = {5: 1, 6: 2, 7: 3}[version]
    whole = generation_job.run("whole", op="torch", epoch_count=1)
    flags = {"chunk_ctx": 8, "devices": 2, "micro_bsz": 1, "op": "torch", "grad_cp": 1, "epoch_count": 1}
    folder, done = generation_job.ranks("chunks", strategy=f"deepspeed_stage_{stage}", **flags)
    assert done.returncode == 0, done.stderr
    assert "chunks of 8 tokens; gradient exact" in done.stdout
    assert largest_difference(adapter_of(folder), adapter_of(whole)) < 2e-5


def test_rwkv_6_7b_has_the_parameters_that_the_paper_counts():
    ranks = {"mix": 64, "decay": 128}
    with torch.device("meta"):
        model = build(Architecture(6, 32, 4096, 64, 64, 14336, 65536, ranks))
    assert round(inject(model, settings=AdapterSettings("bone", 64)).trainable / 1e6, 2) == 88.08
