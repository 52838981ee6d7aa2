"""benchmarks/peers.py: others' models compute what ours does; a wrong one gets no time, a missing one is named."""

import sys

import pytest
import torch

from benchmarks import peers

CPU = torch.device("cpu")
CASE = peers.Case(peers.SIZES["tiny"]._replace(bsz=2, ctx=9, r=8), "fp32", CPU, "cpu", None)


def test_a_peer_that_is_not_there_is_left_out_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rwkv7_hf", None)
    words = ["--pairs", "rwkv-peft bone", "rwkv7-hf lora", "--precision", "fp32", "--peer_folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    assert peers.main() == 0
    said = capsys.readouterr().out
    assert "rwkv-peft bone fp32 left out: --peer_folder names no checkout" in said
    assert "rwkv7-hf lora fp32 left out: it is not installed" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["miss", "lora"])
def test_rwkv7_hf_with_our_operator_is_our_model(monkeypatch, method):
    pytest.importorskip("peft")
    modeling = pytest.importorskip("rwkv7_hf.modeling_rwkv7")
    for name in ("torch", "rwkv7_recurrent", "RWKV7_DECAY_BASE"):  # which the benchmark replaces
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    ours, theirs = peers.rwkv7_hf(CASE, method)
    assert len(ours.trained) == 2 * 6 * (2 if method == "lora" else 1)
    loss, gradients = peers.differences(ours, theirs)
    assert loss < 1e-6 and gradients < 1e-5


@pytest.mark.slow
def test_a_llama_of_transformers_is_the_same_under_both(monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, value in (("LLAMA", sizes), ("LLAMA_VOCABULARY", 64), ("LLAMA_TOKENS", (1, 12)), ("LLAMA_R", 8)):
        monkeypatch.setattr(peers, name, value)
    assert max(peers.differences(*peers.llama(CASE, "bat"))) < 1e-5
    monkeypatch.setitem(peers.PAIRS, "llama miss", peers.PAIRS["llama miss"]._replace(time=0, peak=0))
    words = ["--pairs", "llama miss", "--precision", "fp32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    assert peers.main() == 0
    assert "llama miss fp32" in capsys.readouterr().out

    adapted = peers.llama

    def wrong(case, method):
        ours, theirs = adapted(case, method)
        next(iter(theirs.trained.values())).data.add_(0.5)
        return ours, theirs

    monkeypatch.setattr(peers, "llama", wrong)
    assert peers.main() == 1
    said = capsys.readouterr().out
    assert "llama miss fp32: loss differs by" in said and "ratio" not in said.splitlines()[-1]
