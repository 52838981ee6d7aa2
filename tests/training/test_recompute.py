"""training/recompute.py: what is computed again for how much memory, and that it changes no number."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.checkpoints import read_state
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.models import EVERY_BLOCK, Recompute, build
from rwkv_bone.training import fit as fit_module
from rwkv_bone.training import recompute
from rwkv_bone.training.memory import GB, Counted, Run, count, needs
from rwkv_bone.training.prepare import load_data, plan_batches
from rwkv_bone.training.recompute import decide, levels, needed
from tests.conftest import random_model
from tests.data.conftest import preferences
from tests.test_memory_page import memory

ARCH = memory.shape(7, 32, 2560, 65536)
RUN = Run(ctx_len=4096, micro_bsz=4)
BUDGETS = [size * GB for size in (400, 100, 60, 40, 30, 25, 20, 16, 12, 10, 8, 6, 2)]


@pytest.fixture(scope="module")
def counted() -> Counted:
    return memory.counted(ARCH, "bone", 64)


def choice_for(counted, there, choice="auto", run=RUN):
    return decide(choice, ARCH, counted, run, there)


def test_less_memory_never_computes_less_again_and_all_levels_are_used(counted):
    order = list(levels(ARCH.n_layer))
    finer = [BUDGETS[0] - step * GB / 2 for step in range(800)]
    chosen = [order.index(choice_for(counted, there).recompute) for there in finer]
    assert chosen == sorted(chosen)
    assert {0, 1, len(order) - 1} <= set(chosen) and len(set(chosen)) > 16


def test_with_room_enough_or_unknown_nothing_is_computed_again(counted):
    assert choice_for(counted, BUDGETS[0]).recompute == choice_for(counted, None).recompute == Recompute()


@pytest.mark.parametrize("there", BUDGETS)
def test_what_is_chosen_fits_and_the_cheaper_levels_do_not(counted, there):
    found, order = choice_for(counted, there), list(levels(ARCH.n_layer))
    sizes = [needed(ARCH, counted, replace(RUN, recompute=level)) for level in order]
    place = order.index(found.recompute)
    assert all(size > there for size in sizes[:place])
    assert found.fits == (sizes[place] <= there)
    if not found.fits:
        assert place == len(order) - 1 and min(sizes) > there


@pytest.mark.parametrize("choice", ["0", "1", "wkv", "auto"])
@pytest.mark.parametrize("there", [BUDGETS[0], 20 * GB, None])
def test_the_sentence_names_what_is_needed_what_is_there_and_the_choice(counted, choice, there):
    found = choice_for(counted, there, choice)
    size = needed(ARCH, counted, replace(RUN, recompute=found.recompute))
    assert found.sentence.startswith(f"{size / GB:.1f} GB needed, ")
    assert ("unknown" if there is None else f"{there / GB:.1f} GB are free") in found.sentence
    assert f"--grad_cp {choice}" in found.sentence
    assert ("may not fit" in found.sentence) == (not found.fits) == (there is not None and size > there)


def test_a_fixed_choice_is_obeyed_whatever_is_there(counted):
    for there in (*BUDGETS, None):
        fixed = [choice_for(counted, there, choice).recompute for choice in ("0", "wkv", "1")]
        assert fixed == [Recompute(), Recompute(0, True), Recompute(ARCH.n_layer)]


def test_blocks_are_computed_again_where_the_sentence_says_so(counted):
    found = next(found for there in BUDGETS if 0 < (found := choice_for(counted, there)).recompute.blocks < 32)
    assert f"the first {found.recompute.blocks} of 32 blocks" in found.sentence
    assert re.search(r"without that \d+\.\d GB", found.sentence)


def test_what_is_advised_is_enough_where_it_says_that_it_would_be(counted):
    seen = set()
    for there in BUDGETS:
        for choice in ("0", "auto"):
            found = choice_for(counted, there, choice)
            if found.fits or not found.sentence.endswith(" would"):
                continue
            for flag, value in re.findall(r"--(\w+) (\w+)", found.sentence.partition("may not fit:")[2]):
                seen.add(flag)
                if flag == "grad_cp":
                    assert choice_for(counted, there, value).fits
                    continue
                changed = replace(RUN, **{flag: type(getattr(RUN, flag))(value)})
                assert choice_for(counted, there, "1", changed).fits, (there, flag, value)
    assert seen == {"grad_cp", "micro_bsz", "chunk_ctx", "quant"}


def test_a_run_that_nothing_makes_fit_is_told_all_there_is_to_try(counted):
    found = choice_for(counted, 2 * GB)
    assert not found.fits and found.recompute.blocks == 32
    for flag in ("--micro_bsz 1", "--chunk_ctx 512", "--quant nf4", "--bone_r"):
        assert flag in found.sentence


@pytest.mark.parametrize("kind, words", [
    ("bone", "a smaller --bone_r or --lora_r"), ("lora", "a smaller --bone_r or --lora_r"),
    ("none", "--peft bone instead of every weight"), ("state", "a smaller base model"),
])  # fmt: skip
def test_only_what_the_run_has_is_advised(kind, words):
    trained = memory.counted(ARCH, kind, 64)
    assert choice_for(trained, 2 * GB).sentence.endswith(words)
    assert choice_for(trained, 2 * GB, run=Run(256, 1, "nf4")).sentence.endswith(f"try {words}")


def test_packed_documents_leave_more_states_than_one_long_row(counted):
    run = Run(ctx_len=2048, micro_bsz=2)
    packed = [needed(ARCH, counted, replace(run, document=tokens)) for tokens in (2048, 512, 64)]
    assert packed == sorted(packed) and packed[0] < packed[-1]


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("kind", ["bone", "lora"])
def test_gradients_are_the_same_bits_whatever_is_computed_again(version, kind):
    """So a continued run may choose anew, as it finds other memory free."""
    model = random_model(version=version, n_layer=3)
    model.dtype = torch.bfloat16
    for block in model.blocks:
        block.att.op = "cpu"
    inject(model, settings=AdapterSettings(kind, 8, dropout=0.1 if kind == "lora" else 0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    ids = torch.randint(0, 61, (1, 150))
    cu_seqlens = torch.tensor([0, 37, 38, 150])
    found = []
    for again in (Recompute(), Recompute(0, True), Recompute(1, True), Recompute(1), EVERY_BLOCK):
        torch.manual_seed(1)
        model.zero_grad()
        model(ids, labels=ids.roll(-1, 1), cu_seqlens=cu_seqlens, recompute=again).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_a_run_with_little_memory_writes_what_one_with_much_does(job, monkeypatch, capsys):
    asked = []

    def run_with(place: int, name: str, grad_cp: str) -> dict:
        def made_up(choice, arch, counted, run, there):
            level = list(levels(arch.n_layer))[place]
            asked.append(decide(choice, arch, counted, run, needed(arch, counted, replace(run, recompute=level))))
            return asked[-1]

        monkeypatch.setattr(fit_module, "decide", made_up)
        (path,) = job.run(name, grad_cp=grad_cp, epoch_count=1).glob("rwkv-*.pth")
        assert f"memory    {asked[-1].sentence}" in capsys.readouterr().out
        return read_state(path)

    plain = run_with(0, "plain", "0")
    for place, expected in ((1, Recompute(0, True)), (2, Recompute(1, True)), (-1, Recompute(2, True))):
        little = run_with(place, f"little{place}", "auto")
        assert asked[-1].fits and asked[-1].recompute.blocks <= expected.blocks and asked[-1].recompute.wkv
        assert plain.keys() == little.keys() and all(torch.equal(plain[key], little[key]) for key in plain)


def test_a_run_counts_its_own_model_as_the_table_counts_an_empty_one():
    arch = memory.shape(7, 2, 256, 128)
    model = build(arch, op="torch", dtype=torch.bfloat16)
    inject(model, settings=AdapterSettings("bone", 32))
    assert count(model) == memory.counted(arch, "bone", 32)


def test_with_several_forward_passes_a_step_the_gradients_are_there_from_the_second_on(counted):
    one, several = (needs(ARCH, counted, replace(RUN, accumulate=passes)).passing for passes in (1, 4))
    assert several - one == pytest.approx(4 * counted.trained, rel=0.05)


def test_processes_of_one_machine_share_its_memory_and_unknown_stays_unknown(monkeypatch):
    monkeypatch.setattr(recompute.allocator, "resident", lambda: 7)  # which each of them has already
    for free, share in ((800, 207), (None, None)):
        monkeypatch.setattr(recompute, "free_memory", lambda free=free: free)
        assert recompute.memory_there("cpu", 4) == share


def test_all_ranks_do_what_the_most_cautious_one_does(monkeypatch):
    others = [Recompute(0, True), Recompute(3, True), Recompute()]

    def all_reduce(mine, op):
        assert op == torch.distributed.ReduceOp.MAX
        for other in others:
            torch.maximum(mine, torch.tensor(other), out=mine)

    monkeypatch.setattr(recompute.dist, "all_reduce", all_reduce)
    trainer = SimpleNamespace(world_size=4, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    for mine, agreed in ((Recompute(), Recompute(3, True)), (Recompute(5, True), Recompute(5, True))):
        module = SimpleNamespace(recompute=mine)
        recompute.Agree().setup(trainer, module, "fit")
        assert module.recompute == agreed and type(module.recompute.wkv) is bool


def test_a_run_is_described_by_its_rows_as_they_are(job):
    config = parse_train([word for word in job.argv({"accumulate_grad_batches": 3}) if word != "--typed"])
    dataset, _ = load_data(config, 256, config.data)
    padded = recompute.run_of(config, plan_batches(config, dataset), "cpu")
    longest = int(dataset.lengths.max())
    assert longest < config.data.ctx_len and (padded.length, padded.rows, padded.accumulate) == (longest, 4, 3)
    config = replace(config, data=replace(config.data, dataload="pack"), model=replace(config.model, chunk_ctx=100))
    packed = recompute.run_of(config, plan_batches(config, dataset), "cpu")
    assert (packed.length, packed.rows, packed.whole) == (100, 1, 4 * config.data.ctx_len)
    assert packed.document == int(dataset.lengths.mean())


@pytest.mark.parametrize("how", ["pad", "pack"])
def test_a_pair_counts_as_both_of_its_answers(job, counted, how):
    """As many tokens go through the model as the fullest batch has; every setting of memory follows from that."""
    rows = [([1] * 5, [2] * (1 + i % 3), [3] * (1 + i % 4)) for i in range(20)]
    flags = {"dataload": how, "ctx_len": 12, "micro_bsz": 3}
    config = parse_train([word for word in job.argv(flags) if word != "--typed"])
    plan = plan_batches(config, Dataset([preferences(rows)], 12))
    run = recompute.run_of(config, plan, "cuda")
    most = max(plan.batch(0, step, 0, 0).ids.numel() for step in range(plan.steps_in(0)))
    # A padded batch has one id less than the longest answer, and a packed one sixteenths of its room.
    assert run.tokens == (most + 6 if how == "pad" else 72) and most > 36
    assert run.rows == (6 if how == "pad" else 1) and run.document == (0 if how == "pad" else 7)
    # So it is a run of twice as many samples.
    assert needed(ARCH, counted, run) == needed(ARCH, counted, replace(run, members=1, micro_bsz=6))
