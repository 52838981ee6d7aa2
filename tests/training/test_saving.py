"""What a run saves, when and in which order, and what is left wherever that is cut off."""

import contextlib
import errno
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config import RunConfig
from rwkv_bone.errors import UserError
from rwkv_bone.training import disk, resume_file, saving
from rwkv_bone.training.log import StepLog, read_log
from rwkv_bone.training.saving import SaveTrained
from tests.training.conftest import adapter_of, largest_difference, log_of
from tests.training.runs import Killed, dying_after

STATE, PREVIOUS = "resume.pth", "resume.previous.pth"
ABOUT = {"trained": "", "step": 4, "config": {}, "architecture": {}, "base": None, "data": "d"}


# --- order ---


@contextlib.contextmanager
def recorded(before=lambda call: None):
    """The calls of os.fsync, os.replace and os.unlink in this context, as (name, path ...): the list grows as they are
    made, and `before(call)` is called before each."""
    made = []

    def recording(name, function):
        def call(*arguments, **options):
            paths = [os.readlink(f"/proc/self/fd/{a}") if name == "fsync" else str(a) for a in arguments[:2]]
            before((name, *paths))
            made.append((name, *paths))
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "link", "unlink"):
            patch.setattr(os, name, recording(name, getattr(os, name)))
        yield made


@pytest.fixture(scope="module")
def whole(job):
    """(its folder, its calls, copies of the folder before each of them) of a run that saves each of its 3 steps and
    keeps one adapter."""
    copies = []

    def copy(call):
        if str(folder) in call[1]:
            copies.append(job.folder / f"copy {len(copies)}")
            shutil.copytree(folder, copies[-1])

    folder = job.folder / "whole"
    with recorded(copy) as made:
        job.run("whole", save_steps=1, keep=1)
    return folder, made, copies


def test_adapter_log_and_folder_are_on_the_disk_before_the_state_that_tells_of_them(whole):
    folder, made, _ = whole

    def shown(path):
        name = "the folder" if Path(path) == folder else Path(path).name
        return f"new {name[1:].split('.')[0]}" if ".partial" in name else name

    shown_calls = [(name, *map(shown, paths)) for name, *paths in made if name != "unlink"]
    page = ("new report", "report.html", "new preview", "preview.json")  # is made from what is there
    shown_calls = [call for call in shown_calls if call[1] not in page]
    begin = shown_calls.index(("fsync", "new rwkv-0-s2"))
    assert shown_calls[begin : begin + 12] == [
        ("fsync", "new rwkv-0-s2"),
        ("link", "new rwkv-0-s2", "rwkv-0-s2.pth"),
        ("fsync", "the folder"),
        ("fsync", "new rwkv-0-s2"),
        ("replace", "new rwkv-0-s2", "rwkv-0-s2.json"),
        ("fsync", "the folder"),
        ("fsync", "train_log.jsonl"),
        ("fsync", "the folder"),
        ("fsync", "new resume"),
        ("replace", "resume.pth", "resume.previous.pth"),
        ("replace", "new resume", "resume.pth"),
        ("fsync", "the folder"),
    ]


def test_wherever_a_save_is_cut_off_the_newest_state_is_usable_and_what_it_tells_of_is_there(job, whole):
    reference, _, copies = whole
    assert len(copies) > 25
    steps, at = [], {}
    for folder in copies:
        found = resume_file.read_newest(folder)
        steps.append(found.metadata["step"] if found else 0)
        if not found:
            continue
        at.setdefault((found.path.name, steps[-1]), folder)
        assert len(read_log(folder / "train_log.jsonl", steps[-1])[0]) == steps[-1]
        adapter, state = adapter_of(folder, found.metadata["trained"]), checkpoints.read_state(found.path)
        assert all(torch.equal(tensor, state[key]) for key, tensor in adapter.items())
    assert steps == sorted(steps) and set(steps) == {0, 1, 2, 3}
    # Between the two renames of a save the state before has its second name only.
    assert {(PREVIOUS, 1), (PREVIOUS, 2), (STATE, 1), (STATE, 2)} <= at.keys()
    shutil.copytree(at[PREVIOUS, 2], job.folder / "cut")
    again = job.run("cut", save_steps=1, keep=1)
    assert {path.name for path in again.glob("rwkv-*")} == {"rwkv-0.pth", "rwkv-0.json"}
    assert all((again / name).read_bytes() == (reference / name).read_bytes() for name in ("rwkv-0.pth", STATE))
    assert [line["loss"] for line in log_of(again)] == [line["loss"] for line in log_of(reference)]


def test_a_damaged_state_never_takes_the_place_of_the_one_before_it(job, capsys):
    with dying_after(3), pytest.raises(Killed):
        job.run("spoilt", save_steps=1)
    folder = job.folder / "spoilt"
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-100])

    def check(call):
        if str(folder) in call[1]:
            found = resume_file.read_newest(folder)
            assert found and found.metadata["step"] >= 1

    with recorded(check):
        job.run("spoilt", save_steps=1)
    said = capsys.readouterr().out
    assert f"{PREVIOUS} is used" in said and f"{folder / STATE} is" in said
    assert resume_file.read_newest(folder).metadata["step"] == 3


# --- reading ---


def write_state(path: Path, step: int = 4, **changes) -> dict:
    generator = torch.Generator().manual_seed(step)
    state = {name: torch.randn(5, 3, generator=generator) for name in ("a.bone", "a.bone.exp_avg", "b", "b.exp_avg")}
    state |= {f"{name}.exp_avg_sq": state[name].square() for name in ("a.bone", "b")}
    checkpoints.save_tensors(path, state, ABOUT | {"step": step} | changes)
    return state


def test_the_newest_state_is_found_and_a_folder_without_one_has_none(tmp_path):
    assert resume_file.read_newest(tmp_path) is None
    write_state(tmp_path / STATE, 4)
    write_state(tmp_path / PREVIOUS, 3)
    assert resume_file.read_newest(tmp_path) == resume_file.Found(tmp_path / STATE, ABOUT)
    (tmp_path / STATE).unlink()
    found = resume_file.read_newest(tmp_path)
    assert (found.path, found.metadata["step"]) == (tmp_path / PREVIOUS, 3)
    assert found.notes == (f"{PREVIOUS} is used, the state before: {tmp_path / STATE} is missing",)


def unmapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that is to be written over."""
    return {key: tensor.clone() for key, tensor in checkpoints.read_state(path).items()}


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zeros":
        path.write_bytes(content[:300] + bytes(len(content) - 300))
    elif how == "not a number":
        state = unmapped(path)
        checkpoints.save_tensors(path, state | {"b": torch.full((5, 3), float("nan"))}, ABOUT)
    elif how == "moment":
        state = unmapped(path)
        checkpoints.save_tensors(path, state | {"b.exp_avg": torch.full((5, 3), float("inf"))}, ABOUT)
    elif how == "no metadata":
        checkpoints.save_tensors(path, unmapped(path))
    elif how == "no data":
        write_state(path, data=3)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("not a state")


SPOILT = ["empty", "cut short", "zeros", "not a number", "moment", "no metadata", "no data", "folder", "text"]


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_state_is_passed_over_saying_why_and_two_are_an_error_that_names_the_way_on(tmp_path, how):
    for name, step in ((STATE, 4), (PREVIOUS, 3)):
        write_state(tmp_path / name, step)
    spoil(tmp_path / STATE, how)
    found = resume_file.read_newest(tmp_path)
    assert (found.path, found.metadata["step"]) == (tmp_path / PREVIOUS, 3)
    (note,) = found.notes
    assert note.startswith(f"{PREVIOUS} is used, the state before: ") and str(tmp_path / STATE) in note
    spoil(tmp_path / PREVIOUS, how)
    with pytest.raises(UserError) as error:
        resume_file.read_newest(tmp_path)
    assert all(str(tmp_path / name) in str(error.value) for name in (STATE, PREVIOUS))
    assert "--peft_load" in str(error.value) and "--overwrite 1" in str(error.value)


def test_no_flipped_bit_of_a_state_changes_what_is_read(tmp_path):
    """Of every third byte outside the tensors one bit, and 100 within them."""
    path = tmp_path / STATE
    state, content = write_state(path), path.read_bytes()
    inside = {
        place
        for record in checkpoints.integrity.zip_records(path).values()
        for place in range(record.start, record.start + record.size)
        if "/data/" in record.name
    }
    chosen = random.Random(0)
    places = [place for place in range(0, len(content), 3) if place not in inside]
    places += chosen.sample(sorted(inside), 100)
    accepted = []
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chosen.randrange(8)
        path.unlink()
        path.write_bytes(flipped)
        try:
            about = resume_file.verify(path)
        except UserError:
            continue
        accepted.append(place)
        found = checkpoints.read_state(path)
        assert about == ABOUT and found.keys() == state.keys(), place
        assert all(torch.equal(found[key], state[key]) for key in state), place
    assert not set(accepted) & inside and len(accepted) < len(places) / 2


# --- what is never saved ---


def test_a_value_that_is_no_finite_number_is_never_saved_and_the_state_before_stays(job, monkeypatch):
    original = StepLog.on_train_batch_end
    what = "parameter"

    def spoil(self, trainer, module, *rest):
        original(self, trainer, module, *rest)
        if module.window.step == 2:
            name, parameter = next((n, p) for n, p in module.model.named_parameters() if p.requires_grad)
            if what == "parameter":
                parameter.data.view(-1)[3] = float("inf")
            else:
                next(iter(trainer.model.optimizer.optimizer.state.values()))["exp_avg"].view(-1)[3] = float("nan")

    monkeypatch.setattr(StepLog, "on_train_batch_end", spoil)
    for what in ("parameter", "moment"):  # noqa: B007
        with pytest.raises(UserError, match="after step 2: blocks.0.* holds NaN or infinity.*lower --lr_init") as error:
            job.run(what, save_steps=1)
        assert "the last step saved is " in str(error.value)
        folder = job.folder / what
        found = resume_file.read_newest(folder)
        assert (found.path.name, found.metadata["step"], found.notes) == (STATE, 1, ())
        assert {path.name for path in folder.glob("rwkv-*.pth")} == {
            "rwkv-0-s1.pth", *(["rwkv-0-s2.pth"] if what == "moment" else [])
        }  # fmt: skip
        assert not list(folder.glob(".*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls_of_a_save"), [("fsync", 8), ("replace", 3), ("link", 1)])
def test_a_disk_that_fails_once_in_a_save_stops_the_run_and_loses_no_state(job, monkeypatch, name, calls_of_a_save):
    """Whichever call of the last save it is; but for the sync of the log, which the run does without."""
    real, write_adapter = getattr(os, name), SaveTrained._write_adapter
    left: list[int] = []  # calls until the one that fails

    def fail(*arguments):
        path = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
        if left and path.startswith(str(job.folder)):
            left.append(left.pop() - 1)
            if left == [-1]:
                left.clear()
                raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    def begin(self, trainer, parameters, metadata, path):
        if metadata["step"] == 3:
            left.append(failing)
        write_adapter(self, trainer, parameters, metadata, path)

    monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr(SaveTrained, "_write_adapter", begin)
    refused = []
    for failing in range(calls_of_a_save):
        left.clear()
        folder = job.folder / f"{name} {failing}"
        try:
            job.run(folder.name, save_steps=1)
        except UserError as error:
            assert str(error).startswith("after step 3: ") and "Input/output error" in str(error)
            refused.append(failing)
        found = resume_file.read_newest(folder)
        # The last sync comes after the last name is given, the last replacement before.
        newest = failing == calls_of_a_save - 1 if name == "fsync" else False
        assert found.metadata["step"] == (3 if newest or failing not in refused else 2)
    assert set(range(calls_of_a_save)) - set(refused) == ({4} if name == "fsync" else set())


# --- when ---


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def saver(folder, clock, **settings) -> SaveTrained:
    output = saving.Output((), {})
    log = SimpleNamespace(sync=lambda: None)
    return SaveTrained(
        output, folder, RunConfig(**settings), earlier=None, log=log, go_on="", report=print, clock=clock
    )


def steps_saved(saver, clock, monkeypatch, steps: int, seconds: float, costs: float, main: bool = True) -> list[int]:
    """The steps after which the state is saved, if a step takes so long and a save `costs` seconds."""
    saved = []

    def write(folder, zero, parameters, metadata, **_):
        saved.append(metadata["step"])
        clock.now += costs

    monkeypatch.setattr(resume_file, "write", write)
    plan = SimpleNamespace(ends_epoch=lambda step: False)
    module = SimpleNamespace(
        asks={}, plan=plan, total_steps=10**9, bad_steps=[], window_finished=lambda: True, model=torch.nn.Module()
    )
    trainer = SimpleNamespace(
        is_global_zero=main,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        model=SimpleNamespace(optimizer=None),
    )
    saver.on_train_start(trainer, module)
    for step in range(1, steps + 1):
        clock.now += seconds
        saver.on_before_optimizer_step(trainer, module, None)
        module.asked, module.window = module.asks, SimpleNamespace(step=step, epoch=0)
        saver.on_train_batch_end(trainer, module, None, None, step)
    return saved


def test_the_state_is_saved_as_often_as_asked_and_for_at_most_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    def play(costs, **settings):
        clock = Clock()
        return steps_saved(saver(tmp_path, clock, **settings), clock, monkeypatch, 100, 60.0, costs)

    assert play(1.0) == [*range(10, 101, 10)]  # 10 minutes by default
    assert play(1.0, save_minutes=3) == [*range(3, 100, 3)]
    assert play(1.0, save_minutes=0) == play(1.0, save_state=False) == []
    # A save of 30 seconds is paid for by 25 minutes.
    found = play(30.0, save_minutes=3)
    assert found == [3, 28, 53, 78]
    assert play(30.0, save_minutes=30) == [30, 60, 90]


def test_the_main_process_decides_when_a_save_is_due(tmp_path, monkeypatch):
    clock = Clock()
    assert steps_saved(saver(tmp_path, clock), clock, monkeypatch, 30, 60.0, 1.0, main=False) == []


@pytest.fixture
def always_due(monkeypatch):
    """Every step is due to be saved, whatever a save costs."""
    monkeypatch.setattr(saving, "MOST_OF_THE_TIME", float("inf"))
    return {"save_minutes": 1e-9}


def test_states_alone_name_no_adapter_and_a_killed_run_goes_on_from_them(job, always_due, capsys):
    reference = job.run("alone whole")
    capsys.readouterr()
    with dying_after(3), pytest.raises(Killed):
        job.run("alone", **always_due)
    folder = job.folder / "alone"
    for name, step in ((STATE, 2), (PREVIOUS, 1)):
        metadata = checkpoints.read_metadata(folder / name)
        assert (metadata["step"], metadata["trained"]) == (step, "")
    assert not list(folder.glob("rwkv-*"))
    job.run("alone", **always_due)
    assert (folder / "rwkv-0.pth").is_file() and checkpoints.read_metadata(folder / STATE)["trained"] == "rwkv-0.pth"
    assert largest_difference(*(adapter_of(path) for path in (folder, reference))) == 0
    assert "after step 2" in capsys.readouterr().out


def test_a_step_is_written_once_whatever_asks_for_it(tmp_path, monkeypatch):
    written = []
    save = saver(tmp_path, Clock())
    monkeypatch.setattr(SaveTrained, "_write_adapter", lambda self, *rest: written.append(rest[-1].name))

    def write(folder, zero, parameters, metadata, **_):
        written.append(metadata["step"])

    monkeypatch.setattr(resume_file, "write", write)
    trainer = SimpleNamespace(
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        model=SimpleNamespace(optimizer=None),
    )
    window = SimpleNamespace(step=7, epoch=0)
    module = SimpleNamespace(window=window, bad_steps=[], model=torch.nn.Module())
    save._save(trainer, module, None)
    save._save(trainer, module, None)
    assert written == [7]
    # A signal asks for the adapter too; the state of this step is there.
    save.save_step(trainer, module)
    assert written == [7, "rwkv-0-s7.pth"]


# --- --keep, --save_state, room ---


def test_keep_leaves_the_newest_adapters_of_this_run_and_nothing_else_is_touched(job):
    def there():
        return {path.name for path in folder.glob("rwkv-*")}

    folder = job.run("keep", save_steps=1, keep=2)
    assert there() == {f"rwkv-0{name}" for name in ("-s2.pth", "-s2.json", ".pth", ".json")}
    (folder / "rwkv-7.pth").write_text("mine")
    job.run("keep", save_steps=1, epoch_count=2, keep=1)
    assert there() == {"rwkv-1.pth", "rwkv-1.json", "rwkv-7.pth"}


def test_keep_removes_what_a_kill_has_left_of_it(job, tmp_path):
    with dying_after(4), pytest.raises(Killed):
        job.run("kept", save_steps=1, keep=1, epoch_count=2)
    folder = job.folder / "kept"
    assert checkpoints.read_metadata(folder / STATE)["adapters"] == ["rwkv-0-s2.pth", "rwkv-0.pth"]
    checkpoints.write_state(folder / "rwkv-0-s2.pth", {"a": torch.ones(1)}, {})  # as if it had died before
    with dying_after(5), pytest.raises(Killed):
        job.run("kept", save_steps=1, keep=1, epoch_count=2)
    assert checkpoints.read_metadata(folder / STATE)["adapters"] == ["rwkv-0.pth", "rwkv-1-s4.pth"]
    job.run("kept", save_steps=1, keep=1, epoch_count=2)
    assert {path.name for path in folder.glob("rwkv-*")} == {"rwkv-1.pth", "rwkv-1.json"}


def test_a_state_has_nothing_removed_but_adapters_of_its_folder(tmp_path):
    kept = [
        "rwkv-1.pth",
        "../rwkv-2.pth",
        "notes.txt",
        "rwkv-init.pth",
        "/etc/rwkv-3.pth",
        "rwkv-5/../../x.pth",
        "rwkv-4.pth",
    ]
    earlier = SimpleNamespace(
        metadata=ABOUT | {"adapters": kept, "trained": "rwkv-4.pth"}, step=4, path=tmp_path / STATE
    )
    arguments = {"earlier": earlier, "log": None, "go_on": "", "report": print}
    save = SaveTrained(saving.Output((), {}), tmp_path, RunConfig(keep=1), **arguments)
    assert save._adapters == ["rwkv-1.pth", "rwkv-4.pth"]


def test_without_a_state_the_run_says_so_and_writes_none(job, capsys):
    folder = job.run("stateless", save_state=0, save_steps=1)
    said = capsys.readouterr().out
    assert "saving    no resume.pth (--save_state 0): a run that ends early cannot be continued" in said
    assert not list(folder.glob("resume*")) and len(list(folder.glob("rwkv-*.pth"))) == 3


def test_what_a_run_writes_is_said_beforehand_and_is_what_it_writes(job, capsys, monkeypatch):
    folder = job.run("said", save_steps=1, keep=2)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("saving"))
    about = disk.size((folder / STATE).stat().st_size)
    assert first.startswith("saving    resume.pth every 10 minutes, or more rarely where that takes more than 2 % of")
    # The headers of a file of 18 KB are a part of it.
    number = float(first.split("2 x ")[1].split()[0])
    assert 0.7 < number / float(about.split()[0]) <= 1 and first.split()[-1] == about.split()[1]
    assert second.startswith("saving    3 adapters of 18 KB, of which the newest 2 stay (--keep); ")
    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
        job.run("no room", save_minutes=0)
    lines = capsys.readouterr().out.splitlines()
    warning = f"warning: the disk of {job.folder / 'no room'} has 10 KB free, and what this run writes takes "
    assert [line for line in lines if line.startswith(warning)]
    assert "saving    resume.pth with each adapter alone (--save_minutes 0): 2 x 54 KB" in lines


@pytest.mark.parametrize("first", [0, 1, 4, 10])
@pytest.mark.parametrize("settings", [{}, {"save_steps": 1}, {"save_steps": 2, "epoch_save": 3}, {"save_steps": 3}])
def test_the_number_of_saves_is_that_of_a_run_step_by_step(settings, first):
    run = RunConfig(epoch_count=5, **settings)
    sizes = [3, 1, 2, 4, 3]
    plan = SimpleNamespace(steps_in=lambda epoch: sizes[epoch])
    count, step = 0, 0
    for epoch, steps in enumerate(sizes):
        for place in range(steps):
            step += 1
            ends = place + 1 == steps and ((epoch + 1) % run.epoch_save == 0 or epoch == 4)
            count += step > first and (ends or bool(run.save_steps and step % run.save_steps == 0))
    assert disk.saves_of(run, plan, first) == count


# --- the log ---


def test_lines_that_no_run_can_have_written_are_no_lines(tmp_path):
    right = {"epoch": 0, "loss": 1.5, "lr": 1e-3, "tokens": 9, "trained_tokens": 5, "grad_norm": 0.5, "seconds": 0.1}
    right |= {"tokens_per_s": 90.0, "data_wait_ms": 0.1, "peak_memory_mb": 9.5, "peak_reserved_mb": None, "step": 1}
    skipped = right | {"step": 2, "loss": None, "grad_norm": None}
    wrong = [{"step": 10**9}, {"step": 0}, {"step": -3}, {"step": 3.0}, {"step": "3"}, {"step": True}]
    for change in ({"loss": float("nan")}, {"lr": float("inf")}, {"tokens": -1}, {"seconds": 0}, {"tokens": 1.5}):
        wrong.append({"step": 3} | change)
    for name in right:
        if name not in ("step", "peak_reserved_mb"):
            wrong += [{"step": 3, name: "much"}, {"step": 3, name: [1]}]
    # Each is of another step, so that none is left out as one that is there twice.
    wrong = [change | {"step": 10 + i} if len(change) > 1 else change for i, change in enumerate(wrong)]
    lines = [right, skipped, *(right | change for change in wrong), right | {"step": 5}, right | {"step": 5, "loss": 9}]
    lines.append({name: value for name, value in right.items() if name != "lr"} | {"step": 4})
    path = tmp_path / "log"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, note = read_log(path, 100)
    assert records == [right, skipped] and note.startswith(f"{path} lacks 98 steps of 100")
