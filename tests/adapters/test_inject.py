"""Which modules get an adapter, what is trained, and how many parameters that is."""

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject, load_adapter, settings_of
from rwkv_bone.adapters.layer import AdapterLinear
from rwkv_bone.adapters.registry import split_key
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.config import AdapterConfig
from rwkv_bone.errors import UserError
from rwkv_bone.models import EVERY_BLOCK, Recompute, build
from rwkv_bone.quantization import QuantLinear, quantize
from tests.conftest import adapter_state, random_model

ALL = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def meta_model(n_layer, n_embd, dim_ffn, **ranks):
    arch = Architecture(7, n_layer, n_embd, n_embd // 64, 64, dim_ffn, 65536, ranks)
    with torch.device("meta"):
        return build(arch, op="torch")


def test_the_parameters_of_a_2_9b_model_are_those_of_the_papers():
    model = meta_model(32, 2560, 10240, w=96, a=96, v=64, g=320)
    injection = inject(model, settings=AdapterSettings("bone", 64))
    assert injection.trainable == 47_185_920  # "47.2M"
    assert injection.targets["att.key"].trainable == 32 * 64 * 2560
    # Over a symmetric channel mix, Bat's blocks along the inputs add up to the same number.
    model = meta_model(32, 2560, 10240, w=96, a=96, v=64, g=320)
    assert inject(model, settings=AdapterSettings("bat", 64)).trainable == 47_185_920
    # "DiSHA(r) = 2 LoRA(r)": on a square weight LoRA of half the rank has as many parameters, elsewhere more.
    model = meta_model(32, 2560, 10240, w=96, a=96, v=64, g=320)
    injection = inject(model, settings=AdapterSettings("lora", 32))
    assert injection.targets["att.key"].trainable == 32 * 64 * 2560
    assert injection.targets["ffn.key"].trainable == 32 * 32 * (2560 + 10240)


def test_the_counts_of_a_0_1b_model_are_printed_per_target():
    injection = inject(meta_model(12, 768, 3072, w=64, a=64, v=32, g=128), settings=AdapterSettings("bone", 64))
    lines = [" ".join(line.split()) for line in injection.summary_lines()]
    assert "att.key 12 layers r=64 589,824 trainable of 7,077,888" in lines
    assert lines[-1].startswith("bone 5,308,416 trainable of 191,034,624")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_default_is_every_projection_of_att_and_ffn_and_nothing_else_is_trained(kind):
    model = random_model()
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    injection = inject(model, settings=AdapterSettings(kind, 8))
    assert list(injection.targets) == ALL
    assert adapted(model) == {f"blocks.{layer}.{name}" for layer in range(2) for name in ALL}
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == {f"{name}.{own}" for name in adapted(model) for own in ADAPTERS[kind].parameter_names}
    assert injection.trainable == sum(parameter.numel() for parameter in trainable.values())
    assert injection.targets["ffn.key"].trainable == sum(
        parameter.numel() for key, parameter in trainable.items() if "ffn.key" in key
    )
    assert injection.total == sum(parameter.numel() for parameter in before.values())
    # The base's keys are what they were, so its checkpoint still loads.
    state = model.state_dict()
    assert [key for key in state if not split_key(key)] == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "targets,expected",
    [
        (["att.key"], {"blocks.0.att.key", "blocks.1.att.key"}),
        (["key"], {f"blocks.{layer}.{part}.key" for layer in (0, 1) for part in ("att", "ffn")}),
        (["head"], {"head"}),
        (["blocks.1"], {f"blocks.1.{name}" for name in ALL}),
        (["blocks.1.ffn.value", "att.output"], {"blocks.1.ffn.value", "blocks.0.att.output", "blocks.1.att.output"}),
    ],
)
def test_targets_match_whole_segments_of_names(targets, expected):
    model = random_model()
    inject(model, settings=AdapterSettings("bone", 4), targets=targets)
    assert adapted(model) == expected


@pytest.mark.parametrize("target", ["ke", "att.ke", "tt.key", "key.att", "emb", "att.w1", "blocks.2"])
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is(target):
    model = random_model()
    with pytest.raises(UserError, match=f"--targets {target} .*att.key.*ffn.value.*head"):
        inject(model, settings=AdapterSettings("bone", 4), targets=["att.value", target])
    assert not adapted(model)


@pytest.mark.parametrize(
    "part,examples",
    [
        ("emb", {"emb.weight"}),
        ("head", {"head.weight"}),
        ("ln", {"blocks.0.ln0.weight", "blocks.1.ln2.bias", "blocks.1.att.ln_x.weight", "ln_out.bias"}),
        ("time", {"blocks.0.att.x_r", "blocks.1.att.w0", "blocks.1.att.v1", "blocks.0.att.r_k", "blocks.1.ffn.x_k"}),
    ],
)
def test_train_parts_train_the_fields_words_in_fp32(part, examples):
    model = random_model(dtype=torch.bfloat16)
    injection = inject(model, settings=AdapterSettings("bone", 8), train_parts=[part])
    parameters = dict(model.named_parameters())
    assert examples <= set(injection.extra)
    assert set(injection.extra) == {
        key for key, parameter in parameters.items() if parameter.requires_grad and not key.endswith(".bone")
    }
    assert {checkpoints.param_part(key) for key in injection.extra} == {part}
    assert {parameters[key].dtype for key in injection.extra} == {torch.float32}
    assert parameters["blocks.0.att.key.weight"].dtype == torch.bfloat16
    assert injection.parts[part].trainable == sum(parameters[key].numel() for key in injection.extra)


def test_training_a_part_leaves_the_loaded_tensors_alone():
    model = random_model()
    loaded = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    before = loaded["ln_out.weight"].clone()
    inject(model, settings=AdapterSettings("bone", 8), train_parts=["ln"])
    with torch.no_grad():
        model.ln_out.weight.add_(1)
    assert torch.equal(loaded["ln_out.weight"], before)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"kind": "bonne"}, "adapter bonne: expected one of bone, bat, bat-col, lora, pissa"),
        ({"train_parts": ["times"]}, "--train_parts times: expected any of emb, head, ln, time"),
        ({"targets": ["head"], "train_parts": ["head"]}, "head is both in --targets and in --train_parts"),
        ({"r": 64}, "--bone_r 64 is larger than the 32 inputs of blocks.0.att.receptance"),
        ({"kind": "bat", "r": 24}, "--bone_r 24 does not divide .* blocks.0.att.receptance"),
        ({"kind": "bat-col", "r": 24}, "--bone_r 24 does not divide .* blocks.0.att.receptance"),
        ({"kind": "pissa", "r": 33}, "--lora_r 33: the weight of blocks.0.att.receptance"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(arguments, message):
    model, arguments = random_model(), dict(arguments)
    with pytest.raises(UserError, match=message):
        settings = AdapterSettings(arguments.pop("kind", "bone"), arguments.pop("r", 8))
        inject(model, settings=settings, **arguments)
    assert not adapted(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_is_refused():
    model = random_model()
    inject(model, settings=AdapterSettings("bone", 8))
    with pytest.raises(UserError, match="has an adapter already"):
        inject(model, settings=AdapterSettings("bat", 8))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("recompute", [Recompute(), Recompute(wkv=True), EVERY_BLOCK])
def test_every_adapter_gets_a_gradient_from_the_first_step(kind, recompute):
    model = random_model(vocab_size=64)
    inject(model, settings=AdapterSettings(kind, 8), targets=["att", "ffn", "head"], train_parts=["ln", "time", "emb"])
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids.roll(-1, dims=1), recompute=recompute).backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) > 13
    untouched = [key for key, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    # LoRA's A waits for B, which is zero at first.
    assert untouched == [key for key in trained if kind == "lora" and key.endswith("lora_A")]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_saved_adapter_gives_the_same_model_again(kind):
    first, second = random_model(), random_model()
    inject(first, settings=AdapterSettings(kind, 8), train_parts=["ln"])
    # Neither what a layer draws nor what it finds in the weight may matter to the one that loads.
    inject(second, settings=AdapterSettings(kind, 8), train_parts=["ln"], initialise=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = adapter_state(first)
    load_adapter(second, state)
    ids = torch.arange(10)[None]
    assert torch.equal(first(ids), second(ids))
    with torch.no_grad():
        for tensor in first.blocks[0].att.key.tensors().values():
            tensor.zero_()
    assert all(tensor.any() for tensor in state.values())  # copies, not views


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda state: state.pop("blocks.1.ffn.key.bone"), "missing blocks.1.ffn.key.bone"),
        (lambda state: state.update({"blocks.7.att.key.bone": torch.zeros(8, 32)}), "unexpected blocks.7.att.key.bone"),
        (
            lambda state: state.update({"blocks.0.att.key.bone": torch.zeros(4, 32)}),
            r"key.bone is \[4, 32\], .*\[8, 32\]",
        ),
    ],
)
def test_an_adapter_loads_only_if_every_key_and_shape_fits(change, message):
    model = random_model()
    inject(model, settings=AdapterSettings("bone", 8))
    state = adapter_state(model)
    change(state)
    with pytest.raises(UserError, match=message):
        load_adapter(model, state)


def test_the_flags_of_a_run_say_what_its_adapter_is():
    assert settings_of(AdapterConfig(bone_r=16, bone_mode="bat-col")) == AdapterSettings("bat-col", 16)
    lora = AdapterConfig(peft="lora", lora_r=8, lora_alpha=16.0, lora_dropout=0.1, lora_rs=True)
    assert settings_of(lora) == AdapterSettings("lora", 8, alpha=16.0, dropout=0.1, rslora=True)
    assert settings_of(AdapterConfig(peft="pissa", lora_r=8)) == AdapterSettings("pissa", 8)
    assert settings_of(AdapterConfig(peft="state")) == AdapterSettings("state", 0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_settings_come_back_from_the_metadata_of_a_file(kind):
    settings = AdapterSettings(kind, 8, alpha=4.0, dropout=0.1, rslora=True)
    metadata = inject(random_model(), settings=settings, targets=["att.key"]).metadata()
    assert AdapterSettings.from_metadata(metadata) == settings
    assert metadata.get("blocks") == {"bone": "in", "bat": "in", "bat-col": "out"}.get(kind)
    assert (metadata["targets"], metadata["extra"]) == (["att.key"], [])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_quantised_model_takes_every_adapter_and_counts_its_weights(kind):
    plain, model = random_model(), random_model()
    expected = inject(plain, settings=AdapterSettings(kind, 8))
    for name in adapted(plain):
        weight = quantize(model.get_submodule(name).weight, "nf4")
        model.set_submodule(name, QuantLinear(weight))
    injection = inject(model, settings=AdapterSettings(kind, 8))
    assert adapted(model) == adapted(plain)
    assert (injection.total, injection.trainable) == (expected.total, expected.trainable)
    assert injection.summary_lines() == expected.summary_lines()


def test_a_lora_is_drawn_from_the_generator_it_is_given():
    states = []
    for seed in (0, 0, 1):
        model = random_model()
        inject(model, settings=AdapterSettings("lora", 4), generator=torch.Generator().manual_seed(seed))
        states.append(adapter_state(model))
    first, again, other = (state["blocks.1.ffn.key.lora_A"] for state in states)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[:, :32], states[0]["blocks.0.ffn.key.lora_A"][:, :32])
