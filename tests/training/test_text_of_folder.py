"""A run on a model's folder: with the tokenizer and template there, in training, held-out data and preview alike."""

import json
import re
import shutil

import pytest

from rwkv_bone.config.saved import read_config
from rwkv_bone.data.preview import main as preview
from rwkv_bone.data.world_json import write_bytes_json, write_tokenizer_config

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}|A{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(job):
    """A folder with a model, a tokenizer of bytes and a chat template."""
    folder = job.folder / "model"
    folder.mkdir()
    shutil.copy(job.flags["load_model"], folder / "model.pth")
    write_bytes_json(folder / "tokenizer.json")
    write_tokenizer_config(folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def facts(output: str) -> list[str]:
    """The lines about data."""
    kept = re.compile(r"tokenizer |template |data .*JSON lines|data .*trained; longest|held-out|before .*loss")
    return [line for line in output.splitlines() if kept.match(line)]


def test_a_run_on_a_folder_reads_its_tokenizer_and_template_and_config_json_keeps_what_was_typed(job, model, capsys):
    rows = str(job.flags["data_file"])
    folder = job.run("folder", load_model=model, eval_data=rows, eval_samples=2)
    said = facts(capsys.readouterr().out)
    assert said[:2] == [
        f"tokenizer {model}/tokenizer.json, which is bytes (--tokenizer auto: the model's own)",
        f"template  {model}/chat_template.jinja (--template auto: the model's own)",
    ]
    assert f"template {model}/chat_template.jinja" in said[2] and said[4].startswith(f"held-out  {rows}")
    saved = read_config(folder / "config.json")
    assert (saved["data"]["tokenizer"], saved["data"]["template"]) == ("auto", "auto")
    answers = json.loads((folder / "evaluation.json").read_text())["after"]["answers"]
    assert [(one["prompt"], one["expected"]) for one in answers] == [("Q 37 -> |A", " 7373"), ("Q 38 -> |A", " 838383")]

    # The same as naming both by hand; and another than without them.
    job.run("typed", tokenizer="bytes", template=model / "chat_template.jinja", eval_data=rows, eval_samples=2)
    typed = facts(capsys.readouterr().out)
    assert said[2:] == typed and said[3:] == typed[1:]
    job.run("plain", eval_data=rows, eval_samples=2)
    assert facts(capsys.readouterr().out)[1:] != typed[1:]


def test_a_run_on_a_folder_goes_on_with_the_same_text(job, model, capsys):
    job.run("continued", load_model=model)
    capsys.readouterr()
    job.run("continued", load_model=model, resume=1, epoch_count=2)
    said = facts(capsys.readouterr().out)
    assert said[1] == f"template  {model}/chat_template.jinja (--template auto: the model's own)"


def test_half_of_the_rows_held_out_are_read_with_the_same_text(job, model, capsys):
    folder = job.run("folder-split", load_model=model, eval_split=0.3, eval_samples=9)
    answers = json.loads((folder / "evaluation.json").read_text())["after"]["answers"]
    assert answers and all(re.fullmatch(r"Q \d+ -> \|A", one["prompt"]) for one in answers)
    assert all(re.fullmatch(r" \d+", one["expected"]) for one in answers)


def test_the_preview_shows_what_the_run_trains_on(job, model, capsys, monkeypatch):
    words = ["preview", "--load_model", str(model), "--data_file", str(job.flags["data_file"]), "--ctx_len", "64"]
    monkeypatch.setattr("sys.argv", words)
    preview()
    output = capsys.readouterr().out
    assert "Q 37 -> |A[[ 7373<end>]]" in output
    assert f"template  {model}/chat_template.jinja (--template auto: the model's own)" in output
    monkeypatch.setattr("sys.argv", [*words, "--template", "raw", "--tokenizer", "bytes"])
    preview()
    output = capsys.readouterr().out
    assert "37 -> [[7373<end>]]" in output and "--template auto" not in output
