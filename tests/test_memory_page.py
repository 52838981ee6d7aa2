"""benchmarks/memory.py: its formula is what autograd keeps and what GPUs measured; docs/memory-and-speed.md is its."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models import EVERY_BLOCK, NOTHING, Recompute, build
from tests.conftest import REPOSITORY


def program(name: str):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


memory, step = program("memory"), program("step")


def kept_bytes(arch: Architecture, kind: str, run) -> int:
    """What autograd keeps of `run` on a processor, by the hooks of saved tensors."""
    model = build(arch, op="cpu", dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[run.precision])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.to(model.dtype)
    inject(model, settings=AdapterSettings(kind, 32), initialise=False)  # PiSSA's way takes seconds
    documents = run.tokens // run.document if run.document else 0
    ids, labels, bounds = step.random_batch(arch.vocab_size, run.micro_bsz, run.ctx_len, documents, torch.device("cpu"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return step.kept_bytes(lambda: model(ids, labels=labels, cu_seqlens=bounds, recompute=run.recompute), weights)


def third_layer(version: int, kind: str, run) -> tuple[float, float]:
    """(computed, found): what three layers keep more than two."""
    two, three = (memory.shape(version, layers, 256, 128) for layers in (2, 3))
    computed = [memory.needs(arch, memory.counted(arch, kind, 32), run).kept for arch in (two, three)]
    found = [kept_bytes(arch, kind, run) for arch in (two, three)]
    return computed[1] - computed[0], found[1] - found[0]


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("kind", ["bone", "bat", "lora", "pissa", "bat-col"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_layer_keeps_what_the_formula_says(version, kind, precision):
    for recompute in (NOTHING, memory.WKV):
        run = memory.Run(64, 2, recompute=recompute, precision=precision, device="cpu")
        computed, found = third_layer(version, kind, run)
        assert computed == pytest.approx(found, rel=0.01), recompute


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_layer_of_packed_documents_keeps_what_the_formula_says(version):
    for recompute in (NOTHING, memory.WKV):
        run = memory.Run(64, 4, recompute=recompute, device="cpu", document=16)
        computed, found = third_layer(version, "bone", run)
        assert computed == pytest.approx(found, rel=0.01), recompute


@pytest.mark.parametrize("version", [6, 7])
def test_with_grad_cp_a_layer_keeps_its_input_alone(version):
    run = memory.Run(64, 2, recompute=EVERY_BLOCK, device="cpu")
    computed, found = third_layer(version, "bone", run)
    assert computed == found == 64 * 2 * 256 * 2


def test_blocks_that_are_computed_again_keep_their_input_and_the_others_all():
    run = memory.Run(64, 2, device="cpu")
    arch = memory.shape(7, 3, 256, 128)
    count = memory.counted(arch, "bone", 32)
    for wkv in (False, True):
        kept = [memory.needs(arch, count, replace(run, recompute=Recompute(n, wkv))).kept for n in (1, 2)]
        found = [kept_bytes(arch, "bone", replace(run, recompute=Recompute(n, wkv))) for n in (1, 2)]
        assert kept[0] - kept[1] == pytest.approx(found[0] - found[1], rel=0.01)


def test_what_is_chosen_fits_its_card_and_the_next_larger_batch_does_not():
    for sizes in memory.RWKV7.values():
        arch = memory.shape(7, *sizes)
        count = memory.counted(arch)
        for card in memory.CARDS:
            if run := memory.choose(arch, card, count):
                assert memory.needs(arch, count, run).card <= card * memory.GB
                larger = replace(run, micro_bsz=2 * run.micro_bsz)
                assert run.micro_bsz == 8 or memory.needs(arch, count, larger).card > card * memory.GB


@pytest.mark.parametrize("size", memory.BARS)
def test_the_least_that_a_released_model_takes_is_within_its_bars(size):
    assert all(memory.least(size, quant) <= bar for quant, bar in zip(("none", "nf4"), memory.BARS[size], strict=True))


def test_the_page_holds_what_the_program_prints():
    page = memory.PAGE.read_text(encoding="utf-8")
    assert f"{memory.BEGIN}\n\n{memory.tables()}\n\n{memory.END}" in page, "python benchmarks/memory.py --write"


def test_the_run_that_the_page_shows_is_what_the_program_prints():
    page = memory.PAGE.read_text(encoding="utf-8")
    arch, run = memory.shape(7, *memory.RWKV7["7.2B"]), memory.Run(1024, quant="nf4", recompute=EVERY_BLOCK)
    shown = "\n".join(memory.one_run(arch, memory.counted(arch, "bone", 16), run))
    assert "--size 7.2B --quant nf4 --grad_cp 1 --r 16 --ctx_len 1024" in page and shown in page
