"""Adapters of other projects: Alic-Li's single file with its manifest, PEFT's directories, files with a JSON beside."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import AdapterSettings, inject, load_adapter_file, read_adapter
from rwkv_bone.adapters.peft_format import lora_config, miss_config, write_peft
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.convert import ConvertConfig, convert
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from tests.conftest import random_model

IDS = torch.arange(12)[None]
R, ALPHA = 8, 12.0
MODULES = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("att.key", "ffn.key")]


class Bench:
    """A base and Alic-Li adapters for it, written as that trainer writes them, with values drawn here."""

    def __init__(self, folder: Path, base: Path):
        self.folder, self.base, self.weights = folder, base, checkpoints.read_state(base)
        generator = torch.Generator().manual_seed(3)
        self.d = {
            module: 0.1 * torch.randn(len(self.weights[f"{module}.weight"]), R, generator=generator).bfloat16()
            for module in MODULES
        }

    def manifest(self, **changes) -> dict:
        """What `miss.json` says; a change to None leaves a member out."""
        targets = [
            {
                "name": f"{module}.weight.D",
                "layer": int(module.split(".")[1]),
                "target": ".".join(module.split(".")[2:]) + ".weight",
                "in_features": self.weights[f"{module}.weight"].shape[1],
                "shape": list(tensor.shape),
            }
            for module, tensor in self.d.items()
        ]
        whole = {
            "format_version": 1,
            "method": "miss",
            "dtype": "bfloat16",
            "layout": "modulo_rank_zero_pad",
            "kind": "inference_adapter",
            "rank": R,
            "alpha": ALPHA,
            "scale": ALPHA / R,
            "base_fingerprint": hashlib.sha256(self.base.read_bytes()).hexdigest(),
            "targets": targets,
            **changes,
        }
        return {name: value for name, value in whole.items() if value is not None}

    def write(self, manifest: dict | None, state: dict | None = None, name="adapter-final.pth") -> Path:
        """One file of records under `archive/`, as the trainer writes it."""
        path = self.folder / name
        state = state or {f"{module}.weight.D": tensor for module, tensor in self.d.items()}
        torch.save(state, self.folder / "archive.pth")
        with zipfile.ZipFile(self.folder / "archive.pth") as plain, zipfile.ZipFile(path, "w") as archive:
            for record in plain.namelist():
                archive.writestr(record, plain.read(record))
            if manifest is not None:
                archive.writestr("archive/miss.json", json.dumps(manifest))
        return path

    def expected(self) -> torch.Tensor:
        """Logits of the base with every weight changed by the adapter's definition."""
        model = random_model()
        with torch.no_grad():
            for module, tensor in self.d.items():
                weight = model.get_parameter(f"{module}.weight")
                for k in range(weight.shape[1]):
                    weight[:, k] += ALPHA / R * tensor[:, k % R].float()
        return model(IDS)

    def read(self, path: Path, **options):
        return read_adapter(path, self.weights, base_file=self.base, **options)

    def merge(self, path: Path, **options) -> str:
        output = str(self.folder / "merged.pth")
        return "\n".join(merge_files(MergeConfig(str(self.base), str(path), output, overwrite=True, **options)))


@pytest.fixture
def bench(tmp_path, tiny_checkpoint):
    return Bench(tmp_path, tiny_checkpoint())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_alic_lis_file_says_its_alpha_and_goes_wherever_an_adapter_goes(bench, caplog):
    path = bench.write(bench.manifest())
    told = bench.merge(path)
    assert "bone with r 8" in told and "rank 8, alpha 12 by its miss.json" in told
    assert "base.pth is its base, by the SHA-256 of the file" in told and "could not be checked" not in told
    close(load_model(bench.folder / "merged.pth")(IDS), bench.expected())
    close(load_model(bench.base, adapter=path)(IDS), bench.expected())

    told = convert(ConvertConfig(str(path), str(bench.base), str(bench.folder / "ours.pth")))
    assert not [line for line in told if "could not be checked" in line]
    close(load_model(bench.base, adapter=bench.folder / "ours.pth")(IDS), bench.expected())

    model = random_model()
    injection = inject(model, settings=AdapterSettings("bone", R), targets=["att.key", "ffn.key"])
    load_adapter_file(model, path, injection, checkpoints.fingerprint(bench.weights), bench.base)
    close(model(IDS), bench.expected())
    assert not caplog.text


def test_alic_lis_manifest_may_lie_beside_as_in_its_older_packages(bench, caplog):
    path = bench.write(None, name="adapter.pth")
    with pytest.raises(UserError, match="alpha is not in it: give --lora_alpha"):
        bench.read(path)
    (bench.folder / "adapter.json").write_text(json.dumps(bench.manifest()))
    assert bench.read(path).base_checked
    close(load_model(bench.base, adapter=path)(IDS), bench.expected())
    assert not caplog.text
    (bench.folder / "adapter.json").write_text('{"alpha": 3}')
    with pytest.raises(UserError, match="alpha is not in it: give --lora_alpha"):
        bench.read(path)


def test_a_checkpoint_of_alic_lis_training_is_read_without_its_optimiser(bench):
    state = {}
    for module, tensor in bench.d.items():
        state[f"{module}.weight.D.master"] = tensor.float()
        for name in ("gradient", "adam_m", "adam_v"):
            state[f"{module}.weight.D.{name}"] = torch.ones(tensor.shape)
    state["initial_state"] = torch.zeros(64)
    path = bench.write(bench.manifest(tensor_source="master"), state, "training.pth")
    assert "the optimiser's state beside them is left out" in bench.merge(path)
    close(load_model(bench.folder / "merged.pth")(IDS), bench.expected())
    path = bench.write(
        bench.manifest(tensor_source="master"), {**state, "initial_state": torch.ones(64)}, "training.pth"
    )
    with pytest.raises(UserError, match="was trained on an initial state"):
        bench.read(path)


def test_another_base_than_the_one_it_names_is_said(bench, caplog):
    adapter = bench.read(bench.write(bench.manifest(base_fingerprint="0" * 64)))
    assert "was trained on a file with the SHA-256 0000" in caplog.text and "base.pth has" in caplog.text
    assert not adapter.base_checked
    caplog.clear()
    adapter = bench.read(bench.write(bench.manifest(base_fingerprint=None)))
    assert not adapter.base_checked and not caplog.text
    assert "base could not be checked" in bench.merge(bench.write(bench.manifest(base_fingerprint=None)))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"method": "dora"}, "says method 'dora'; only 'miss' is known"),
        ({"layout": "blocks"}, "says layout 'blocks'; only 'modulo_rank_zero_pad' is known"),
        ({"format_version": 2}, "says format_version 2; only 1 is known"),
        ({"rank": 16}, "says rank 16, its tensors have rank 8"),
        ({"alpha": None}, "expected three numbers"),
        ({"scale": 3.0}, "expected scale = alpha / rank"),
        ({"targets": []}, "blocks.0.att.key is only in its tensors or only in the targets"),
    ],
)
def test_a_manifest_that_means_something_else_is_refused(bench, changes, message):
    with pytest.raises(UserError, match=message):
        bench.read(bench.write(bench.manifest(**changes)))


def test_a_manifest_for_a_base_of_other_widths_is_refused(bench):
    manifest = bench.manifest()
    manifest["targets"][1]["in_features"] = 64
    with pytest.raises(UserError, match="on a blocks.0.ffn.key.weight of 64 inputs, the base has 32"):
        bench.read(bench.write(manifest))


def test_what_else_a_manifest_says_is_named_and_flags_must_agree(bench):
    path = bench.write(bench.manifest(future="x", notes=[1]))
    assert "also has future, notes: not read" in bench.merge(path)
    with pytest.raises(UserError, match="was trained with alpha 12, --lora_alpha says 16"):
        bench.merge(path, lora_alpha=16)
    with pytest.raises(UserError, match="is bone .*, --peft says bat"):
        bench.merge(path, peft="bat")
    with pytest.raises(UserError, match="have r 8, but r 4 was expected"):
        bench.merge(path, bone_r=4)


def test_a_peft_directory_merges_and_continues_as_it_is(bench):
    scaled = {f"{module}.bone": ALPHA / R * tensor.float().t() for module, tensor in bench.d.items()}
    write_peft(bench.folder / "peft", miss_config("bone", R, ["key"]), scaled)
    for path in (bench.folder / "peft", bench.folder / "peft" / "adapter_model.safetensors"):
        assert "adapter_config.json says so: peft_type MISS" in bench.merge(path)
        close(load_model(bench.folder / "merged.pth")(IDS), bench.expected())
    model = random_model()
    injection = inject(model, settings=AdapterSettings("bone", R), targets=["att.key", "ffn.key"])
    load_adapter_file(model, bench.folder / "peft", injection, checkpoints.fingerprint(bench.weights), bench.base)
    close(model(IDS), bench.expected())


def test_the_alpha_of_a_peft_directory_is_its_own(bench):
    module = "blocks.0.att.key"
    pair = {f"{module}.lora_A": torch.ones(4, 32), f"{module}.lora_B": torch.ones(32, 4)}
    write_peft(bench.folder / "peft", lora_config(4, 6.0, ["key"]), pair)
    assert bench.read(bench.folder / "peft").settings == AdapterSettings("lora", 4, 6.0)
    with pytest.raises(UserError, match="peft has alpha 6 .* --lora_alpha says 8"):
        bench.read(bench.folder / "peft", alpha=8)


def test_a_folder_that_is_no_adapter_gets_a_sentence(bench):
    with pytest.raises(UserError, match="holds no adapter_config.json.* name the file"):
        bench.merge(bench.folder)


def test_an_unrelated_json_beside_an_adapter_is_named_and_not_read(bench, caplog):
    path = bench.folder / "model.pth"
    torch.save({f"{module}.bone": tensor.float().t().contiguous() for module, tensor in bench.d.items()}, path)
    assert "it has no metadata" in bench.merge(path) and not caplog.text
    (bench.folder / "model.json").write_text('{"kind": "figures", "r": 64}')
    assert "it has no metadata" in bench.merge(path)
    assert "model.json is not the metadata of an adapter of this project: it is not read for model.pth" in caplog.text
