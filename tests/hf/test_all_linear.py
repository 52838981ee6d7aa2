"""target_modules="all-linear" means what it means in peft, in models of many shapes."""

import copy

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.hf import BoneConfig, get_bone_model
from tests.hf.conftest import fill

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}
# class -> (settings of its configuration, name of its output layer)
ARCHITECTURES = {
    "LlamaForCausalLM": (WIDE, "lm_head"),
    "GemmaForCausalLM": ({**WIDE, "head_dim": 8}, "lm_head"),  # its weight is the embedding's
    "GPTNeoXForCausalLM": (WIDE, "lm_head"),
    "RwkvForCausalLM": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, "head"),
    "ElectraForMaskedLM": ({**WIDE, "embedding_size": 32}, "generator_lm_head"),
    "PhiForCausalLM": (WIDE, "lm_head"),  # with a bias
    "FalconForCausalLM": (SIZES, "lm_head"),  # its layers are of a class of their own
    "MixtralForCausalLM": ({**WIDE, "num_key_value_heads": 2, "num_local_experts": 2}, "lm_head"),
    "BloomForCausalLM": ({"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "lm_head"),
    "BertForMaskedLM": (WIDE, "cls.predictions.decoder"),
    "T5ForConditionalGeneration": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "lm_head",
    ),
}


def make(name: str):
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**ARCHITECTURES[name][0])).eval()


def adapted_by_peft(model, **options) -> set[str]:
    other = peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(r=4, target_modules="all-linear", **options))
    names = [name for name, _ in other.named_parameters() if "miss_block" in name]
    return {name.removeprefix("base_model.model.").removesuffix(".miss_block.default") for name in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_every_linear_layer_but_the_output_layer_as_in_peft(name):
    model, head = make(name), ARCHITECTURES[name][1]
    assert model.get_output_embeddings() is model.get_submodule(head)
    expected = adapted_by_peft(model)
    adapted = get_bone_model(model, BoneConfig(r=4, target_modules="all-linear"))
    assert set(adapted.bone.layers) == expected and head not in expected and len(expected) >= 4


def test_a_head_that_is_trained_whole_gets_no_adapter():
    config = transformers.LlamaConfig(**WIDE, num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config)
    expected = adapted_by_peft(model, task_type="SEQ_CLS")
    ours = BoneConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    assert set(get_bone_model(model, ours).bone.layers) == expected and "score" not in expected


def test_a_linear_layer_with_a_forward_of_its_own_computes_and_merges_as_one():
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    base = make("FalconForCausalLM")
    model = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=4, target_modules="all-linear")))
    expected = model(ids).logits
    assert (expected - base(ids).logits).norm() > 0.05 * expected.norm()
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_that_computes_something_else_is_left_out_with_a_warning_and_refused_by_name():
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), Doubled(8, 8))
    with pytest.warns(UserWarning, match="all-linear leaves 1 of 2 linear layers out: 1 is a Doubled"):
        model = get_bone_model(copy.deepcopy(base), BoneConfig(r=4, target_modules="all-linear"))
    assert list(model.bone.layers) == ["0"]
    with pytest.raises(UserError, match="1 is a Doubled: expected a linear layer"):
        get_bone_model(copy.deepcopy(base), BoneConfig(r=4, target_modules=["1"]))


def test_a_model_without_linear_layers_is_refused_with_what_it_has():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(UserError, match="transformer.h.0.attn.c_attn is a Conv1D: expected a linear layer"):
        get_bone_model(model, BoneConfig(r=4, target_modules="all-linear"))
    with pytest.raises(TypeError, match="Conv1D.*is not supported"):
        adapted_by_peft(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rwkv7_of_hugging_face_is_adapted_in_all_that_it_calls(dtype):
    pytest.importorskip("rwkv7_hf")
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

    torch.manual_seed(0)
    config = RWKV7Config(vocab_size=64, hidden_size=64, num_hidden_layers=2, head_dim=32)
    base = RWKV7ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="leaves 2 of 26 linear layers out: model.layers.0.attn.w_lora.lora.2 belongs"):
        adapted = get_bone_model(model, BoneConfig(r=4, target_modules="all-linear"))
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    fill(adapted)(input_ids=ids, labels=ids).loss.backward()
    # Low-rank layers are among them; v_lora, which the first layer has not, too.
    assert {"model.layers.0.attn.w_lora.lora.0", "model.layers.1.attn.v_lora.lora.2"} < adapted.bone.layers.keys()
    grads = {name: layer.bone.grad for name, layer in adapted.bone.layers.items()}
    assert all(grad is not None and grad.norm() > 0 for grad in grads.values())
    if dtype == torch.float32:
        # Those that peft adapts besides are of no use: no gradient reaches them.
        other = peft.get_peft_model(base, peft.MissConfig(r=4, target_modules="all-linear"))
        other(input_ids=ids, labels=ids).loss.backward()
        dead = {name for name, p in other.named_parameters() if p.requires_grad and p.grad is None}
        assert {name.removeprefix("base_model.model.").removesuffix(".miss_block.default") for name in dead} == (
            adapted_by_peft(base) - adapted.bone.layers.keys()
        )
        assert len(dead) == 2
