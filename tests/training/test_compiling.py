"""--compile: a run with compiled blocks is the run without them, and no run relies on blocks that compile wrong."""

import functools
import json

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from rwkv_bone.errors import UserError
from rwkv_bone.models import RWKV
from rwkv_bone.training import compiling
from tests.training.conftest import adapter_of, largest_difference, log_of

PACKED = {"dataload": "pack", "op": "cpu", "micro_bsz": 1, "ctx_len": 48}


@pytest.fixture
def backend(monkeypatch):
    """Sets what compiles the blocks. The default takes seconds where others take a fraction of one."""
    torch.compiler.reset()
    original = RWKV.compile_blocks

    def choose(chosen):
        monkeypatch.setattr(RWKV, "compile_blocks", lambda self, on=True: original(self, on, backend=chosen))

    monkeypatch.setattr(compiling, "obstacle", lambda device: "")  # of the default
    choose("aot_eager")
    return choose


@pytest.fixture(scope="module")
def plain(job):
    """A function flags -> the run without compiled blocks, made once for each set of flags."""

    @functools.cache
    def run(items):
        return job.run(f"plain-{abs(hash(items))}", **dict(items))

    return lambda flags: run(tuple(sorted(flags.items())))


WAYS = {
    "packed": {"epoch_count": 3},
    "rows of unequal width": {"dataload": "pad", "micro_bsz": 2, "ctx_len": 64},
    "recomputed blocks": {"grad_cp": 1},
    "in chunks, at stage 2": {"chunk_ctx": 16, "strategy": "deepspeed_stage_2"},
    "on 8 bits": {"quant": "int8"},
    "pairs that share long prompts": {"task": "dpo", "ctx_len": 64, "epoch_count": 2},
    "on 4 bits, with dropout": {"quant": "nf4", "peft": "lora", "lora_r": 4, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way != "packed" else ()) for way in WAYS])
def test_a_compiled_run_is_the_plain_run(job, plain, backend, way, capsys):
    flags = PACKED | WAYS[way]
    if "task" in flags:
        flags["data_file"] = job.folder / "pairs.jsonl"
        rows = [{"prompt": "please " * 5 + f"{n}: ", "chosen": "a" * n, "rejected": "b" * (9 - n)} for n in range(1, 9)]
        flags["data_file"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    counters.clear()
    compiled = job.run(f"compiled-{way}", compile=1, **flags)
    assert "gradients are those of plain blocks to" in capsys.readouterr().out
    assert 0 < counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    if way == "packed":  # a block that has no state has two graphs, the first block's and that of the others, ...
        assert counters["stats"]["unique_graphs"] == 2
        # ... and other lengths and documents, of which each epoch has others, need no more.
        assert counters["frames"]["ok"] == counters["frames"]["total"] == 2
    losses, expected = ([line["loss"] for line in log_of(run)] for run in (compiled, plain(flags)))
    assert losses == pytest.approx(expected, rel=1e-6)
    last = f"rwkv-{flags.get('epoch_count', 1) - 1}.pth"
    assert largest_difference(adapter_of(compiled, last), adapter_of(plain(flags), last)) < 2e-5


@pytest.mark.slow
def test_a_run_that_goes_on_compiles_what_the_first_one_did(job, backend):
    flags = PACKED | {"compile": 1, "epoch_count": 2}
    whole = job.run("whole", **flags)
    job.run("halves", **flags | {"epoch_count": 1, "lr_final": 1e-2})
    job.run("halves", **flags | {"lr_final": 1e-2}, resume=1)
    again = job.run("once", **flags | {"lr_final": 1e-2})
    assert largest_difference(adapter_of(job.folder / "halves", "rwkv-1.pth"), adapter_of(again, "rwkv-1.pth")) == 0
    assert len(log_of(whole)) == len(log_of(job.folder / "halves"))


def scaled(factor: float, forward: bool):
    """A backend whose compiled forward or backward is off by a factor."""

    def off(graph, inputs):
        return make_boxed_func(lambda *args: tuple(x * factor if is_float(x) else x for x in graph(*args)))

    def right(graph, inputs):
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=off if forward else right, bw_compiler=right if forward else off)


def is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.slow
def test_wrong_gradients_are_refused_by_name(job, backend):
    backend(scaled(1.5, forward=False))
    with pytest.raises(UserError, match=r"--compile 1: with compiled blocks the gradient of blocks\.\d\..* is off by"):
        job.run("wrong-gradients", compile=1, **PACKED)


@pytest.mark.slow
def test_where_the_compiler_is_wrong_or_fails_auto_goes_on_without_it(job, plain, backend, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "not_worth", lambda module, device: "")
    backend(scaled(1.5, forward=True))
    wrong = job.run("wrong", compile="auto", **PACKED)
    assert "compile   no: with compiled blocks " in capsys.readouterr().out

    def fail(graph, inputs):
        raise RuntimeError("no C++ compiler\nand more")

    torch.compiler.reset()
    backend(fail)
    failed = job.run("failed", compile="auto", **PACKED)
    assert "no C++ compiler" in capsys.readouterr().out
    for folder in (wrong, failed):
        assert largest_difference(adapter_of(folder), adapter_of(plain(PACKED))) == 0
    with pytest.raises(UserError, match="--compile 1: compiling failed .*no C.. compiler.*: use --compile 0"):
        job.run("refused", compile=1, **PACKED)


def test_auto_leaves_blocks_as_they_are_on_a_cpu_and_in_short_runs(job, capsys):
    job.run("auto", compile="auto", **PACKED)
    assert f"compile   no: {compiling.ON_A_CPU}" in capsys.readouterr().out

    class Short:
        total_steps, first_step = compiling.WORTH + 3, 4
        plan = type("Plan", (), {"accumulate": 1})

    assert "the run has 1,999 forward passes" in compiling.not_worth(Short, torch.device("cuda"))
    Short.first_step = 3
    assert compiling.not_worth(Short, torch.device("cuda")) == ""


def test_stage_3_does_not_take_compiled_blocks(job):
    with pytest.raises(UserError, match="--compile 1 has no effect with --strategy deepspeed_stage_3"):
        job.run("stage-3", compile=1, strategy="deepspeed_stage_3")


def test_a_folder_that_the_compiler_does_not_take_is_named(job, monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/my name/torch/__init__.py")
    with pytest.raises(
        UserError, match="--compile 1: on a CPU .* does not take the space in /home/my name/torch: use --c"
    ):
        job.run("space", compile=1, **PACKED)
    assert compiling.obstacle(torch.device("cuda")) == ""


@pytest.mark.slow
@pytest.mark.skipif(bool(compiling.obstacle(torch.device("cpu"))), reason="PyTorch is in a folder with a space")
def test_the_compiler_that_users_get_gives_the_same_run(job, plain):
    torch.compiler.reset()
    flags = PACKED | {"precision": "bf16"}
    compiled = job.run("inductor", compile=1, **flags)
    losses, expected = ([line["loss"] for line in log_of(run)] for run in (compiled, plain(flags)))
    assert losses == pytest.approx(expected, rel=1e-2)
