"""training/guard.py: what is refused before the first step, and what is only told."""

import re
from dataclasses import replace

import pytest

from rwkv_bone.errors import UserError
from rwkv_bone.models import EVERY_BLOCK
from rwkv_bone.training import fit as fit_module
from rwkv_bone.training import guard, prepare
from rwkv_bone.training.memory import GB, parts
from tests.training.test_out_of_memory import plan_of


def refused(plan, total) -> str:
    with pytest.raises(UserError) as error:
        guard.check(plan, total)
    return str(error.value)


def test_only_a_run_that_is_certain_not_to_fit_is_refused():
    plan = plan_of()
    size = parts(plan.arch, plan.count, plan.run).total
    for total in (None, 2 * size, size, 0.95 * size):  # the estimate may be too large by a tenth
        guard.check(plan, total)
    said = refused(plan, 0.85 * size)
    assert f"it needs {size / GB:.1f} GB, and the GPU has {0.85 * size / GB:.1f} GB" in said


def test_what_is_free_now_refuses_nothing():
    plan = plan_of(there=GB / 10)
    guard.check(plan, 1000 * GB)
    assert list(guard.warnings(plan)) and not list(guard.warnings(replace(plan, there=None)))
    assert not list(guard.warnings(replace(plan, there=1000 * GB)))


def test_the_remedies_have_figures_the_largest_first():
    plan = plan_of(there=6 * GB)
    rows = re.findall(r"(--[^ ]+ \S+.*?)   ([\d.]+) GB, ([\d.]+) GB less", "\n".join(guard.warnings(plan)))
    assert len(rows) > 4
    left = [float(row[1]) for row in rows]
    assert left == sorted(left)
    for _, needed, less in rows:
        assert float(needed) + float(less) == pytest.approx(plan.size / GB, abs=0.11)


def test_pages_of_a_mapped_base_refuse_nothing_on_a_processor():
    """The system may drop them: a run is then slow, and not impossible."""
    plan = plan_of(device="cpu")
    plan = replace(plan, run=replace(plan.run, recompute=EVERY_BLOCK, micro_bsz=1))
    found = plan.parts
    between = 0.9 * found.total - found.weights / 2
    guard.check(plan, between)
    for other in (replace(plan.run, quant="int8"), replace(plan.run, stage=3)):
        made = replace(plan, run=other)
        refused(made, 0.9 * made.parts.total - 0.01 * GB)
    assert "swap included" in refused(plan, 0.9 * found.total - 1.1 * found.weights)


def test_a_run_is_refused_before_its_first_step_and_leaves_nothing(job, monkeypatch):
    monkeypatch.setattr(guard, "total_memory", lambda: 2**20)
    with pytest.raises(UserError, match="this run cannot fit: it needs .* swap included, 1 MB"):
        job.run("never")
    assert not (job.folder / "never").exists()


def test_a_run_that_may_not_fit_now_is_told_so_and_trains(job, monkeypatch, capsys):
    monkeypatch.setattr(fit_module, "memory_there", lambda *_: 2**20)
    folder = job.run("tight")
    said = capsys.readouterr().out
    # The model is tiny: nothing that can be lowered would help.
    assert "This may not fit" in said and "Every setting that lowers it is at its lowest" in said
    assert list(folder.glob("rwkv-*.pth"))


def test_a_model_from_scratch_is_refused_before_it_takes_memory(job, monkeypatch):
    def never(*_):
        raise AssertionError("the model got values")

    monkeypatch.setattr(prepare, "init_from_scratch", never)
    monkeypatch.setattr(guard, "total_memory", lambda: 8 * GB)
    sizes = {"load_model": "", "n_layer": 61, "n_embd": 4096, "vocab_size": 65536, "tokenizer": "bytes", "peft": "none"}
    job = type(job)(job.folder, {name: value for name, value in job.flags.items() if name != "bone_r"})
    with pytest.raises(UserError, match="cannot fit"):
        job.run("scratch", **sizes)
