"""Adapters in Hugging Face models, against Hugging Face PEFT wherever it computes the same."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rwkv_bone.errors import UserError
from rwkv_bone.hf import BoneConfig, BoneModel, TaskType, get_bone_model, get_peft_model
from tests.hf.conftest import ARCHITECTURES, fill

peft = pytest.importorskip("peft")

SEVEN = ["q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."


def theirs(model, **options):
    """PEFT's model around a copy."""
    return peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(task_type="CAUSAL_LM", **options))


def share(ours, other) -> None:
    """Copy our adapter's values into PEFT's model."""
    blocks = {name: p for name, p in other.named_parameters() if "miss_block" in name}
    state = ours.state_dict()
    with torch.no_grad():
        for name, block in blocks.items():
            module = name.removeprefix(PREFIX).removesuffix(".miss_block.default")
            block.copy_(state[f"{module}.bone"])
    assert len(blocks) == len(ours.bone.layers)


def close(found, expected, tolerance=1e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("init_weights,r", [(True, 8), (True, 7), ("bat", 8)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_equal_pefts_layer_by_layer(make_model, ids, name, init_weights, r):
    base = make_model(name)
    ours = get_bone_model(copy.deepcopy(base), BoneConfig(r=r, target_modules=SEVEN, init_weights=init_weights))
    assert torch.equal(ours(ids).logits, base(ids).logits)  # an adapter starts as nothing
    other = theirs(base, r=r, target_modules=SEVEN, init_weights=init_weights)
    assert ours.get_nb_trainable_parameters() == other.get_nb_trainable_parameters()
    share(fill(ours), other)
    outputs = []
    for model, prefix in ((ours, ""), (other, PREFIX)):
        layers = {}
        for module in ours.bone.layers:
            hook = lambda _, __, y, module=module, layers=layers: layers.update({module: y.detach()})  # noqa: E731
            model.get_submodule(prefix + module).register_forward_hook(hook)
        model(input_ids=ids, labels=ids).loss.backward()
        outputs.append(layers)
    for module in ours.bone.layers:
        close(outputs[0][module], outputs[1][module])
        grad = other.get_submodule(PREFIX + module).miss_block["default"].grad
        assert grad.norm() > 0
        close(ours.get_submodule(module).bone.grad, grad, 2e-5)


@pytest.mark.parametrize("training", [False, True])
def test_adapters_are_in_the_mode_of_the_model_they_are_put_into(make_model, training):
    model = get_bone_model(make_model().train(training), BoneConfig(r=8, target_modules=["q_proj"]))
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_a_short_training_has_pefts_loss_curve(make_model, ids, init_weights):
    base = make_model("qwen")
    ours = get_bone_model(copy.deepcopy(base), BoneConfig(r=8, target_modules=SEVEN, init_weights=init_weights))
    curves = []
    for model in (ours, theirs(base, r=8, target_modules=SEVEN, init_weights=init_weights)):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
        curve = []
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("init_weights,r", [(True, 7), ("bat", 8)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_is_loaded_by_peft_and_by_us(make_model, ids, tmp_path, name, init_weights, r):
    base = make_model(name)
    config = BoneConfig(r=r, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_weights=init_weights)
    ours = fill(get_bone_model(copy.deepcopy(base), config))
    ours.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    expected = ours(ids).logits
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(other(ids).logits, expected)
    again = BoneModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(ids).logits, expected)
    assert again.get_nb_trainable_parameters()[0] == 0
    trainable = BoneModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()


@pytest.mark.parametrize("init_weights", [True, "bat", "mini"])
def test_what_peft_saves_is_loaded(make_model, ids, tmp_path, init_weights):
    base = make_model("llama")
    other = fill(theirs(base, r=8, target_modules=SEVEN, init_weights=init_weights, mini_r=4))
    other.save_pretrained(tmp_path)
    settings = tmp_path / "adapter_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "query"]}))
    ours = BoneModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(ours(ids).logits, other(ids).logits)
    assert (ours(ids).logits - base(ids).logits).norm() > 0.05 * base(ids).logits.norm()


def test_a_bone_directory_of_old_peft_is_loaded(make_model, ids, tmp_path):
    base = make_model("llama")
    ours = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=8, target_modules=["v_proj"])))
    ours.save_pretrained(tmp_path)
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    # peft 0.14 to 0.18 wrote these names.
    save_file({key.replace("miss_", "bone_"): t for key, t in load_file(weights).items()}, weights)
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"peft_type": "BONE", "auto_mapping": None, "revision": None}))
    assert torch.equal(BoneModel.from_pretrained(base, tmp_path)(ids).logits, ours(ids).logits)


def test_bat_by_rows_is_saved_for_us_and_refused_by_peft(make_model, ids, tmp_path):
    base = make_model("llama")
    ours = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=8, target_modules=["q_proj"], mode="bat-row")))
    ours.save_pretrained(tmp_path)
    assert torch.equal(BoneModel.from_pretrained(copy.deepcopy(base), tmp_path)(ids).logits, ours(ids).logits)
    with pytest.raises(Exception, match="RWKV_BONE_BAT"):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("mode,r", [("bone", 7), ("bat-col", 8), ("bat-row", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_model_is_a_plain_one_with_the_adapted_models_outputs(make_model, ids, tmp_path, mode, r, dtype):
    base = make_model("qwen", dtype)
    model = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=r, target_modules="all-linear", mode=mode)))
    expected, before = model(ids).logits, base(ids).logits
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base) and list(merged.state_dict()) == list(base.state_dict())
    close(merged(ids).logits, expected, 1e-5 if dtype == torch.float32 else 0.03)
    assert (expected - before).norm() > 0.1 * before.norm()
    merged.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in merged.state_dict().items())


@pytest.mark.parametrize("mode", ["bone", "bat-col"])
def test_merging_equals_pefts(make_model, mode):
    base = make_model("llama")
    init_weights = "bat" if mode == "bat-col" else True
    model = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=8, target_modules=SEVEN, mode=mode)))
    other = theirs(base, r=8, target_modules=SEVEN, init_weights=init_weights)
    share(model, other)
    expected = other.merge_and_unload().state_dict()
    for key, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, expected[key])


@pytest.mark.parametrize("end", ["unload", "disable_adapter", "disable_adapters"])
def test_the_base_comes_back_bit_for_bit(make_model, ids, end):
    base = make_model("gemma")
    config = BoneConfig(r=8, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
    model = fill(get_bone_model(copy.deepcopy(base), config))
    adapted = model(ids).logits
    if end == "unload":
        model = model.unload()
        assert type(model) is type(base)
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.state_dict().items())
    elif end == "disable_adapter":
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids).logits, adapted)
        return
    else:
        model.disable_adapters()
        with pytest.raises(UserError, match="the adapter is disabled, and not a part of the model now"):
            model.adapter_keys()
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_the_model_stays_what_it_is(make_model, ids):
    base = make_model("llama")
    keys = set(base.state_dict())
    model = get_bone_model(base, BoneConfig(r=8, target_modules=["q_proj"]))
    assert model is base and type(model).__name__ == "LlamaForCausalLM"
    added = {f"model.layers.{layer}.self_attn.q_proj.bone" for layer in (0, 1)}
    assert set(model.state_dict()) == keys | added
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    fill(model)
    written = model.generate(ids, max_new_tokens=3, do_sample=False)
    copied = copy.deepcopy(model)
    assert torch.equal(copied.generate(ids, max_new_tokens=3, do_sample=False), written)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(ids, max_new_tokens=3, do_sample=False), written)


def test_the_documented_snippet_of_the_bone_repository_runs(make_model, tmp_path, capsys):
    model = make_model("llama", torch.bfloat16)
    bone_config = BoneConfig(r=8, target_modules=SEVEN, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, bone_config)
    peft_model.print_trainable_parameters()
    expected = theirs(make_model("llama"), r=8, target_modules=SEVEN)
    printed = capsys.readouterr().out
    expected.print_trainable_parameters()
    assert printed == capsys.readouterr().out
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(tmp_path)
    peft_model = peft_model.unload()
    peft_model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "model.safetensors", "config.json"} <= names
    assert all("bone" not in key for key in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_on_a_base_of_half_precision(make_model, ids, dtype):
    model = get_bone_model(make_model("llama", dtype), BoneConfig(r=8, target_modules=SEVEN))
    fill(model)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == dtype and output.logits.isfinite().all()
    grads = [layer.bone.grad for layer in model.bone.layers.values()]
    assert all(grad.dtype == torch.float32 and grad.norm() > 0 for grad in grads)
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith(".bone"))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(ids).logits.isfinite().all()


def test_random_weights_are_pefts_for_the_same_seed(make_model):
    base = make_model("llama")
    torch.manual_seed(3)
    ours = get_bone_model(copy.deepcopy(base), BoneConfig(r=8, target_modules=["q_proj"], init_weights=False))
    torch.manual_seed(3)
    other = theirs(base, r=8, target_modules=["q_proj"], init_weights=False)
    module = "model.layers.0.self_attn.q_proj"
    block = other.get_submodule(PREFIX + module).miss_block["default"]
    assert torch.equal(ours.get_submodule(module).bone, block) and block.abs().max() > 0


def test_layers_and_names_are_chosen_as_peft_does(make_model):
    base = make_model("llama")
    for options in (
        {},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1.*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["k_proj"], "layers_to_transform": 1},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        ours = get_bone_model(copy.deepcopy(base), BoneConfig(r=4, **options))
        other = theirs(base, r=4, **options)
        expected = {
            name.removeprefix(PREFIX).removesuffix(".miss_block.default")
            for name, _ in other.named_parameters()
            if "miss_block" in name
        }
        assert set(ours.bone.layers) == expected, options


def test_modules_to_save_are_trained_whole_and_travel_with_the_adapter(make_model, ids, tmp_path):
    base = make_model("llama")
    config = BoneConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = fill(get_bone_model(copy.deepcopy(base), config))
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    model.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(ids).logits, model(ids).logits)
    assert torch.equal(BoneModel.from_pretrained(copy.deepcopy(base), tmp_path)(ids).logits, model(ids).logits)


def test_an_adapter_on_a_tied_output_layer_leaves_the_embedding_alone(make_model, ids, tmp_path):
    base = make_model("gemma", tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=8, target_modules=["lm_head"])))
    expected = model(ids).logits
    merged = model.merge_and_unload()
    close(merged(ids).logits, expected)
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    merged.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, merged(ids).logits)
    tied = make_model("gemma", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head shares its weight"):
        get_bone_model(tied, BoneConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_a_broken_adapter_is_not_merged(make_model, ids):
    base = make_model("llama")
    model = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=7, target_modules=["q_proj", "down_proj"])))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bone[0, 0] = float("nan")
    with pytest.raises(UserError, match="layers.1.mlp.down_proj would hold NaN"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(model, BoneModel)
    assert torch.equal(model.unload()(ids).logits, base(ids).logits)


def packed_model(make_model, bits: int = 4):
    """(a model whose projections bitsandbytes has packed, and a copy with the numbers that the packed ones stand for)

    In training mode; for inference bitsandbytes packs weights anew, on some processors in blocks of 64 only.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = make_model("qwen", hidden_size=64, intermediate_size=128).train()
    plain = copy.deepcopy(base)
    for name, module in list(base.named_modules()):
        if not name.endswith("_proj"):
            continue
        with torch.no_grad():
            if module.bias is not None:
                module.bias.normal_()
        sizes = module.in_features, module.out_features, module.bias is not None
        if bits == 4:
            packed = bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4")
        else:
            packed = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        packed.load_state_dict(module.state_dict())
        base.set_submodule(name, packed.to("cpu"))
        if bits == 4:
            numbers = bitsandbytes.functional.dequantize_4bit(packed.weight, packed.weight.quant_state)
            dense = plain.get_submodule(name)
            dense.load_state_dict({"weight": numbers, **({"bias": module.bias} if module.bias is not None else {})})
    return base, plain


@pytest.mark.parametrize("mode", ["bone", "bat-row", "bat-col"])
def test_layers_that_bitsandbytes_packed_are_adapted_as_they_are_with_their_bias(make_model, ids, mode):
    base, plain = packed_model(make_model)
    expected = base(ids).logits
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    config = BoneConfig(r=8, target_modules=["q_proj", "down_proj"], mode=mode)
    model, dense = get_bone_model(base, config), get_bone_model(plain, config)
    close(model(ids).logits, expected)
    if mode != "bat-col":  # which computes with the numbers that the base unpacks, and not with the base
        assert torch.equal(model(ids).logits, expected)
    for one in (model, dense):
        fill(one)(input_ids=ids, labels=ids).loss.backward()
    close(model(ids).logits, dense(ids).logits, 1e-4)
    for name, layer in model.bone.layers.items():
        assert layer.bone.grad.norm() > 0
        close(layer.bone.grad, dense.bone.layers[name].bone.grad, 1e-4)
    with pytest.raises(UserError, match="q_proj is quantised: load the model in bf16 or fp32"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(ids).logits, expected)


@pytest.mark.parametrize("packing", ["8 bits", "for inference"])
def test_bat_col_refuses_layers_whose_weight_cannot_be_read_and_says_what_to_do(make_model, ids, packing):
    base, _ = packed_model(make_model, 8 if packing == "8 bits" else 4)
    if packing == "for inference":
        base.model.layers[1].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    before = dict(base.named_modules())
    with pytest.raises(UserError, match=r"layers\.[01]\.self_attn\.q_proj is a Linear.*bit.*mode 'bone'"):
        get_bone_model(base, BoneConfig(r=8, target_modules=["q_proj"], mode="bat-col"))
    assert dict(base.named_modules()) == before and not isinstance(base, BoneModel)


def test_any_module_with_linear_layers_takes_adapters(ids):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(22, 40), nn.ReLU(), nn.Linear(40, 6))
    model = fill(get_bone_model(copy.deepcopy(base), BoneConfig(r=4, target_modules=["0", "2"])))
    x = torch.randn(5, 22)
    expected = model(x)
    assert not torch.allclose(expected, base(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_checkpoint_without_the_frozen_base_loads_and_one_that_lacks_a_tensor_does_not(make_model):
    model = fill(get_bone_model(make_model("llama"), BoneConfig(r=8, target_modules=["q_proj"])))
    fresh = get_bone_model(make_model("llama"), BoneConfig(r=8, target_modules=["q_proj"]))
    adapter = {key: model.state_dict()[key] for key in model.adapter_keys()}
    fresh.load_state_dict(adapter)
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in adapter.items())
    del adapter["model.layers.1.self_attn.q_proj.bone"]
    with pytest.raises(UserError, match="missing model.layers.1.self_attn.q_proj.bone"):
        fresh.load_state_dict(adapter)
    with pytest.raises(RuntimeError, match="nonsense"):
        fresh.load_state_dict({"nonsense": torch.ones(1)})


def test_directories_that_do_not_fit_leave_the_model_as_it_was(make_model, ids, tmp_path):
    model = fill(get_bone_model(make_model("llama"), BoneConfig(r=8, target_modules=["down_proj"])))
    model.save_pretrained(tmp_path / "bone")
    other = make_model("qwen")  # whose channel mix is wider
    with pytest.raises(UserError, match=r"down_proj.bone is \[8, 32\]|q_proj"):
        narrow = make_model("llama", hidden_size=16)
        BoneModel.from_pretrained(narrow, tmp_path / "bone")
    assert not isinstance(narrow, BoneModel) and narrow(ids % 16).logits.isfinite().all()
    lora = peft.get_peft_model(other, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="is a LoRA: load it with peft"):
        BoneModel.from_pretrained(make_model("qwen"), tmp_path / "lora")
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        BoneModel.from_pretrained(make_model("llama"), tmp_path / "nowhere")
    with pytest.raises(UserError, match="takes the base model and the adapter's folder"):
        BoneModel.from_pretrained(str(tmp_path / "bone"), tmp_path / "bone")
    with pytest.raises(UserError, match="saved as safetensors only"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"r": 33, "target_modules": ["q_proj"]}, "33 is larger than the 32 inputs of model.layers.0.self_attn.q_proj"),
        ({"r": 5, "target_modules": ["q_proj"], "init_weights": "bat"}, "does not divide both sizes"),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no module; there are .*q_proj"),
        ({"target_modules": {"q_proj", "query"}}, "'query' matches no module"),
        ({"target_modules": r".*nothing"}, "matches no module"),
        ({"target_modules": ["self_attn"]}, "self_attn is a LlamaAttention: expected a linear layer"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leave no module to adapt"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "leave no module to adapt"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, "modules_to_save 'head' matches no module"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_changes_nothing(make_model, ids, options, message):
    base = make_model("llama")
    model = copy.deepcopy(base)
    with pytest.raises(UserError, match=message):
        get_bone_model(model, BoneConfig(**{"r": 8, **options}))
    assert type(model) is type(base) and list(model.state_dict()) == list(base.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"r": 0}, "r 0, expected a whole number of at least 1"),
        ({"init_weights": "mini"}, "a mini adapter can be loaded, not trained"),
        ({"mode": "bat"}, "'bat' has two meanings, bat-col is PEFT's"),
        ({"mode": "bone", "init_weights": "bat"}, "is mode bat-col"),
        ({"mode": "bat-row", "init_weights": False}, "exists for bone only"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"task_type": "CHAT"}, "task_type 'CHAT', expected one of SEQ_CLS"),
        ({"task_type": "SEQ_CLS"}, "has a new head, which must be trained"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "needs target_modules as a list"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BoneConfig(**options)


def test_other_objects_are_refused_by_name(make_model):
    with pytest.raises(UserError, match="expected a BoneConfig of rwkv_bone.hf, got peft"):
        get_bone_model(make_model(), peft.MissConfig(r=8))
    model = get_bone_model(make_model(), BoneConfig(r=8, task_type=TaskType.CAUSAL_LM))
    with pytest.raises(UserError, match="has an adapter already"):
        get_bone_model(model, BoneConfig(r=8))
    with pytest.raises(UserError, match="no target_modules, and none are built in for model_type None"):
        get_bone_model(nn.Sequential(nn.Linear(8, 8)), BoneConfig(r=8))
    with pytest.raises(UserError, match="reads its weight past it"):
        get_bone_model(nn.TransformerEncoderLayer(16, 2), BoneConfig(r=8, target_modules=["out_proj"]))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UserError, match="0 has no data here"):
        get_bone_model(empty, BoneConfig(r=8, target_modules=["0"]))
