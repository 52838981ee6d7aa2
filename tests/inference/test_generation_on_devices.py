"""Each device writes what PyTorch's operators write on the processor, greedily, token for token."""

import pytest

from rwkv_bone import load_model
from rwkv_bone.inference.generate import generate

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13], list(range(1, 60))]
MAX_NEW = 24


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("version", [7, 6, 5])
def test_answers_are_the_same_on_every_device(tiny_checkpoint, version, device):
    path = tiny_checkpoint(version=version, n_embd=64, head_size=32, seed=3)
    expected = generate(load_model(path, op="torch"), PROMPTS, max_new=MAX_NEW, stop_id=None)
    found = generate(load_model(path, device=device), PROMPTS, max_new=MAX_NEW, stop_id=None, device=device)
    assert found == expected
    assert len(set(map(tuple, expected))) == len(PROMPTS)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_answers_of_a_quantised_model_are_the_same_on_every_device(tiny_checkpoint, device):
    path = tiny_checkpoint(n_embd=64, head_size=32, seed=3)
    expected = generate(load_model(path, op="torch", quant="nf4"), PROMPTS, max_new=MAX_NEW, stop_id=None)
    model = load_model(path, device=device, quant="nf4")
    assert generate(model, PROMPTS, max_new=MAX_NEW, stop_id=None, device=device) == expected
    plain = generate(load_model(path, op="torch"), PROMPTS, max_new=MAX_NEW, stop_id=None)
    assert plain != expected, "nf4 changes nothing here, so this shows nothing"
