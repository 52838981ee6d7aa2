"""Adapter files: ours with metadata, the field's without, and those that do not belong."""

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import (
    ADAPTERS,
    AdapterSettings,
    apply_adapter,
    infer_adapter,
    inject,
    load_adapter_file,
    read_adapter,
)
from rwkv_bone.errors import UserError
from rwkv_bone.quantization import QuantLinear, quantize
from tests.conftest import adapter_state, random_model

SHAPES = {
    **{f"blocks.{layer}.att.{name}.weight": (32, 32) for layer in (0, 1) for name in ("key", "value")},
    **{f"blocks.{layer}.ffn.key.weight": (128, 32) for layer in (0, 1)},
    **{f"blocks.{layer}.ffn.value.weight": (32, 128) for layer in (0, 1)},
    "blocks.0.ln1.weight": (32,),
    "head.weight": (61, 32),
}


def bones(*modules, r=8, form="bone"):
    """Adapter tensors for these modules: bone [r, out], row [in/r, r, r], column [out/r, r, r] or flat [out, r]."""
    shapes = {
        "bone": lambda rows, columns: (r, rows),
        "row": lambda rows, columns: (columns // r, r, r),
        "column": lambda rows, columns: (rows // r, r, r),
        "flat": lambda rows, columns: (rows, r),
    }
    return {f"{module}.bone": torch.ones(shapes[form](*SHAPES[f"{module}.weight"])) for module in modules}


def low_rank(*modules, r=4, names=("lora_A", "lora_B")):
    """LoRA's tensors for these modules, A [r, in] and B [out, r]."""
    state = {}
    for module in modules:
        rows, columns = SHAPES[f"{module}.weight"]
        state |= {f"{module}.{name}": torch.ones((r, columns) if name.endswith("A") else (rows, r)) for name in names}
    return state


ALL_FOUR = ("lora_A", "lora_B", "init_lora_A", "init_lora_B")


EVERY_KEY = ("blocks.0.att.key", "blocks.1.att.key")
EVERY_FFN = ("blocks.0.ffn.key", "blocks.1.ffn.key", "blocks.0.ffn.value", "blocks.1.ffn.value")


def test_kind_and_r_are_read_from_the_shapes():
    assert infer_adapter(bones(*EVERY_KEY), SHAPES) == ("bone", 8, ["att.key"], [])
    assert infer_adapter(bones(*EVERY_FFN), SHAPES) == ("bone", 8, ["ffn.key", "ffn.value"], [])
    assert infer_adapter(bones(*EVERY_FFN, form="row"), SHAPES) == ("bat", 8, ["ffn.key", "ffn.value"], [])
    # On square weights alone the tensor could be PEFT's too; a .pth of the field holds RWKV-PEFT's. One projection of
    # the file that is not square decides for all.
    assert infer_adapter(bones(*EVERY_KEY, form="row"), SHAPES)[:2] == ("bat", 8)
    assert infer_adapter(bones(*EVERY_KEY, form="row"), SHAPES, kind="bat-col")[:2] == ("bat-col", 8)
    assert infer_adapter(bones(*EVERY_KEY, *EVERY_FFN, form="column"), SHAPES)[:2] == ("bat-col", 8)
    assert infer_adapter(bones(*EVERY_KEY, form="flat"), SHAPES)[:2] == ("bat-flat", 8)
    assert infer_adapter(bones(*EVERY_KEY, *EVERY_FFN, r=32, form="flat"), SHAPES)[:2] == ("bat-flat", 32)
    assert infer_adapter(bones(*EVERY_KEY, *EVERY_FFN, r=32), SHAPES)[:2] == ("bone", 32)
    assert infer_adapter(low_rank(*EVERY_FFN), SHAPES) == ("lora", 4, ["ffn.key", "ffn.value"], [])
    assert infer_adapter(low_rank(*EVERY_FFN, names=ALL_FOUR), SHAPES)[:2] == ("pissa", 4)
    # r need not divide the inputs.
    assert infer_adapter(bones(*EVERY_KEY, r=20), SHAPES)[:2] == ("bone", 20)


def test_an_adapter_of_some_layers_names_them_one_by_one():
    kind, r, targets, extra = infer_adapter(
        bones("blocks.1.att.key", "blocks.0.att.value", "blocks.1.att.value") | {"blocks.0.ln1.weight": torch.ones(32)},
        SHAPES,
    )
    assert (targets, extra) == (["blocks.1.att.key", "att.value"], ["blocks.0.ln1.weight"])


@pytest.mark.parametrize(
    "state,arguments,message",
    [
        (bones(*EVERY_FFN, form="column"), {"kind": "bat"}, r"ffn.key.bone is \[16, 8, 8\], expected \[4, 8, 8\]"),
        (
            bones("blocks.0.ffn.key", form="column") | bones("blocks.1.ffn.key", form="row"),
            {},
            r"1.ffn.key.bone is \[4, 8, 8\], expected \[16, 8, 8\] as bat-col",
        ),
        (bones(*EVERY_KEY, r=32), {}, "look the same: say --peft bone or --peft bat-flat"),
        (bones(*EVERY_KEY) | bones("blocks.0.att.value", form="row"), {}, r"\[2, 3\] dimensions"),
        (bones(*EVERY_KEY) | bones("blocks.0.att.value", r=4), {}, r"att.value.bone is \[4, 32\], expected \[8, 32\]"),
        (bones(*EVERY_KEY), {"kind": "bat"}, "shapes of bone, but bat was expected"),
        (bones(*EVERY_KEY), {"r": 16}, "tensors have r 8, but r 16 was expected"),
        (bones(*EVERY_KEY) | {"blocks.0.att.key.lora_C": torch.ones(8, 32)}, {}, "lora_C is neither"),
        (bones(*EVERY_KEY) | low_rank("blocks.0.att.value"), {}, r"\(bone\) and \(lora_A, lora_B\): expected bone"),
        (low_rank(*EVERY_KEY, names=("lora_A",)), {}, r"\(lora_A\): expected bone alone"),
        (low_rank(*EVERY_KEY), {"kind": "pissa"}, "needs its initial factors: give --pissa_init"),
        (low_rank(*EVERY_KEY), {"kind": "bone"}, "shapes of lora, but bone was expected"),
        (low_rank(*EVERY_KEY) | low_rank("blocks.0.att.value", r=3), {}, r"lora_A is \[3, 32\], expected \[4, 32\]"),
        (low_rank(*EVERY_KEY, r=40, names=ALL_FOUR), {}, "--lora_r 40: the weight of blocks.0.att.key"),
        (
            bones(*EVERY_KEY) | {"blocks.0.ln1.weight": torch.ones(31)},
            {},
            r"ln1.weight is \[31\], for the base it would be \[32\]",
        ),
        (bones(*EVERY_KEY) | {"blocks.0.att.key.weight": torch.ones(32, 32)}, {}, "both whole and with an adapter"),
        ({"blocks.9.att.key.bone": torch.ones(8, 32)}, {}, "blocks.9.att.key.weight, which the base does not have"),
        ({"blocks.0.ln1.bone": torch.ones(8, 32)}, {}, "blocks.0.ln1.weight, which the base does not have"),
        ({"blocks.0.ln1.weight": torch.ones(32)}, {}, "or <module>.lora_A: not an adapter"),
        ({"blocks.0.att.key.bone": torch.ones(64, 32)}, {}, "--bone_r 64 is larger than the 32 inputs"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_with_its_name(state, arguments, message):
    with pytest.raises(UserError, match=message):
        infer_adapter(state, SHAPES, **arguments)


def test_a_square_bone_is_taken_when_its_kind_is_given():
    assert infer_adapter(bones(*EVERY_KEY, r=32), SHAPES, kind="bone")[:2] == ("bone", 32)


@pytest.fixture
def trained(tiny_checkpoint, tmp_path):
    """Factory: (base path, adapter path, model) of a random adapter with metadata as training writes it."""

    def make(kind="bone", r=8, dtype=torch.float32, train_parts=(), metadata=(), **settings):
        path = tiny_checkpoint(dtype=dtype)
        model = checkpoints.load_base(path)
        arch, base = model.arch, model.state
        model = random_model(dtype=dtype)
        injection = inject(model, settings=AdapterSettings(kind, r, **settings), train_parts=train_parts)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        about = {
            "base": checkpoints.fingerprint(base),
            "architecture": arch.to_dict(),
            **injection.metadata(),
            **dict(metadata),
        }
        checkpoints.write_state(tmp_path / "rwkv-0.pth", adapter_state(model), about)
        return path, tmp_path / "rwkv-0.pth", model

    return make


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_file_applied_to_its_base_gives_the_trained_model(trained, kind):
    path, adapter, model = trained(kind, train_parts=["ln", "time"], alpha=4.0, rslora=True)
    fresh = random_model()
    found = read_adapter(adapter, checkpoints.read_state(path))
    apply_adapter(fresh, found)
    assert found.settings == AdapterSettings(kind, 8, alpha=4.0, rslora=True)
    assert len(found.targets) == 6 and "ln_out.weight" in found.extra
    ids = torch.arange(12)[None]
    assert torch.equal(fresh(ids), model(ids))


@pytest.mark.parametrize("suffix", ["bone", "disha"])
def test_the_fields_adapters_need_no_metadata(trained, tmp_path, suffix):
    path, adapter, model = trained("bat")
    state = checkpoints.read_state(adapter)
    torch.save(
        {key.replace(".bone", f".{suffix}"): tensor.bfloat16() for key, tensor in state.items()}, tmp_path / "f.pth"
    )
    found = read_adapter(tmp_path / "f.pth", checkpoints.read_state(path))
    assert (found.settings, found.metadata) == (AdapterSettings("bat", 8), None)
    assert found.state.keys() == state.keys()


def test_an_adapter_of_another_base_is_refused(trained, tiny_checkpoint):
    _, adapter, _ = trained()
    other = checkpoints.read_state(tiny_checkpoint("other.pth", seed=1))
    with pytest.raises(UserError, match="another base, with the same sizes and other weights"):
        read_adapter(adapter, other)
    larger = checkpoints.read_state(tiny_checkpoint("larger.pth", n_layer=3))
    with pytest.raises(UserError, match="another base, with n_layer 2 against 3"):
        read_adapter(adapter, larger)


@pytest.mark.parametrize(
    "changes,arguments,message",
    [
        ({}, {"kind": "bat"}, "is bone with r 8, the flags say bat with r 8"),
        ({}, {"r": 4}, "is bone with r 8, the flags say bone with r 4"),
        ({}, {"alpha": 4}, "is bone with r 8, alpha 8, the flags say bone with r 8, alpha 4"),
        ({"kind": "bat"}, {}, "shapes of bone, but bat was expected"),
        ({"r": 16}, {}, "tensors have r 8, but r 16 was expected"),
        ({"kind": "dora"}, {}, "kind 'dora' .* unknown to this version"),
        ({"kind": "lora"}, {}, "kind 'lora' with blocks 'in' is unknown"),
        ({"kind": "bat", "blocks": "out"}, {}, "blocks 'out' is unknown to this version"),
    ],
)
def test_contradictions_between_flags_metadata_and_tensors_are_refused(trained, changes, arguments, message):
    path, adapter, _ = trained(metadata=changes)
    with pytest.raises(UserError, match=message):
        read_adapter(adapter, checkpoints.read_state(path), **arguments)


def test_a_diverged_adapter_is_refused(trained, tmp_path):
    path, adapter, _ = trained()
    state = {key: tensor.clone() for key, tensor in checkpoints.read_state(adapter).items()}
    state["blocks.1.ffn.key.bone"][3, 3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="blocks.1.ffn.key.bone holds NaN"):
        read_adapter(tmp_path / "nan.pth", checkpoints.read_state(path))


def test_the_flat_form_of_2024_becomes_blocks_by_columns(trained, tmp_path):
    path, adapter, _ = trained("bat-col")
    state = checkpoints.read_state(adapter)
    flat = {key: tensor.reshape(-1, 8) for key, tensor in state.items()}
    torch.save(flat, tmp_path / "flat.pth")
    found = read_adapter(tmp_path / "flat.pth", checkpoints.read_state(path))
    assert found.settings == AdapterSettings("bat-col", 8)
    assert all(torch.equal(found.state[key], tensor) for key, tensor in state.items())


def test_a_lora_of_the_field_needs_its_alpha(trained, tmp_path):
    path, adapter, model = trained("lora", alpha=4.0)
    torch.save(checkpoints.read_state(adapter), tmp_path / "f.pth")
    base = checkpoints.read_state(path)
    with pytest.raises(UserError, match="f.pth: its alpha.*is not in the file: give --lora_alpha"):
        read_adapter(tmp_path / "f.pth", base)
    assert read_adapter(tmp_path / "f.pth", base, alpha=4).settings == AdapterSettings("lora", 8, alpha=4)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_pissa_of_the_field_is_read_with_its_initial_factors(trained, tmp_path, prefix):
    path, adapter, model = trained("pissa")
    state, base = checkpoints.read_state(adapter), checkpoints.read_state(path)
    init = {f"{prefix}{key}": tensor for key, tensor in state.items() if ".init_" in key}
    torch.save({key: tensor for key, tensor in state.items() if ".init_" not in key}, tmp_path / "f.pth")
    torch.save(init, tmp_path / "init_pissa.pth")
    found = read_adapter(tmp_path / "f.pth", base, pissa_init=tmp_path / "init_pissa.pth")
    assert found.settings == AdapterSettings("pissa", 8)  # whose scale is 1, as in RWKV-PEFT
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[key], tensor) for key, tensor in state.items())
    init.pop(f"{prefix}blocks.1.att.key.init_lora_B")
    torch.save(init, tmp_path / "half.pth")
    with pytest.raises(UserError, match="--pissa_init .*half.pth .*missing blocks.1.att.key.init_lora_B"):
        read_adapter(tmp_path / "f.pth", base, pissa_init=tmp_path / "half.pth")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_training_continues_from_an_adapter_of_the_same_kind(trained, kind):
    path, adapter, model = trained(kind, train_parts=["ln"])
    fingerprint = checkpoints.fingerprint(checkpoints.read_state(path))
    # Another seed: PiSSA must go on from the initial factors in the file, not from those it finds itself.
    fresh = random_model()
    generator = torch.Generator().manual_seed(5)
    injection = inject(fresh, settings=AdapterSettings(kind, 8), train_parts=["ln"], generator=generator)
    load_adapter_file(fresh, adapter, injection, base=fingerprint)
    ids = torch.arange(12)[None]
    assert torch.equal(fresh(ids), model(ids))


def test_training_continues_on_a_quantised_base(trained):
    path, adapter, model = trained("pissa")
    fingerprint = checkpoints.fingerprint(checkpoints.read_state(path))
    fresh = random_model()
    for name in [name for name, module in fresh.named_modules() if name.endswith(("key", "value"))]:
        fresh.set_submodule(name, QuantLinear(quantize(fresh.get_submodule(name).weight, "int8")))
    injection = inject(fresh, settings=AdapterSettings("pissa", 8))
    load_adapter_file(fresh, adapter, injection, base=fingerprint)
    assert torch.equal(fresh.blocks[1].ffn.value.lora_A, model.blocks[1].ffn.value.lora_A)


def test_training_continues_with_the_same_settings_only(trained):
    path, adapter, _ = trained("bone", train_parts=["ln"])
    fingerprint = checkpoints.fingerprint(checkpoints.read_state(path))
    for kind, r, parts, message in (
        ("bat", 8, ["ln"], "is bone with r 8, the flags say bat with r 8"),
        ("bone", 4, ["ln"], "is bone with r 8, the flags say bone with r 4"),
        ("bone", 8, [], "unexpected blocks.0.ln0.weight"),
        ("bone", 8, ["ln", "emb"], "missing emb.weight"),
    ):
        fresh = random_model()
        injection = inject(fresh, settings=AdapterSettings(kind, r), train_parts=parts)
        with pytest.raises(UserError, match=message):
            load_adapter_file(fresh, adapter, injection, base=fingerprint)
    with pytest.raises(UserError, match="another base"):
        load_adapter_file(fresh, adapter, injection, base="0" * 32)


def test_training_continues_with_the_same_scale_only(trained):
    path, adapter, _ = trained("lora", alpha=4.0)
    fingerprint = checkpoints.fingerprint(checkpoints.read_state(path))
    for settings, message in (
        (AdapterSettings("lora", 8), "is lora with r 8, alpha 4, the flags say lora with r 8, alpha 8"),
        (AdapterSettings("lora", 8, alpha=4, rslora=True), "lora with r 8, scale 0.5, the flags say .* scale 1.41421"),
    ):
        fresh = random_model()
        injection = inject(fresh, settings=settings)
        with pytest.raises(UserError, match=message):
            load_adapter_file(fresh, adapter, injection, base=fingerprint)
