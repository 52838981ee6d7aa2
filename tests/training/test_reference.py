"""What dpo and kto compare with stays the model that the run began with: read again, or computed again, or refused."""

import json
import shutil

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import load_dataset
from rwkv_bone.errors import UserError
from rwkv_bone.training import project
from rwkv_bone.training.reference import TRAINING, Kept
from tests.conftest import random_model
from tests.training.conftest import adapter_of, largest_difference, log_of
from tests.training.runs import Killed, dying_after
from tests.training.test_preferences import PAIRS, answer_logp

TIMES = ("seconds", "tokens_per_s", "data_wait_ms", "peak_memory_mb", "peak_reserved_mb", "crc32")
FLAGS = {"task": "dpo", "epoch_count": 2, "save_steps": 1}


@pytest.fixture(scope="module")
def pairs(job):
    path = job.folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in PAIRS))
    return path


@pytest.fixture(scope="module")
def run(job, pairs):
    return lambda name, **flags: job.run(name, **({"data_file": pairs} | FLAGS | flags))


@pytest.fixture(scope="module")
def whole(run):
    """{name: proj_dir}: runs that nothing has stopped."""
    started = {"peft_load": run("earlier", random_seed=1) / "rwkv-1.pth"}
    names = {"new": {}, "started": started, "base": started | {"reference": "base"}}
    return {name: (run(f"whole {name}", **flags), flags) for name, flags in names.items()}


@pytest.fixture
def half(run, whole, tmp_path):
    """A run of this name that was killed after its third step; returns (proj_dir, flags)."""

    def train(name):
        flags = whole[name][1]
        with dying_after(3), pytest.raises(Killed):
            run(tmp_path / "half", **flags)
        return tmp_path / "half", flags

    return train


def labels(path):
    rows = [{"prompt": p, "completion": (c, r)[n % 2], "label": n % 2 == 0} for n, (p, c, r) in enumerate(PAIRS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbers(folder):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in log_of(folder)]


def table(folder, name=TRAINING):
    return checkpoints.read_state(folder / project.REFERENCE)[name].clone()


def assert_same_to_the_bit(folder, reference):
    assert numbers(folder) == numbers(reference)
    ours, theirs = (checkpoints.read_state(path / "resume.pth") for path in (folder, reference))
    assert largest_difference(ours, theirs) == 0
    assert largest_difference(adapter_of(folder, "rwkv-1.pth"), adapter_of(reference, "rwkv-1.pth")) == 0


def lose(path):
    path.unlink()


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def spoil(path):
    """A file in order, of another run."""
    Kept(path).keep(TRAINING, torch.zeros(len(PAIRS), 2, dtype=torch.float64), "something else")


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("new", None, "as"),
        ("new", lose, "is missing: it is computed anew, as of the start of the run"),
        pytest.param("new", damage, "is damaged", marks=pytest.mark.slow),
        ("started", spoil, "of another model, or of other data: it is computed anew"),
        ("base", lose, "is missing: it is computed anew, as of the start of the run"),
    ],
)
def test_a_run_that_was_killed_goes_on_with_the_reference_of_its_beginning(run, whole, half, name, harm, said, capsys):
    folder, flags = half(name)
    before = table(folder)
    if harm:
        harm(folder / project.REFERENCE)
    capsys.readouterr()
    run(folder, **flags)
    assert_same_to_the_bit(folder, whole[name][0])
    assert torch.equal(table(folder), before)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference ")]
    assert said in lines[0] and str(folder / project.REFERENCE) in lines[0]
    assert len(lines) == (2 if harm else 1) and "log-probabilities of 7 pairs" in lines[-1]


# fmt: off
VARIANTS = {
    "stage 2, labels": {"strategy": "deepspeed_stage_2", "task": "kto"},
    "stage 3, recomputed": {"strategy": "deepspeed_stage_3", "grad_cp": 1},
    "stage 2 with offload": {"strategy": "deepspeed_stage_2_offload"},
    "stage 3 with offload, labels": {"strategy": "deepspeed_stage_3_offload", "task": "kto"},
    "packed, accumulation": {"dataload": "pack", "ctx_len": 13, "micro_bsz": 1, "accumulate_grad_batches": 2},
    "labels, chunks, accumulation": {"task": "kto", "chunk_ctx": 4, "micro_bsz": 1, "accumulate_grad_batches": 2},
    "lora with dropout, labels": {"peft": "lora", "lora_r": 4, "lora_dropout": 0.5, "task": "kto"},
    "pissa in bf16": {"peft": "pissa", "lora_r": 4, "precision": "bf16"},
    "bat and parts of the base": {"bone_mode": "bat", "train_parts": "[ln, time, head]"},
    "initial state": {"peft": "state"},
    "every weight": {"peft": "none", "lr_init": 1e-3, "precision": "bf16"},
    "every weight at stage 3": {"peft": "none", "lr_init": 1e-3, "strategy": "deepspeed_stage_3"},
    "nf4": {"quant": "nf4"},
    "without a reference": {"task": "orpo"},
}
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_of_whatever_is_trained_a_lost_reference_is_computed_again_to_the_bit(run, job, tmp_path, name):
    flags = {"epoch_count": 3} | VARIANTS[name]
    if flags.get("task") == "kto":
        flags["data_file"] = labels(tmp_path / "labels.jsonl")
    with dying_after(4), pytest.raises(Killed):
        run(tmp_path / "half", **flags)
    (tmp_path / "half" / project.REFERENCE).unlink(missing_ok=True)
    run(tmp_path / "half", **flags)
    run(tmp_path / "whole", **flags)
    assert numbers(tmp_path / "half") == numbers(tmp_path / "whole")
    for file in ("resume.pth", "rwkv-2.pth"):
        ours, theirs = (checkpoints.read_state(tmp_path / part / file) for part in ("half", "whole"))
        assert largest_difference(ours, theirs) == 0


@pytest.mark.parametrize("harm", ["gone", "other values"])
def test_without_the_reference_and_the_adapter_it_began_with_a_run_does_not_go_on(run, half, tmp_path, whole, harm):
    folder, flags = half("started")
    adapter = shutil.copy(flags["peft_load"], tmp_path / "rwkv-1.pth")
    shutil.copy(flags["peft_load"].with_suffix(".json"), tmp_path / "rwkv-1.json")
    if harm == "gone":
        (tmp_path / "rwkv-1.pth").unlink()
    else:
        state = {key: 2 * tensor for key, tensor in checkpoints.read_state(adapter).items()}
        checkpoints.write_state(adapter, state, checkpoints.read_metadata(flags["peft_load"]), overwrite=True)
    state = (folder / "resume.pth").read_bytes()
    (folder / project.REFERENCE).rename(tmp_path / "copy")
    expected = "does not exist" if harm == "gone" else "holds other values than when the run began"
    with pytest.raises(UserError, match=expected) as error:
        run(folder, **(flags | {"peft_load": adapter}))
    assert f"put reference.safetensors back into {folder} from a copy" in str(error.value)
    assert (folder / "resume.pth").read_bytes() == state
    # With the file the adapter is not needed.
    (tmp_path / "copy").rename(folder / project.REFERENCE)
    run(folder, **(flags | {"peft_load": adapter}))
    assert_same_to_the_bit(folder, whole["started"][0])


def test_a_longer_run_computes_what_it_has_not_read_as_of_its_beginning(run, whole, capsys):
    flags = {"epoch_steps": 1, "micro_bsz": 2, "lr_schedule": "constant"}
    short = run("longer", **(flags | {"epoch_count": 1}))
    assert table(short).isnan().any(1).sum() == 5  # two of seven units were read
    capsys.readouterr()
    run("longer", **(flags | {"epoch_count": 4}))
    said = capsys.readouterr().out
    assert "reference log-probabilities of 5 pairs in " in said and "computed anew" not in said
    reference = run("long", **(flags | {"epoch_count": 4}))
    assert numbers(short) == numbers(reference)
    assert table(short) == pytest.approx(table(reference), abs=1e-5)


def test_a_setting_that_was_auto_or_is_now_is_that_of_the_beginning(run, tmp_path, capsys):
    """And another one changes on purpose alone, with the reference as it was."""
    whole = run(tmp_path / "whole", beta=0.5)
    with dying_after(3), pytest.raises(Killed):
        run(tmp_path / "half", beta=0.5)
    with pytest.raises(UserError, match=r"--beta was 0.5 and is now 0.25.*--resume_with beta goes on"):
        run(tmp_path / "half", beta=0.25)
    shutil.copytree(tmp_path / "half", tmp_path / "other")
    run(tmp_path / "half")
    assert_same_to_the_bit(tmp_path / "half", whole)
    capsys.readouterr()
    run(tmp_path / "other", beta=0.25, resume_with="beta")
    said = capsys.readouterr().out
    assert "--beta 0.5 became 0.25, from step 3 on" in said and "as of the start" not in said
    with dying_after(3), pytest.raises(Killed):
        run(tmp_path / "automatic")
    run(tmp_path / "automatic", beta=0.1)


def test_other_data_on_purpose_is_compared_with_the_model_of_the_beginning(run, pairs, whole, half, tmp_path, capsys):
    folder, _ = half("new")
    other = tmp_path / "others.jsonl"
    other.write_text("".join(reversed(pairs.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    run(folder, data_file=other, resume_with="data_file")
    assert "of another model, or of other data: it is computed anew, as of the start" in capsys.readouterr().out
    assert table(folder).flip(0).numpy() == pytest.approx(table(whole["new"][0]).numpy(), abs=1e-4)


def test_a_reference_that_was_computed_in_vain_is_found_again(run, whole, tmp_path, capsys):
    """A run that was cut off before it saved anything begins anew; what it had computed is what it says it is."""
    folder = tmp_path / "vain"
    with dying_after(1), pytest.raises(Killed):
        run(folder)
    assert not (folder / "resume.pth").exists()
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / project.REFERENCE, other)
    capsys.readouterr()
    run(other, precision="bf16", epoch_count=1)
    assert "log-probabilities of 7 pairs in " in capsys.readouterr().out  # those are of a model in fp32
    run(folder)
    said = capsys.readouterr().out
    assert "this one begins anew" in said and f"as {folder / project.REFERENCE} has them" in said
    assert_same_to_the_bit(folder, whole["new"][0])
    run(folder, overwrite=1)
    assert "log-probabilities of 7 pairs in " in capsys.readouterr().out


def test_of_a_file_with_weights_each_unit_that_is_read_is_computed_once(run, pairs, whole, tmp_path):
    lines, files = pairs.read_text().splitlines(keepends=True), (tmp_path / "1.jsonl", tmp_path / "2.jsonl")
    for file, part in zip(files, (lines[:4], lines[4:]), strict=True):
        file.write_text("".join(part))
    names = f"[{files[0]}, {files[1]}]"
    weighted = table(run(tmp_path / "out", data_file=names, data_weights="[0.5, 2]", epoch_count=1))
    read = ~weighted.isnan().any(1)
    assert 5 <= read.sum() < len(PAIRS)  # two of the first four, and all others twice
    assert weighted[read].numpy() == pytest.approx(table(whole["new"][0])[read].numpy(), abs=1e-4)


def test_the_reference_is_computed_without_dropout(run, tmp_path):
    """While the steps have it: so the first one differs from the reference."""
    flags = {"peft": "lora", "lora_r": 4}
    started = {"peft_load": run(tmp_path / "earlier", **flags, random_seed=1) / "rwkv-1.pth"}
    without, dropped = (run(tmp_path / f"{p}", **flags, **started, lora_dropout=p) for p in (0.0, 0.5))
    assert torch.equal(table(without), table(dropped))
    assert log_of(without)[0]["loss"] != log_of(dropped)[0]["loss"]


def test_every_answers_log_probability_is_that_of_plain_pytorch(job, whole, tmp_path):
    answers = labels(tmp_path / "labels.jsonl")
    labelled = job.run("labelled", task="kto", data_file=answers)
    model = random_model(vocab_size=256)
    model.load_state_dict(checkpoints.read_state(job.flags["load_model"]))
    for folder, task, file in ((whole["new"][0], "dpo", job.folder / "pairs.jsonl"), (labelled, "kto", answers)):
        data = parse_train(job.argv({"task": task, "data_file": file, "proj_dir": folder})).data
        dataset = load_dataset(data, 256)
        for unit in range(len(dataset)):
            samples = dataset.sequences(unit) + ((dataset.mismatched(unit),) if task == "kto" else ())
            with torch.no_grad():
                expected = [answer_logp(model.float(), sample)[0].item() for sample in samples]
            assert table(folder)[unit].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_base_without_the_adapter_is_another_reference(whole):
    """Of the base the log-probabilities are those of a run from the base; an adapter has gained on it at once."""
    assert table(whole["base"][0]).tolist() == table(whole["new"][0]).tolist() != table(whole["started"][0]).tolist()
    assert log_of(whole["started"][0])[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert abs(log_of(whole["base"][0])[0]["reward_margin"]) > 1e-3


def test_overwriting_a_run_removes_its_reference_and_a_folder_with_one_has_remains(run, job):
    folder = run("again", epoch_count=1)
    before = (folder / project.REFERENCE).stat().st_mtime_ns
    run("again", epoch_count=1, overwrite=1, task="orpo")
    assert before and not (folder / project.REFERENCE).exists()
    other = job.folder / "cut off"
    other.mkdir()
    (other / f".{project.REFERENCE}.1.partial").touch()
    assert project.has_remains(other)
    project.tidy(other)
    assert not project.has_remains(other)


def test_an_answer_without_a_finite_probability_is_named_before_the_first_step(run, job, tmp_path):
    state = dict(checkpoints.read_state(job.flags["load_model"]))
    state["emb.weight"] = state["emb.weight"].clone()
    state["emb.weight"][ord("4")] = 3e38  # the norm after it squares this
    checkpoints.write_state(tmp_path / "base.pth", state)
    with pytest.raises(UserError, match=r"no finite probability \(.*pairs.jsonl:") as error:
        run("infinite", load_model=tmp_path / "base.pth")
    assert "precision fp32" in str(error.value)


def test_what_a_file_keeps_under_several_names_is_read_one_by_one(tmp_path):
    kept = Kept(tmp_path / project.REFERENCE)
    assert kept.read("a", "x") is None and "is missing" in kept.problem
    kept.keep("a", torch.tensor([[1.5, float("nan")]], dtype=torch.float64), "x")
    kept.keep("b", torch.ones(2, 3), "y")
    kept.keep("a", torch.tensor([[2.5]], dtype=torch.float64), "z")
    assert kept.read("a", "z").tolist() == [[2.5]] and kept.read("b", "y").shape == (2, 3) and not kept.problem
    assert kept.read("a", "x") is None and "of another model, or of other data" in kept.problem
    assert kept.read("c", "x") is None and "has none of them" in kept.problem
    kept.path.write_bytes(kept.path.read_bytes()[:-7])
    assert kept.read("b", "y") is None and str(kept.path) in kept.problem
    kept.keep("b", torch.zeros(1), "y")
    assert kept.read("b", "y").tolist() == [0] and kept.read("a", "z") is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2", "3", "3_offload"])
def test_two_processes_compute_a_lost_reference_with_the_values_of_the_beginning(job, pairs, tmp_path, stage):
    flags = FLAGS | {"data_file": pairs, "strategy": f"deepspeed_stage_{stage}", "micro_bsz": 2, "train_parts": "[ln]"}
    folders = [job.ranks(tmp_path / name, 2, **(flags | {"epoch_steps": 2})) for name in ("whole", "half")]
    assert all(done.returncode == 0 for _, done in folders), folders[0][1].stdout + folders[0][1].stderr
    half = folders[1][0]
    before = table(half)
    for more in (3, 4):
        done = job.ranks(folders[0][0], 2, **(flags | {"epoch_steps": 2, "epoch_count": more}))[1]
        assert done.returncode == 0, done.stdout + done.stderr
        (half / project.REFERENCE).unlink()
        done = job.ranks(half, 2, **(flags | {"epoch_steps": 2, "epoch_count": more}))[1]
        assert done.returncode == 0 and "computed anew" in done.stdout, done.stdout + done.stderr
    assert numbers(half) == numbers(folders[0][0]) and torch.equal(table(half), before)
