"""Data is tokenised once: what is cached is what would be made anew, for every process, until something changes."""

import ast
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import struct
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data import cache, load_dataset, part, tokenise
from rwkv_bone.data.cache import Cache
from rwkv_bone.errors import UserError

ROWS = [{"prompt": f"p{i}", "response": "r" * (i % 7 + 1)} for i in range(40)]


def samples(dataset) -> list:
    return [(s.ids.tolist(), s.trained.tolist(), s.origin) for s in dataset]


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if (path / cache.META).is_file())


@pytest.fixture
def made(monkeypatch):
    """The number of times that rows were tokenised."""
    count, original = [], tokenise.RowSettings.encoder

    def encoder(self):
        count.append(1)
        return original(self)

    monkeypatch.setattr(tokenise.RowSettings, "encoder", encoder)
    return count


def test_the_second_time_nothing_is_tokenised(write_jsonl, config, tmp_path, made):
    cfg = config(write_jsonl(*ROWS, {"prompt": "a", "response": ""}), bad_rows="skip")
    first, second = load_dataset(cfg, 256), load_dataset(cfg, 256)
    assert len(made) == 1 and samples(first) == samples(second) and len(first) == 40
    assert np.array_equal(first.groups, second.groups)
    assert all(isinstance(second._parts[0].tokens, kind) for kind in (np.memmap,))
    assert second.summary_lines()[:-1] == first.summary_lines()[:-1]
    assert "tokenised 0.0 MB" in first.summary_lines()[-1] and second.summary_lines()[-1].endswith(
        f"from the cache {tmp_path / 'cache'}"
    )


def test_the_cache_lies_beside_the_data_and_small_data_needs_none(write_jsonl, config, tmp_path, monkeypatch):
    path = write_jsonl(*ROWS)
    load_dataset(config(path, cache_dir=""), 256)
    assert not (tmp_path / cache.FOLDER).exists()
    monkeypatch.setattr(part, "SMALL", 0)
    dataset = load_dataset(config(path, cache_dir=""), 256)
    assert len(entries(tmp_path / cache.FOLDER)) == 1 and cache.FOLDER in dataset.summary_lines()[-1]


CHANGES = [
    {"loss_mask": "none"},
    {"loss_mask": "se", "mask_id": '{"mask0": "a", "mask1": "p"}'},
    {"loss_mask": "se", "mask_id": '{"mask0": "b", "mask1": "p"}'},
    {"template": "world"},
    {"bad_rows": "skip"},
    {"sft_split": "[:30]"},
    {"sft_field": ("response", "prompt")},
    {"tokenizer": "world"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_tokens_makes_a_new_entry(write_jsonl, config, change, made):
    path = write_jsonl(*ROWS)
    load_dataset(config(path), 65536)
    load_dataset(config(path, **change), 65536)
    load_dataset(config(path, **change), 65536)
    assert len(made) == 2


def test_lengths_and_batches_are_no_part_of_an_entry(write_jsonl, config, made):
    path = write_jsonl(*ROWS)
    for change in ({}, {"ctx_len": 4}, {"long_samples": "split"}, {"dataload": "pad"}, {"micro_bsz": 2}):
        load_dataset(config(path, max_lost=1, **change), 256)
    assert len(made) == 1


@pytest.mark.parametrize("hashed", [0, cache.HASHED], ids=["remembered", "read each time"])
def test_a_changed_byte_anywhere_makes_a_new_entry(write_jsonl, config, monkeypatch, made, hashed):
    monkeypatch.setattr(cache, "HASHED", hashed)
    path = write_jsonl(*ROWS)
    load_dataset(config(path), 256)
    load_dataset(config(path), 256)
    assert len(made) == 1
    dates, content = os.stat(path), bytearray(Path(path).read_bytes())
    content[content.index(b"p17")] = ord("q")
    Path(path).write_bytes(content)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))  # as `cp -p` or a careless editor would
    changed = load_dataset(config(path), 256)
    assert len(made) == 2 and bytes(changed[17].ids[:3].tolist()) == b"q17"


def test_a_changed_template_file_makes_a_new_entry(write_jsonl, config, tmp_path, made):
    path, template = write_jsonl(*ROWS), tmp_path / "template.txt"
    for mark in "AB":
        template.write_text(f"Q {{prompt}} {mark} {{response}}")
        first = load_dataset(config(path, template=str(template)), 256)[0]
        assert bytes(first.ids.tolist()) == f"Q p0 {mark} r\0".encode()
    assert len(made) == 2


def test_the_data_may_be_moved(write_jsonl, config, tmp_path, made):
    first = load_dataset(config(write_jsonl(*ROWS)), 256)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "data.jsonl", tmp_path / "elsewhere" / "other.jsonl")
    second = load_dataset(config(str(moved)), 256)
    assert len(made) == 1 and second[3].origin == f"{moved}:4"
    assert [s.ids.tolist() for s in first] == [s.ids.tolist() for s in second]


def break_meta(entry: Path) -> None:
    (entry / cache.META).write_text('{"arrays": 3}')


def lose_meta(entry: Path) -> None:
    (entry / cache.META).unlink()


def flip_a_bit(entry: Path) -> None:
    content = bytearray((entry / "tokens").read_bytes())
    content[5] ^= 1
    (entry / "tokens").write_bytes(content)


def truncate(entry: Path) -> None:
    (entry / "trained").write_bytes((entry / "trained").read_bytes()[:-1])


def lose_an_array(entry: Path) -> None:
    (entry / "lengths").unlink()


def become_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("not a folder")


@pytest.mark.parametrize("damage", [break_meta, lose_meta, flip_a_bit, truncate, lose_an_array, become_a_file])
def test_a_damaged_entry_is_made_again_and_said(write_jsonl, config, tmp_path, made, damage):
    cfg = config(write_jsonl(*ROWS))
    first = samples(load_dataset(cfg, 256))
    damage(entries(tmp_path / "cache")[0])
    again = load_dataset(cfg, 256)
    assert samples(again) == first and len(made) == 2
    assert sum(line.endswith("made again") for line in again.summary_lines()) == 1
    third = load_dataset(cfg, 256)
    assert samples(third) == first and len(made) == 2
    assert not any(line.endswith("made again") for line in third.summary_lines())


def test_a_failure_leaves_no_entry(write_jsonl, config, tmp_path):
    with pytest.raises(UserError, match="data.jsonl:41: not valid JSON"):
        load_dataset(config(write_jsonl(*ROWS, "{")), 256)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_a_full_disk_is_reported(write_jsonl, config, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cache folder .*No space left on device.*--cache_dir"):
        load_dataset(config(write_jsonl(*ROWS)), 256)
    assert entries(tmp_path / "cache") == []


def test_data_in_a_folder_that_cannot_be_written_is_cached_for_the_user(write_jsonl, config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(part, "SMALL", 0)
    (tmp_path / cache.FOLDER).write_text("in the way")
    dataset = load_dataset(config(write_jsonl(*ROWS), cache_dir=""), 256)
    folder = tmp_path / "home" / "rwkv_bone" / "data"
    assert len(entries(folder)) == 1
    assert f"cache in {folder}, since {tmp_path} cannot be written" in dataset.summary_lines()
    with pytest.raises(UserError, match="--cache_dir .*cannot be written"):
        load_dataset(config(write_jsonl(*ROWS), cache_dir=str(tmp_path / cache.FOLDER)), 256)


def build(folder: str, start, results) -> None:
    start.wait()

    def make(arrays):
        arrays.append(numbers=np.arange(1000))
        results.put("made")
        return {"made": True}

    store = Cache(Path(folder), folder)
    arrays, record = store.entry({"key": 1}, make)
    results.put((int(arrays["numbers"].sum()), record))


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without"])
def test_processes_that_start_at_once_share_one_entry(tmp_path, monkeypatch, locks):
    if not locks:

        def refuse(*arguments):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(cache.fcntl, "flock", refuse)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=build, args=(str(tmp_path / "cache"), start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    found = [results.get(timeout=10) for _ in range(4 + (1 if locks else 0))]
    assert all(worker.exitcode == 0 for worker in workers)
    if locks:
        assert sorted(map(str, found)) == sorted(map(str, ["made", *[(499500, {"made": True})] * 4]))
    assert len(entries(tmp_path / "cache")) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing temporary is left


def test_several_processes_make_the_same_entry_as_one(write_jsonl, config, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "BLOCK", 100)
    path = write_jsonl(*ROWS)
    alone = samples(load_dataset(config(path), 256))
    monkeypatch.setattr(tokenise, "PARALLEL", 8)
    monkeypatch.setattr(tokenise, "usable_processes", lambda total: 2)
    together = load_dataset(config(path, cache_dir=str(tmp_path / "other")), 256)
    assert samples(together) == alone
    assert "tokenised" in together.summary_lines()[-1]
    with pytest.raises(UserError, match="data.jsonl:41: not valid JSON"):
        load_dataset(config(write_jsonl(*ROWS, "{", "[")), 256)


CHAT = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]


@pytest.mark.parametrize("processes", [1, 2])
def test_remarks_are_added_up_over_blocks_and_processes_and_kept(write_jsonl, config, monkeypatch, processes):
    """What a second process has to say, and the second run, is said as well."""
    monkeypatch.setattr(tokenise, "BLOCK", 300)
    if processes > 1:
        monkeypatch.setattr(tokenise, "PARALLEL", 8)
        monkeypatch.setattr(tokenise, "usable_processes", lambda total: processes)
    rows = [{"messages": CHAT if i % 2 else CHAT[:2], "source": "x"} for i in range(40)]
    path = write_jsonl(*rows)
    for source in ("tokenised", "from the cache"):
        lines = load_dataset(config(path, template="world"), 256).note_lines()
        assert source in lines[-1]
        assert [line for line in lines if "after the last response" in line] == [
            f"{path}: 20 turns after the last response, left out"
        ]
        assert f"{path}: fields not used: source (40 rows)" in lines


def test_remarks_name_their_file_and_come_from_the_template_too(write_jsonl, config):
    turns = [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]
    files = [write_jsonl({"messages": turns}, {"messages": turns}, name=f"{name}.jsonl") for name in "ab"]
    lines = load_dataset(config(tuple(files), template="world"), 256).note_lines()
    for path in files:
        (line,) = [line for line in lines if line.startswith(f"{path}: ") and "blank lines" in line]
        assert line.startswith(f"{path}: 2 turns whose blank lines became")


def test_a_change_of_any_module_makes_other_entries(tmp_path):
    """Whichever module of this folder decides ids next year: none is forgotten, since all are in the key."""
    source = Path(cache.__file__).parent
    copy = shutil.copytree(source, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    modules = sorted(copy.rglob("*.py"))
    before = cache.code_hash(copy)
    assert before == cache.code_hash() == cache.code_hash(source) and len(modules) > 20
    found = {before}
    for path in modules:
        text = path.read_text()
        path.write_text(text + "# planted\n")
        found.add(cache.code_hash.__wrapped__(copy))
        path.write_text(text)
    assert len(found) == len(modules) + 1
    (copy / "new.py").write_text("")
    assert cache.code_hash.__wrapped__(copy) not in found


def test_an_entry_is_not_read_by_other_code_or_libraries(write_jsonl, config, monkeypatch, made):
    path = write_jsonl(*ROWS)
    for change in ({}, {"code_hash": lambda: "other"}, {"library_versions": lambda: {"jinja2": "0"}}):
        for name, value in change.items():
            monkeypatch.setattr(part, name, value)
        load_dataset(config(path), 256)
    assert len(made) == 3


def test_every_package_that_data_imports_is_in_the_key():
    """Of those that shape rows, texts or ids; numpy holds what they made, torch what comes after."""
    imported = set()
    for path in Path(cache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.split(".")[0] for name in names}
    outside = imported - sys.stdlib_module_names - {"rwkv_bone", "numpy", "torch"}
    assert {name.replace("_", "-") for name in outside} <= set(cache.LIBRARIES)
    assert cache.library_versions().keys() >= {"python", "jinja2", "tokenizers", "pyrwkv-tokenizer"}


# Settings of the data that change no entry, and why; whatever else there is must change it.
NO_PART_OF_AN_ENTRY = {
    *(
        "data_file",
        "eval_data",
        "eval_field",
        "eval_general",
        "eval_split",
    ),  # another file, or which rows of it are held out
    *("data_weights", "dataload", "long_samples", "max_lost", "ctx_len", "micro_bsz"),  # made of the entry
    "cache_dir",
    "data_type",  # the source and layout that it leads to are
}


def test_every_setting_of_the_data_is_in_the_key_or_known_not_to_be():
    # Of these three the tests are below, and in test_encode.py.
    tried = {name for change in CHANGES for name in change} | {"tool_format", "columns", "task"}
    assert tried | NO_PART_OF_AN_ENTRY == {spec.name for spec in fields(DataConfig)}


def test_the_form_of_tools_and_the_names_of_columns_are_in_the_key(tmp_path, write_jsonl, config, made):
    tools = write_jsonl({"messages": CHAT[:2], "tools": [{"name": "add"}]})
    for form in ("g1", "hermes"):
        load_dataset(config(tools, template="world", tool_format=form), 256)
    assert len(made) == 2
    (tmp_path / "a.csv").write_text("1+1,2\n2+2,4\n")
    found = [
        load_dataset(config(str(tmp_path / "a.csv"), columns=columns, sft_field=("prompt", "response")), 256)
        for columns in (("prompt", "response"), ("response", "prompt"))
    ]
    assert len(made) == 4 and [bytes(one[0].ids.tolist()) for one in found] == [b"1+12\0", b"21+1\0"]


def test_speed_is_reported_with_its_units(monkeypatch):
    progress = tokenise.TokenisingProgress("tokenising", 100)
    monkeypatch.setattr(tokenise.time, "perf_counter", lambda: progress.begin + 10)
    progress.add(50_000_000, 1_000_000)
    assert progress.speed() == "50.0 MB, 1,000,000 tokens in 10.0 s (5.0 MB/s, 100,000 tokens/s)"


@pytest.mark.parametrize("columns", [10, 40, 79, 200])
def test_a_bar_is_drawn_on_a_terminal_only_and_fits_it(columns):
    """On a terminal of `columns` columns no line of it is longer, so that none is left behind."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal:
        progress = tokenise.TokenisingProgress("tokenising data.jsonl", 100, terminal, delay=0)
        progress._bar.mininterval = 0
        for _ in range(4):
            time.sleep(0.001)
            progress.add(40, 7)
        drawn = os.read(ours, 1 << 16).decode()
        progress.close()
    os.close(ours)
    lines = drawn.split("\r")
    assert max(map(len, lines)) <= columns and drawn.startswith("\rtokenisin"[: columns + 1])
    assert columns < 79 or any("80% [################....]" in line for line in lines)
    elsewhere = io.StringIO()
    progress = tokenise.TokenisingProgress("tokenising data.jsonl", 100, elsewhere, delay=0)
    progress.add(50, 7)
    progress.close()
    assert elsewhere.getvalue() == "" and progress.tokens == 7


def test_what_is_recorded_is_json(write_jsonl, config, tmp_path):
    load_dataset(config(write_jsonl(*ROWS, {"prompt": "a", "response": ""}), bad_rows="skip"), 256)
    meta = json.loads((entries(tmp_path / "cache")[0] / cache.META).read_text().splitlines()[0])
    assert meta["record"]["skipped"] == {"field 'response' is empty": [1, [41]]}
    assert meta["arrays"]["lengths"]["count"] == 40 and "trained" in meta["arrays"]


def test_no_mask_is_kept_where_every_token_is_trained(write_jsonl, config, tmp_path):
    for _ in range(2):
        dataset = load_dataset(config(write_jsonl(*ROWS), loss_mask="none"), 256)
        assert dataset[3].trained.tolist() == [False] + [True] * (len(dataset[3].ids) - 1)
    assert not (entries(tmp_path / "cache")[0] / "trained").exists()


def test_what_a_killed_process_has_left_is_removed_and_nothing_of_a_living_one(tmp_path):
    key = Cache.key({"of": "this"})
    dead, other = tmp_path / f".{key[:8]}.dead", tmp_path / ".01234567.other"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "tokens").write_bytes(bytes(1000))
    begun, done = threading.Event(), threading.Event()

    def build(arrays):
        arrays.append(ids=np.arange(3))
        begun.set()
        assert done.wait(10)
        return {}

    def entry():
        return Cache(tmp_path / "rows.jsonl", str(tmp_path)).entry({"of": "this"}, build)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(entry)
        assert begun.wait(10)
        (living,) = tmp_path.glob(f".{key[:8]}.*")
        second = pool.submit(entry)  # waits for the first, whose folder it leaves alone
        time.sleep(0.1)
        assert living.is_dir() and not dead.exists() and other.is_dir()
        done.set()
        assert first.result()[0]["ids"].tolist() == second.result()[0]["ids"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(f".{key[:8]}")] == []
