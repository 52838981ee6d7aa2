"""Adapters from every format of the field to every other: recognised with a reason, exact, or refused with a remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterSettings, apply_adapter, inject, read_adapter
from rwkv_bone.adapters.peft_format import hf_name
from rwkv_bone.config.flags import parse_section
from rwkv_bone.conversion.convert import ConvertConfig, convert, main
from rwkv_bone.errors import UserError, exit_status
from tests.conftest import adapter_state, clean_environment, random_model

peft = pytest.importorskip("peft")

REPOSITORY = Path(__file__).resolve().parents[2]
IDS = torch.arange(12)[None]
SIX = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


class Field:
    """A base checkpoint and adapters of the field for it, whose tensors are drawn here."""

    def __init__(self, folder: Path):
        self.folder, self.base = folder, folder / "base.pth"
        checkpoints.write_state(self.base, random_model().state_dict())
        self.weights = checkpoints.read_state(self.base)
        self.generator = torch.Generator().manual_seed(5)

    def draw(self, *shape) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def modules(self, names=SIX):
        """(module, out, in) of every adapted projection."""
        for layer in (0, 1):
            for name in names:
                module = f"blocks.{layer}.{name}"
                yield module, *self.weights[f"{module}.weight"].shape

    def save(self, state: dict, name: str = "field.pth") -> Path:
        torch.save(state, self.folder / name)
        return self.folder / name

    def convert(self, adapter, output: str, **options) -> str:
        config = ConvertConfig(
            adapter=str(adapter), base_model=str(self.base), output=str(self.folder / output), **options
        )
        return "\n".join(convert(config))

    def logits(self, output: str) -> torch.Tensor:
        """Of the base under an adapter file of ours."""
        model = random_model()
        apply_adapter(model, read_adapter(self.folder / output, self.weights))
        return model(IDS)

    def changed(self, delta) -> torch.Tensor:
        """Logits of the base whose weights are W + delta(module, W)."""
        model = random_model()
        with torch.no_grad():
            for module, _, _ in self.modules():
                weight = model.get_parameter(f"{module}.weight")
                weight.add_(delta(module, weight.clone()))
        return model(IDS)


@pytest.fixture
def field(tmp_path):
    return Field(tmp_path)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def tiled(bone, columns):
    """[out, in] whose column j is bone[j mod r]."""
    return torch.stack([bone[j % len(bone)] for j in range(columns)], dim=1)


def bat_delta(blocks, weight, along):
    """W_ab D + D of every r x r block, D by the block's row (out) or column (in)."""
    r, delta = blocks.shape[1], torch.zeros_like(weight)
    for a in range(0, weight.shape[0], r):
        for b in range(0, weight.shape[1], r):
            d = blocks[(a if along == "out" else b) // r]
            delta[a : a + r, b : b + r] = weight[a : a + r, b : b + r] @ d + d
    return delta


@pytest.mark.parametrize("suffix", ["bone", "disha"])
def test_rwkv_pefts_bone_becomes_ours(field, suffix):
    bones = {module: field.draw(8, rows) for module, rows, _ in field.modules()}
    told = field.convert(field.save({f"{module}.{suffix}": bone for module, bone in bones.items()}), "ours.pth")
    assert "bone with r 8; att.receptance, att.key" in told
    assert "by its names and shapes: blocks.0.ffn.key.bone is [8, 128] for a weight of [128, 32]" in told
    assert "that this is the one could not be checked" in told
    close(field.logits("ours.pth"), field.changed(lambda m, w: tiled(bones[m], w.shape[1])))
    metadata = checkpoints.read_metadata(field.folder / "ours.pth")
    assert metadata["base"] == checkpoints.fingerprint(field.weights) and metadata["quant"] == "none"


@pytest.mark.parametrize("form", ["row", "column", "flat"])
def test_the_three_encodings_of_bat_are_told_apart_by_a_layer_that_is_not_square(field, form):
    side = "in" if form == "row" else "out"
    bats = {m: field.draw((columns if side == "in" else rows) // 8, 8, 8) for m, rows, columns in field.modules()}
    stored = {f"{m}.bone": bat.reshape(-1, 8) if form == "flat" else bat for m, bat in bats.items()}
    told = field.convert(field.save(stored), "ours.pth")
    assert ("bat with r 8" if side == "in" else "bat-col with r 8") in told
    close(field.logits("ours.pth"), field.changed(lambda m, w: bat_delta(bats[m], w, side)))


def test_square_layers_alone_are_read_by_rows_with_a_warning_or_as_told(field):
    square = SIX[:4]
    bats = {f"{m}.bone": field.draw(4, 8, 8) for m, _, _ in field.modules(square)}
    told = field.convert(field.save(bats), "row.pth")
    assert "bat with r 8" in told and "all weights are square" in told and "--peft bat-col" in told
    told = field.convert(field.save(bats), "column.pth", peft="bat-col")
    assert "bat-col with r 8" in told and "--peft bat-col says so" in told
    assert (field.logits("row.pth") - field.logits("column.pth")).norm() > 0.01
    squares = {f"{m}.bone": field.draw(32, 32) for m, _, _ in field.modules(square)}
    with pytest.raises(UserError, match="look the same: say --peft bone or --peft bat-flat"):
        field.convert(field.save(squares), "no.pth")
    assert "bone with r 32" in field.convert(field.save(squares), "bone.pth", peft="bone")


def test_lora_needs_its_alpha_and_pissa_its_first_factors(field):
    pairs = {m: (field.draw(4, columns), field.draw(rows, 4)) for m, rows, columns in field.modules()}
    first = {m: (field.draw(4, columns), field.draw(rows, 4)) for m, rows, columns in field.modules()}
    state = {f"{m}.lora_{x}": pair["AB".index(x)] for m, pair in pairs.items() for x in "AB"}
    with pytest.raises(UserError, match="give --lora_alpha"):
        field.convert(field.save(state), "no.pth")
    field.convert(field.save(state), "lora.pth", lora_alpha=8)
    close(field.logits("lora.pth"), field.changed(lambda m, w: 2 * pairs[m][1] @ pairs[m][0]))

    init = field.save({f"model.{m}.init_lora_{x}": first[m]["AB".index(x)] for m in first for x in "AB"}, "init.pth")
    told = field.convert(field.save(state), "pissa.pth", peft="pissa", pissa_init=str(init))
    assert "pissa with r 4" in told
    expected = field.changed(lambda m, w: pairs[m][1] @ pairs[m][0] - first[m][1] @ first[m][0])
    close(field.logits("pissa.pth"), expected)
    told = field.convert(field.folder / "pissa.pth", "lora8.pth", to="lora")
    assert "rank 8, scale 1" in told
    close(field.logits("lora8.pth"), expected)
    assert all("init" not in key for key in checkpoints.read_state(field.folder / "lora8.pth"))


def test_an_initial_state_passes_through_and_cannot_become_a_directory(field):
    states = {f"blocks.{layer}.att.time_state": field.draw(2, 16, 16) for layer in (0, 1)}
    assert "it holds nothing but time_state" in field.convert(field.save(states), "state.pth")
    model = random_model()
    model.add_time_state()
    with torch.no_grad():
        for key, tensor in states.items():
            model.get_parameter(key).copy_(tensor)
    close(field.logits("state.pth"), model(IDS))
    with pytest.raises(UserError, match="an initial state is not an adapter of linear layers. Otherwise merge it"):
        field.convert(field.folder / "state.pth", "folder")


def test_alic_lis_adapters_are_transposed_and_scaled_by_the_alpha_that_must_be_given(field):
    blocks = {m: field.draw(rows, 8) for m, rows, _ in field.modules()}
    path = field.save({f"{m}.weight.D": block for m, block in blocks.items()})
    with pytest.raises(UserError, match="alpha is not in it: give --lora_alpha"):
        field.convert(path, "no.pth")
    assert "multiplied by alpha / r = 2" in field.convert(path, "ours.pth", lora_alpha=16)
    close(field.logits("ours.pth"), field.changed(lambda m, w: 2 * tiled(blocks[m].t(), w.shape[1])))
    strange = field.save({**checkpoints.read_state(path), "blocks.0.att.key.weight.E": torch.ones(3)}, "strange.pth")
    with pytest.raises(UserError, match="holds blocks.0.att.key.weight.E beside"):
        field.convert(strange, "no.pth", lora_alpha=16)


def native(field, kind, r=8, train_parts=(), **settings) -> Path:
    """A trained adapter of ours."""
    model = random_model()
    injection = inject(model, settings=AdapterSettings(kind, r, **settings), train_parts=train_parts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(field.draw(*parameter.shape))
    about = {"base": checkpoints.fingerprint(field.weights), "architecture": {}, "quant": "none", "step": 7}
    path = field.folder / f"{kind}.pth"
    checkpoints.write_state(path, adapter_state(model), about | injection.metadata())
    return path


@pytest.mark.parametrize(
    "kind,to,settings",
    [
        ("bone", "miss", {}),
        ("bat-col", "miss", {}),
        ("bone", "lora", {}),
        ("lora", "auto", {"alpha": 4.0}),
        ("pissa", "lora", {"alpha": 4.0}),
        ("pissa", "lora", {"alpha": 4.0, "rslora": True}),
    ],
)
def test_peft_loads_what_is_written_and_computes_the_same(field, kind, to, settings):
    path = native(field, kind, **settings)
    told = field.convert(path, "directory", to=to, names="rwkv")
    assert "its metadata says so" in told
    theirs = peft.PeftModel.from_pretrained(random_model(), field.folder / "directory")
    expected = field.logits(path.name)
    close(theirs.base_model.model(IDS), expected)
    assert (expected - random_model()(IDS)).norm() > 0.05 * expected.norm()
    field.convert(field.folder / "directory", "back.pth")
    close(field.logits("back.pth"), expected)


class Named(nn.Module):
    """Linear layers under the names that Hugging Face models of RWKV have."""

    def __init__(self, field):
        super().__init__()
        for module, rows, columns in field.modules():
            place = self
            *path, last = hf_name(module).split(".")
            for name in path:
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = getattr(place, name)
            linear = nn.Linear(columns, rows, bias=False)
            linear.weight.data.copy_(field.weights[f"{module}.weight"])
            place.add_module(last, linear)

    def prepare_inputs_for_generation(self):
        """PEFT asks a causal language model for it."""


@pytest.mark.parametrize("init_weights", [True, "bat", "mini"])
def test_directories_in_hugging_face_naming_go_in_and_out(field, init_weights):
    targets = ["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value"]
    config = peft.MissConfig(r=8, target_modules=targets, init_weights=init_weights, mini_r=4)
    theirs = peft.get_peft_model(Named(field), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "miss_block" in name:
                parameter.add_(field.draw(*parameter.shape))
    theirs.save_pretrained(field.folder / "theirs")
    told = field.convert(field.folder / "theirs", "ours.pth")
    assert f"peft_type MISS, init_weights {init_weights!r}" in told
    field.convert(field.folder / "ours.pth", "again")
    again = peft.PeftModel.from_pretrained(Named(field), field.folder / "again").merge_and_unload().state_dict()
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == again.keys() and all(torch.equal(merged[key], again[key]) for key in merged)
    close(field.logits("ours.pth"), field.changed(lambda m, w: merged[f"{hf_name(m)}.weight"] - w))


@pytest.mark.parametrize(
    "kind,to,reason",
    [
        ("bat", "miss", "its blocks follow the inputs, for which PEFT has no form"),
        ("bat", "lora", "full rank"),
        ("bat-col", "lora", "full rank; --to miss is exact"),
        ("lora", "miss", "it is no MiSS; --to lora is exact"),
    ],
)
def test_what_has_no_exact_form_is_refused_with_the_way_out(field, kind, to, reason):
    with pytest.raises(UserError, match=f"{reason}.*merge it"):
        field.convert(native(field, kind), "directory", to=to)
    assert not (field.folder / "directory").exists()


def test_tensors_trained_whole_have_no_place_in_a_directory(field):
    path = native(field, "bone", train_parts=["ln"])
    with pytest.raises(UserError, match="tensors that were trained whole, such as .*ln"):
        field.convert(path, "directory")
    told = field.convert(path, "lora.pth", to="lora")
    assert "rank 8, scale 1" in told
    close(field.logits("lora.pth"), field.logits("bone.pth"))


def test_outputs_are_kept_and_named_for_what_they_are(field):
    path = native(field, "bone")
    field.convert(path, "directory")
    with pytest.raises(UserError, match="exists and is kept"):
        field.convert(path, "directory")
    field.convert(path, "directory", overwrite=True)
    with pytest.raises(UserError, match="exists and is kept"):
        field.convert(path, "bone.pth")
    with pytest.raises(UserError, match="--to native writes a file"):
        field.convert(path, "folder", to="native")
    with pytest.raises(UserError, match="--to miss writes a directory: leave out .pth"):
        field.convert(path, "file.pth", to="miss")


def test_adapters_of_other_bases_and_flags_that_contradict_are_refused(field):
    path = native(field, "bone")
    field.convert(path, "directory")
    with pytest.raises(UserError, match=r"is bone \(adapter_config.json says so.*, --peft says bat-col"):
        field.convert(field.folder / "directory", "no.pth", peft="bat-col")
    with pytest.raises(UserError, match="the flags say bat with r 8"):
        field.convert(path, "no.pth", peft="bat")
    checkpoints.write_state(field.folder / "small.pth", random_model(n_layer=1).state_dict())
    field.base, field.weights = field.folder / "small.pth", checkpoints.read_state(field.folder / "small.pth")
    with pytest.raises(UserError, match="another base"):
        field.convert(path, "no.pth")
    with pytest.raises(UserError, match="adapts blocks.1.att.receptance, which .*small.pth does not have"):
        field.convert(field.folder / "directory", "no.pth")


def test_an_adapter_trained_on_a_quantised_base_says_so(field):
    path = native(field, "bone")
    state, metadata = checkpoints.read_state(path), checkpoints.read_metadata(path) | {"quant": "nf4"}
    checkpoints.write_state(field.folder / "quantised.pth", state, metadata)
    assert "trained on this base in nf4" in field.convert(field.folder / "quantised.pth", "directory")


@pytest.mark.parametrize(
    "words,message",
    [
        ("", "--base_model is missing"),
        ("--adapter a --base_model b --output c --to gguf", "--to gguf: expected one of auto, native, miss, lora"),
        ("--adapter a --base_model b --output c --bone_mode x", "--bone_mode is not a flag of python -m"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_section("python -m rwkv_bone.conversion.convert", "", ConvertConfig, words.split())


def test_the_script_prints_what_it_did_and_fails_with_a_sentence(field, capsys, monkeypatch):
    words = ["--base_model", field.base, "--adapter", native(field, "bone"), "--output", field.folder / "directory"]
    environment = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = ["sh", REPOSITORY / "scripts" / "convert.sh", *words]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"output    {field.folder}/directory"
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    assert exit_status(main) == 2
    assert re.fullmatch(r"error: .* exists and is kept.*\n", capsys.readouterr().err)
