"""benchmarks/decode.py: what it times is what it says, and wrong logits show no speed."""

import importlib.util
import json
import sys

import pytest
import torch

from tests.conftest import REPOSITORY

TINY = ["--size", "tiny", "--prompt", "20", "--rounds", "1", "--batch", "1", "3"]


@pytest.fixture
def decode(monkeypatch):
    """The program as a module; `decode.run(*words)` is its exit status."""
    spec = importlib.util.spec_from_file_location("decode_benchmark", REPOSITORY / "benchmarks" / "decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["decode.py", *TINY, *words])
        return module.main()

    module.run = run
    return module


class Peer:
    """Stands in for the package: it reads a text again from its beginning."""

    def __init__(self, model, wrong: float = 0.0):
        self.model, self.wrong = model, wrong

    def forward(self, ids, state):
        text = (state or []) + ids
        return self.model(torch.tensor([text]))[0, -1] * (1 + self.wrong), text


def test_rows_hold_what_was_measured_beside_the_package_or_without_it(decode, tmp_path, monkeypatch, capsys):
    for peer in (Peer, lambda model: None):
        monkeypatch.setattr(decode, "package", lambda model, dtype, peer=peer: peer(model))
        file = tmp_path / "rows.jsonl"
        file.unlink(missing_ok=True)
        assert decode.run("--json", str(file)) == 0
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kinds = [(row["dtype"], row["what"], row["batch"]) for row in rows]
        one_type = [("decode", 1), ("decode", 3), ("prefill", 1), ("chat", 1), ("generate", 1), ("generate", 3)]
        assert kinds == [(t, *what) for t in ("fp32", "bf16") for what in one_type]
        for row in rows:
            assert row["tokens_per_s"] > 0 and row["error"] < 2e-2
            if row["what"] == "generate":
                assert min(row[f"of_{beside}"] for beside in ("single", "decoder", "forward", "products")) > 0
                assert row["ratio"] is None and (row["batch"] > 1 or row["of_single"] == 1)
            elif peer is Peer:
                assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["rwkv_tokens_per_s"])
            else:
                assert row["ratio"] is None
    assert "rwkv package: skipped" in capsys.readouterr().out


def test_logits_that_differ_from_the_package_show_no_speed(decode, monkeypatch, capsys):
    monkeypatch.setattr(decode, "package", lambda model, dtype: Peer(model, wrong=1e-3))
    assert decode.run("--dtype", "fp32") == 1
    said = capsys.readouterr()
    assert "tokens/s" not in said.out and "logits differ by 1.0e-03" in said.err


def test_a_state_that_forgets_shows_no_speed(decode, monkeypatch, capsys):
    model_of = decode.random_model

    def forgetful(*arguments):
        model = model_of(*arguments)
        forward = model.forward
        model.forward = lambda ids, state=None, **flags: forward(ids, **flags)
        return model

    monkeypatch.setattr(decode, "random_model", forgetful)
    monkeypatch.setattr(decode, "package", lambda model, dtype: None)
    assert decode.run("--dtype", "fp32") == 1
    assert "no speed is shown" in capsys.readouterr().err
