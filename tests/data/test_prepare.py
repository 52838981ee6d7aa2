"""python -m rwkv_bone.data.prepare: what the field's own tool makes, or one sentence and exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.config.flags import parse_section
from rwkv_bone.data import load_dataset, load_tokenizer, tokenise
from rwkv_bone.data.prepare import PrepareConfig, prepare
from rwkv_bone.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["one", "naïve café\n\n世界", "x" * 500, " "]


@pytest.fixture
def config(config):
    """As elsewhere, without a tokenizer: token ids need none, and one that is named is refused."""
    return lambda path, **settings: config(path, **{"tokenizer": "auto", **settings})


@pytest.fixture
def run_prepare(tmp_path):
    """Factory: makes the pair tmp_path/out of files, and returns its path."""

    def run(*files: str, **settings) -> Path:
        prepare(PrepareConfig(**{"input": files, "output": str(tmp_path / "out"), "tokenizer": "bytes", **settings}))
        return tmp_path / "out"

    return run


def parts(pair: Path) -> list[bytes]:
    return [pair.with_name(pair.name + ending).read_bytes() for ending in (".bin", ".idx")]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_pair_is_byte_for_byte_that_of_the_fields_own_tool(shared, run_prepare, monkeypatch, workers):
    monkeypatch.setattr(tokenise, "BLOCK", 100)
    folder = shared / "data" / "binidx"
    tokenizer = str(shared / "tokenizers" / "20B_tokenizer.json")
    pair = run_prepare(str(folder / "documents.jsonl"), tokenizer=tokenizer, workers=workers)
    assert parts(pair) == parts(folder / "documents_text_document")


def test_training_on_the_pair_is_training_on_its_rows(write_jsonl, config, run_prepare, capsys):
    path = write_jsonl(*({"text": text} for text in TEXTS[:3]))
    pair, rows = load_dataset(config(str(run_prepare(path))), 256), load_dataset(config(path), 256)
    assert [s.ids.tolist() for s in pair] == [s.ids.tolist() for s in rows]
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("out.bin, .idx: 3 documents, uint16, tokenizer bytes")
    assert "MB/s" in said[1] and "tokens/s" in said[1]


def test_several_files_another_field_and_no_end_token(write_jsonl, config, run_prepare):
    files = write_jsonl({"content": "a"}, name="a.jsonl"), write_jsonl({"content": "bc"}, name="b.jsonl")
    pair = run_prepare(*files, field="content", append_eod=False, dtype="int32")
    assert parts(pair)[0] == b"".join(bytes([c, 0, 0, 0]) for c in b"abc")
    assert load_dataset(config(str(pair)), 256)[0].ids.tolist() == list(b"bc")


def test_world_tokens_are_those_of_the_tokenizer(write_jsonl, run_prepare, config):
    tokenizer = load_tokenizer("world", 65536)
    pair = run_prepare(write_jsonl(*({"text": text} for text in TEXTS[:3])), tokenizer="world")
    dataset = load_dataset(config(str(pair)), 65536)
    assert [s.ids.tolist() for s in dataset] == [[*tokenizer.encode(text), 0] for text in TEXTS[:3]]


def test_bad_rows_stop_or_are_skipped_and_counted(write_jsonl, run_prepare, tmp_path, capsys):
    path = write_jsonl({"text": "a"}, "{", {"text": ""}, {"txt": "a"}, {"text": "b"})
    with pytest.raises(UserError, match="data.jsonl:2: not valid JSON"):
        run_prepare(path)
    assert list(tmp_path.glob("*out*")) == []
    pair = run_prepare(path, bad_rows="skip")
    assert parts(pair)[0] == b"a\0\0\0b\0\0\0"
    said = [line.split("), ")[1].split(" (")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert said == ["not valid JSON: 1 row", "field 'text' is empty: 1 row", "no field 'text': 1 row"]
    with pytest.raises(UserError, match="data.jsonl: no usable rows; .*skipped .*not valid JSON"):
        run_prepare(write_jsonl("{"), bad_rows="skip", overwrite=True)
    assert parts(pair)[0] == b"a\0\0\0b\0\0\0"  # what was there stays


def test_an_existing_pair_is_kept_unless_it_may_be_replaced(write_jsonl, run_prepare):
    before = parts(run_prepare(write_jsonl({"text": "a"})))
    path = write_jsonl({"text": "b"})
    with pytest.raises(UserError, match="out.bin exists and is kept: give another name, or --overwrite"):
        run_prepare(path)
    assert parts(run_prepare(path, overwrite=True)) != before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"input": ()}, "--input is missing"),
        ({"output": ""}, "--output is missing"),
        ({"tokenizer": "auto"}, "--tokenizer auto: there is no model here"),
        ({"tokenizer": "nowhere.json"}, "--tokenizer nowhere.json: no such file"),
        ({"dtype": "uint8"}, "--dtype uint8: expected one of auto, uint16, int32"),
        ({"workers": -1}, "--workers -1: expected at least 0"),
        ({"input": ("nowhere.jsonl",)}, "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_in_the_settings_are_refused(write_jsonl, tmp_path, settings, expected):
    good = {"input": (write_jsonl({"text": "a"}),), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=expected):
        prepare(PrepareConfig(**{**good, **settings}))


def test_ready_made_tokens_are_no_input(write_jsonl, run_prepare):
    pair = run_prepare(write_jsonl({"text": "a"}))
    with pytest.raises(UserError, match="binidx, uint16; expected rows with a field 'text'"):
        run_prepare(str(pair), overwrite=True)


def test_the_command_line(write_jsonl, tmp_path):
    path = write_jsonl({"text": "a"}, "[]")
    command = [sys.executable, "-m", "rwkv_bone.data.prepare", "--input", path, "--output", str(tmp_path / "out")]

    def call(*words):
        environment = {"PYTHONPATH": str(REPOSITORY / "src"), "PATH": ""}
        return subprocess.run([*command, *words], capture_output=True, text=True, env=environment)

    done = call("--tokenizer", "bytes")
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith(f"error: {path}:2: expected a JSON object")
    )
    assert len(done.stderr.splitlines()) == 1
    done = call("--tokenizer", "bytes", "--bad_rows", "skip")
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 3


def test_every_flag_has_a_meaning_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_section("prepare", "", PrepareConfig, ["--help"])
    text = capsys.readouterr().out
    for flag in ("input", "output", "tokenizer", "field", "append_eod", "workers", "overwrite"):
        assert f"--{flag}" in text
