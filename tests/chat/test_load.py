"""What is talked to: with the template that its adapter was trained with, and a sentence where memory is short."""

import json

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.load import load_voices
from rwkv_bone.chat.talk import header
from rwkv_bone.errors import UserError
from rwkv_bone.inference.voice import enough_memory
from tests.conftest import adapter_state, random_model


@pytest.fixture
def trained(tmp_path):
    """(base, adapter) of a run whose template was g1."""
    model = random_model(seed=5, vocab_size=256)
    base, adapter = tmp_path / "base.pth", tmp_path / "run" / "rwkv-0.pth"
    checkpoints.write_state(base, model.state_dict())
    metadata = {"format": 1, "kind": "bone", "r": 8, "base": checkpoints.fingerprint(model.state_dict())}
    inject(model, settings=AdapterSettings("bone", 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bone"):
                parameter.fill_(0.1)
    adapter.parent.mkdir()
    checkpoints.write_state(adapter, adapter_state(model), metadata)
    (adapter.parent / "config.json").write_text(json.dumps({"data": {"template": "g1", "tokenizer": "auto"}}))
    return str(base), str(adapter)


def test_an_adapter_is_talked_to_in_the_template_of_its_run(trained):
    base, adapter = trained
    (voice,) = load_voices(ChatConfig(load_model=base, adapter=adapter))
    assert voice.wording.template.name == "g1"
    lines = header([voice])
    assert f"{base} + {adapter}: RWKV-7, 2 layers of 32" in lines[0]
    assert "template  g1 (that of the adapter's run, " in lines[1]
    (voice,) = load_voices(ChatConfig(load_model=base, adapter=adapter, template="world"))
    assert voice.wording.template.name == "world"
    (voice,) = load_voices(ChatConfig(load_model=base))
    assert voice.wording.template.name == "raw"
    first, second = load_voices(ChatConfig(load_model=base, adapter=adapter, compare=base))
    assert second.wording.template.name == "g1"
    assert not torch.equal(first.decoder.read([5])[0], second.decoder.read([5])[0])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data": 3}', '{"data": {"template": 3, "tokenizer": "auto"}}'])
def test_a_config_that_says_no_template_is_let_be(trained, text, tmp_path):
    base, adapter = trained
    (tmp_path / "run" / "config.json").write_text(text)
    assert load_voices(ChatConfig(load_model=base, adapter=adapter))[0].wording.template.name == "raw"


def test_an_adapter_of_another_base_is_refused(trained, tmp_path):
    checkpoints.write_state(tmp_path / "other.pth", random_model(seed=6, vocab_size=256).state_dict())
    with pytest.raises(UserError, match="was trained on another base"):
        load_voices(ChatConfig(load_model=str(tmp_path / "other.pth"), adapter=trained[1]))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_says_what_to_lower(error):
    with pytest.raises(UserError, match=r"out of memory while .*--quant int8 or nf4"):
        with enough_memory("while the model was loaded"):
            raise error
    with pytest.raises(RuntimeError, match="another thing"):
        with enough_memory(""):
            raise RuntimeError("another thing")
