"""The preview shows what is trained, counts what there is, and takes the command line of train.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import to_json
from rwkv_bone.data import Sample, load_tokenizer
from rwkv_bone.data.preview import parse, preview, show
from rwkv_bone.errors import UserError
from tests.conftest import clean_environment

REPOSITORY = Path(__file__).resolve().parents[2]
BYTES = load_tokenizer("bytes", 256)


def sample(text: str, trained: str) -> Sample:
    """`trained` has a + under every byte that is trained."""
    return Sample(np.array(list(text.encode()), dtype=np.int32), np.array([c == "+" for c in trained]), "data.jsonl:1")


def lines_of(capsys, *argv: str) -> list[str]:
    preview([*argv, "--tokenizer", "bytes"])
    return capsys.readouterr().out.splitlines()


def test_trained_tokens_stand_in_brackets_or_in_green():
    one = sample("a\nbc\0", "--++-")
    assert show(one, BYTES, colored=False) == "a⏎\n[[bc]]<end>"
    assert show(one, BYTES, colored=True) == "\033[2ma⏎\n\033[0m\033[32mbc\033[0m\033[2m<end>\033[0m"
    assert show(sample("é\0", "+++"), BYTES, colored=False) == "[[é<end>]]"


def test_a_long_sample_is_cut_and_says_how_much_is_missing():
    one = sample("abcdefgh", "-+++-+++")
    assert show(one, BYTES, colored=False, limit=3) == "a[[bc]]\n... 5 more tokens, 4 of them trained"
    assert show(one, BYTES, colored=False, limit=8) == "a[[bcd]]e[[fgh]]"


def test_what_a_terminal_would_obey_is_shown_as_its_number():
    assert show(sample("\033[1m\r", "-----"), BYTES, colored=False) == "\\x1b[1m\\x0d"
    assert show(Sample(np.array([0xE4, 0xBD]), np.array([False, True]), ""), BYTES, colored=False) == "�[[�]]"


def test_samples_are_spread_over_the_data_and_counted(write_jsonl, capsys):
    path = write_jsonl(*({"prompt": f"{i}?", "response": "x" * i} for i in range(1, 10)))
    lines = lines_of(capsys, "--data_file", path, "--samples", "3", "--ctx_len", "32", "--micro_bsz", "2")
    assert [line for line in lines if line.startswith("---")] == [
        f"--- {path}:1: 4 tokens, 2 of them trained",
        f"--- {path}:5: 8 tokens, 6 of them trained",
        f"--- {path}:9: 12 tokens, 10 of them trained",
    ]
    assert "5?[[xxxxx<end>]]" in lines
    assert "9 samples, 72 tokens, 54 of them trained; longest 12" in lines
    assert "trained: 75.0% of the tokens, 6.0 a sample" in lines
    assert "length in tokens: mean 8.0, median 8, 95% up to 12" in lines
    bars = [re.fullmatch(r" +(\d+) to +(\d+) (#+) +(\d+)", line) for line in lines]
    assert [bar.group(1, 2, 4) for bar in bars if bar] == [(str(n), str(n), "1") for n in range(4, 13)]
    # 63 predictions in all.
    assert "packed (--dataload pack): 1 x 64 tokens, 1.6% of them unused" in lines
    assert "one sample a row: 9 x 32 tokens, 78.1% of them unused" in lines


def test_what_is_cut_and_left_out_is_said_with_the_reason(write_jsonl, capsys):
    long, skipped = {"prompt": "p" * 40, "response": "r"}, {"prompt": "p", "response": ""}
    path = write_jsonl({"prompt": "p", "response": "r" * 40}, long, skipped)
    flags = "--ctx_len 16 --bad_rows skip --samples 0 --max_lost 1"
    text = "\n".join(lines_of(capsys, "--data_file", path, *flags.split()))
    assert f"warning: {path}: cut at --ctx_len 16: 2 samples, 50 tokens left out, 62.8% of the trained tokens" in text
    assert f"no token to train on within --ctx_len 16: 1 of these samples, 50.0% of all ({path}:2)" in text
    assert f"warning: {path}: skipped" in text and "33.3% of the rows" in text
    assert "field 'response' is empty" in text and "---" not in text


PAIRS = (
    {"prompt": "2+2=", "chosen": "four", "rejected": "five!"},
    {"prompt": "name it: ", "chosen": "a\nb", "rejected": "c"},
)


def test_pairs_show_their_prompt_once_and_both_answers(write_jsonl, capsys):
    """The chosen answer where a trained one stands, the rejected one in other brackets, or in red."""
    words = ("--data_file", write_jsonl(*PAIRS), "--task", "dpo", "--ctx_len", "10", "--micro_bsz", "3")
    lines = lines_of(capsys, *words)
    path = words[1]
    assert lines[:9] == [
        f"--- {path}:1: prompt 4 tokens, chosen 5, rejected 6",
        "2+2=[[four<end>]]",
        "rejected: {{five!<end>}}",
        "",
        f"--- {path}:2: prompt 7 tokens, chosen 4, rejected 2",
        "... 2 tokens of the prompt, at its beginning, cut off",
        "me it: [[a⏎",
        "b<end>]]",
        "rejected: {{c<end>}}",
    ]
    # 9 + 10 + 11 + 9 tokens, and 5 + 6 + 4 + 2 in answers; the longer answers make 10 and 11.
    assert "2 pairs, 39 tokens, 17 of them trained; longest 11 with the longer answer" in lines
    assert "trained: 43.6% of the tokens, 8.5 a pair" in lines
    assert (
        "answers in tokens: chosen mean 4.5, median 4, 95% up to 5; rejected mean 4.0, median 4, 95% up to 6; the "
        "chosen one is the longer in 50.0% of the pairs"
    ) in lines
    assert "length in tokens with the longer answer: mean 10.5, median 10, 95% up to 11" in lines
    assert "packed (--dataload pack): 1 x 60 tokens, 41.7% of them unused" in lines
    assert "one answer a row: 4 x 10 tokens, 12.5% of them unused" in lines
    lines = lines_of(capsys, *words, "--color", "always", "--show_tokens", "3")
    assert lines[1:5] == [
        "... 1 more token",
        "\033[2m+2=\033[0m\033[32mfou\033[0m",
        "... 2 more tokens, 2 of them trained",
        "rejected: \033[31mfiv\033[0m",
    ]


def test_labelled_answers_show_whether_they_are_good(write_jsonl, capsys):
    rows = ({"prompt": f"{i}?", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(3))
    lines = lines_of(capsys, "--data_file", write_jsonl(*rows), "--task", "kto")
    told = [line.partition(": ")[2] for line in lines if line.startswith("---")]
    assert told == ["prompt 2 tokens, bad answer 3", "prompt 2 tokens, good answer 4", "prompt 2 tokens, bad answer 3"]
    assert [line for line in lines if "?" in line] == ["0?{{no<end>}}", "1?[[yes<end>]]", "2?{{no<end>}}"]
    assert "3 answers, 1 good and 2 bad, 16 tokens, 10 of them trained; longest 6" in lines
    assert "trained: 62.5% of the tokens, 3.3 an answer" in lines
    assert "answers in tokens: good mean 4.0, median 4, 95% up to 4; bad mean 3.0, median 3, 95% up to 3" in lines


def test_a_stream_of_random_windows_has_no_packing(write_jsonl, capsys):
    path = write_jsonl({"text": "abc"}, {"text": "defgh"})
    lines = lines_of(capsys, "--data_file", path, "--dataload", "get", "--ctx_len", "4")
    assert "a[[bc<end>]]" in lines and not any("packed" in line for line in lines)


def test_the_command_line_of_train_is_taken_as_it_is(tiny_checkpoint, tmp_path):
    model = str(tiny_checkpoint(vocab_size=61))
    train = ["--load_model", model, "--data_file", "a.jsonl", "b.jsonl", "--template", "g1", "--lr_init", "1e-3"]
    settings, data, vocab_size, _, _ = parse([*train, "--samples", "7"])
    assert data == parse_train(train).data
    assert (settings.samples, vocab_size) == (7, 61)

    saved = tmp_path / "config.json"
    saved.write_text(to_json(parse_train(train)))
    _, data, vocab_size, _, _ = parse(["--config", str(saved), "--ctx_len", "9"])
    assert (data.data_file, data.template, data.ctx_len, vocab_size) == (("a.jsonl", "b.jsonl"), "g1", 9, 61)


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], 65536), (["--tokenizer", "bytes"], 256), (["--vocab_size", "70", "--tokenizer", "bytes"], 70)],
)
def test_without_a_model_the_vocabulary_is_the_tokenizers(words, expected):
    assert parse(["--data_file", "x", *words])[2] == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--color blue", "--color blue: expected one of auto, always, never"),
        ("--samples -1", "--samples -1: expected at least 0"),
        ("--sample 1", "--sample is not a flag of sh scripts/preview_data.sh; did you mean --samples?"),
        ("--ctx_len 0", "--ctx_len 0: expected at least 1"),
    ],
)
def test_mistakes_in_the_flags_are_answered_as_train_answers_them(words, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        parse(["--data_file", "x", *words.split()])


def test_the_script_shows_the_data_of_the_default_run(tmp_path, capsys):
    stand_in = tmp_path / "python3"  # prints what the preview is called with, and is a real Python otherwise
    stand_in.write_text(
        f"""#!/bin/sh
case $* in
    *rwkv_bone.data.preview*) echo "$PYTHONPATH"; for word; do echo "$word"; done ;;
    *) exec '{sys.executable}' "$@" ;;
esac
"""
    )
    stand_in.chmod(0o755)
    environment = clean_environment() | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": "mine"}
    environment.pop("RWKV_PYTHON", None)  # of the shell that runs these tests
    command = ["sh", REPOSITORY / "scripts" / "preview_data.sh", "--samples", "1"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    path, *words = result.stdout.splitlines()
    assert path == f"{REPOSITORY}/src:mine" and words[:2] == ["-m", "rwkv_bone.data.preview"]

    preview([*words[2:], "--cache_dir", str(tmp_path / "cache")])
    out = capsys.readouterr().out
    assert out.startswith(f"--- {REPOSITORY}/assets/numbers_train.jsonl:1: ") and out.count("---") == 1
    assert "<end>]]" in out and "trained: " in out
