"""A merge gives a plain checkpoint that behaves as base + adapter, or gives nothing and says why."""

import re
import subprocess
import sys
import weakref
import zipfile

import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, BoneLinear, inject, read_adapter
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion import merge as merging
from rwkv_bone.conversion import output, verify
from rwkv_bone.conversion.fold import Fold
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from rwkv_bone.models import load_base_into
from rwkv_bone.quantization import as_trained
from tests.conftest import REPOSITORY, adapter_state, random_model
from tests.rwkv_oracle import logits as oracle_logits

QUANTISED = [("nf4", ".pth"), ("int8", ".pth")]
IDS = torch.arange(3, 27)[None]


@pytest.fixture
def files(tiny_checkpoint, tmp_path):
    """Factory: (base, adapter, output) paths, with a random adapter as training writes it."""

    def make(
        kind="bone",
        r=8,
        dtype=torch.float32,
        train_parts=(),
        targets=None,
        metadata=True,
        std=0.05,
        quant="none",
        **settings,
    ):
        path = tiny_checkpoint(dtype=dtype)
        model = checkpoints.load_base(path)
        arch, base = model.arch, model.state
        model = random_model(dtype=dtype)
        load_base_into(model, base, dtype, quant=quant)
        settings = AdapterSettings(kind, r, **settings)
        injection = inject(model, settings=settings, train_parts=train_parts, targets=targets)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(std * torch.randn_like(parameter))
        about = {
            "base": checkpoints.fingerprint(base),
            "architecture": arch.to_dict(),
            "step": 7,
            "quant": quant,
            **injection.metadata(),
        }
        checkpoints.write_state(tmp_path / "rwkv-0.pth", adapter_state(model), about if metadata else None)
        return path, tmp_path / "rwkv-0.pth", tmp_path / "merged.pth"

    return make


def config(paths, **changes):
    base, adapter, output = map(str, paths)
    return MergeConfig(**{"base_model": base, "peft_checkpoint": adapter, "output": output, **changes})


def merged(paths, kind="bone", **options):
    """The tensors of a merge, in memory."""
    base, adapter = map(checkpoints.read_state, paths[:2])
    fold = Fold(base, adapter, AdapterSettings(kind, 8), **options)
    return {key: fold.tensor(key) for key in fold.shapes}


def left_behind(paths):
    return {path.name for path in paths[2].parent.iterdir()} - {path.name for path in paths[:2]} - {"rwkv-0.json"}


def logits(*arguments, **options):
    with torch.no_grad():
        return load_model(*arguments, op="torch", **options)(IDS).float()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("quant,suffix", [("none", ".pth"), ("none", ".safetensors"), *QUANTISED])
def test_merged_model_matches_adapted_model(files, kind, dtype, tolerance, quant, suffix):
    # Of the quantised base not every projection has an adapter; what the others have become stays too.
    targets = None if quant == "none" else ["att", "ffn.key"]
    paths = files(kind, dtype=dtype, train_parts=["ln", "time"], targets=targets, quant=quant, alpha=16.0, std=0.06)
    output = paths[2].with_suffix(suffix)
    report = "\n".join(merge_files(config(paths, output=str(output))))
    base, live, alone = logits(paths[0]), logits(*paths[:2]), logits(output)
    assert (live - base).abs().max() > 0.3
    assert (alone - live).abs().max() < tolerance
    for words in (
        f"{kind} with r 8",
        "step 7",
        "12 weights" if quant == "none" else f"trained on {quant}",
        "att.key",
        "differ from base + adapter by",
        f"{output.stat().st_size:,} bytes",
    ):
        assert words in report


def test_the_rwkv_package_runs_the_merged_file(files):
    paths = files("bat", train_parts=["ln"])
    merge_files(config(paths))
    live = logits(*paths[:2])[0].numpy()
    assert abs(oracle_logits(paths[2], IDS[0].tolist()) - live).max() < 1e-3


def test_a_trained_state_of_a_bf16_base_goes_into_safetensors_too(files):
    # Wide dtypes come first in that format, so the fp32 states stand before the base's tensors.
    paths = files("state", r=0, dtype=torch.bfloat16)
    paths = (*paths[:2], paths[2].with_suffix(".safetensors"))
    merge_files(config(paths))
    found, adapter = checkpoints.read_state(paths[2]), checkpoints.read_state(paths[1])
    assert len(adapter) == 2 and all(torch.equal(found[key], tensor) for key, tensor in adapter.items())
    torch.testing.assert_close(logits(paths[2]), logits(*paths[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_output_has_the_keys_order_shapes_and_dtypes_of_the_base(files, suffix):
    paths = files("bone", targets=["att.key"], train_parts=["emb"])
    # Some tensors of another width, an odd number of values among them, so that what follows must be realigned.
    base = {
        key: tensor.bfloat16() if ".ffn." in key or "w1" in key else tensor
        for key, tensor in checkpoints.read_state(paths[0]).items()
    }
    base["blocks.0.att.k_a"] = base["blocks.0.att.k_a"][..., :31].bfloat16()
    adapter = checkpoints.read_state(paths[1])
    output = paths[2].with_suffix(suffix)
    fold = Fold(base, adapter, AdapterSettings("bone", 8))
    write_tensors(output, base, ((key, fold.tensor(key)) for key in fold.shapes))
    written = checkpoints.read_state(output)
    if suffix == ".pth":
        assert list(written) == list(base)
        assert zipfile.ZipFile(output).testzip() is None
        assert all(tensor.data_ptr() % 64 == 0 for tensor in written.values())
        assert torch.load(output, weights_only=True).keys() == base.keys()
    assert written.keys() == base.keys()
    for key, tensor in base.items():
        assert (written[key].shape, written[key].dtype) == (tensor.shape, tensor.dtype)
        changed = key.endswith("att.key.weight") or key == "emb.weight"
        assert torch.equal(written[key], tensor) != changed
    assert torch.equal(written["emb.weight"], adapter["emb.weight"])


def test_the_file_holds_the_merged_tensors_in_the_bases_order(files):
    paths = files("bat", dtype=torch.bfloat16, train_parts=["head"])
    merge_files(config(paths))
    expected = merged(paths, "bat")
    found = checkpoints.read_state(paths[2])
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_adapter_tensor_without_a_place_is_refused(files):
    paths = files()
    adapter, metadata = checkpoints.read_state(paths[1]), checkpoints.read_metadata(paths[1])
    for key in ("blocks.2.att.key.bone", "blocks.0.att.gate.bone", "blocks.0.att.time_state"):
        strange = paths[1].with_name("strange.pth")
        checkpoints.write_state(strange, {**adapter, key: torch.zeros(8, 32)}, metadata, overwrite=True)
        with pytest.raises(UserError, match=key.removesuffix(".bone")):
            merge_files(config((paths[0], strange, paths[2])))
    assert not paths[2].exists()


def test_only_one_tensor_is_held_at_a_time(tmp_path):
    layout = {str(number): torch.empty(1000) for number in range(20)}
    alive = []

    def tensors():
        for key in layout:
            assert sum(reference() is not None for reference in alive) <= 2  # the one being written, the next one
            tensor = torch.full((1000,), float(key))
            alive.append(weakref.ref(tensor))
            yield key, tensor
            del tensor

    for name in ("a.pth", "a.safetensors"):
        alive.clear()
        write_tensors(tmp_path / name, layout, tensors())
        assert all((tensor == float(key)).all() for key, tensor in checkpoints.read_state(tmp_path / name).items())


def test_an_adapter_of_the_field_merges_without_metadata_and_says_so(files):
    paths = files("bat", metadata=False)
    report = "\n".join(merge_files(config(paths)))
    assert "it has no metadata: kind and r were read from the shapes, the base could not be checked" in report
    assert (logits(paths[2]) - logits(*paths[:2])).abs().max() < 2e-5


def test_a_square_adapter_without_metadata_needs_its_kind(files):
    paths = files(r=32, targets=["att.key"], metadata=False)
    with pytest.raises(UserError, match="say --peft bone"):
        merge_files(config(paths))
    merge_files(config(paths, peft="bone"))
    assert paths[2].exists()


def test_a_lora_of_the_field_merges_with_the_alpha_that_the_user_gives(files):
    paths = files("lora", alpha=4.0, metadata=False)
    with pytest.raises(UserError, match="give --lora_alpha"):
        merge_files(config(paths))
    merge_files(config(paths, lora_alpha=4.0))
    base, adapter = checkpoints.read_state(paths[0]), checkpoints.read_state(paths[1])
    module = "blocks.1.ffn.key"
    update = 0.5 * adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
    expected = base[f"{module}.weight"] + update
    torch.testing.assert_close(checkpoints.read_state(paths[2])[f"{module}.weight"], expected)


def test_a_pissa_of_the_field_merges_with_its_initial_factors(files, tmp_path):
    paths = files("pissa")
    whole = checkpoints.read_state(paths[1])
    expected = merged(paths, "pissa")
    init = tmp_path / "init_pissa.pth"
    torch.save({f"model.{key}": tensor for key, tensor in whole.items() if ".init_" in key}, init)
    torch.save({key: tensor for key, tensor in whole.items() if ".init_" not in key}, tmp_path / "field.pth")
    paths = (paths[0], tmp_path / "field.pth", paths[2])
    with pytest.raises(UserError, match="needs its initial factors: give --pissa_init"):
        merge_files(config(paths, peft="pissa"))
    merge_files(config(paths, pissa_init=str(init)))
    found = checkpoints.read_state(paths[2])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_every_projection_of_a_quantised_base_is_merged_as_it_was_trained_on(files):
    paths = files(quant="nf4", targets=["att.key"], train_parts=["ln"])
    merge_files(config(paths))
    base, found = checkpoints.read_state(paths[0]), checkpoints.read_state(paths[2])
    adapter = checkpoints.read_state(paths[1])
    for key, tensor in base.items():
        expected = as_trained(tensor, "nf4") if checkpoints.param_part(key) == "projection" else tensor
        if key.endswith("att.key.weight"):
            expected = expected + adapter[key.replace("weight", "bone")].t().repeat(1, 4)
        assert torch.equal(found[key], adapter.get(key, expected))


def test_merging_into_the_original_weights_is_asked_for_and_said(files):
    paths = files(quant="nf4")
    report = "\n".join(merge_files(config(paths, merge_base="original")))
    assert "warning   merged into the original weights (--merge_base original), not into the nf4 ones" in report
    assert re.search(r"on nf4, as trained, they were [1-9][0-9.]*% away", report)
    expected = merged(paths)
    found = checkpoints.read_state(paths[2])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    trained = merged(paths, quant="nf4")
    assert not torch.equal(found["blocks.0.att.key.weight"], trained["blocks.0.att.key.weight"])


def test_the_quantisation_is_the_adapters_own_and_a_flag_cannot_change_it(files):
    with pytest.raises(UserError, match="--quant int8, but adapter .* was trained with --quant nf4: leave"):
        merge_files(config(files(quant="nf4"), quant="int8"))


def test_the_quantisation_of_an_adapter_without_metadata_is_a_flag(files):
    paths = files(quant="nf4", metadata=False)
    merge_files(config(paths, quant="nf4"))
    expected = merged(paths, quant="nf4")
    found = checkpoints.read_state(paths[2])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_existing_output_is_kept_unless_told_otherwise(files):
    paths = files()
    paths[2].write_text("precious")
    with pytest.raises(UserError, match="exists and is kept.*--overwrite"):
        merge_files(config(paths))
    assert paths[2].read_text() == "precious"
    merge_files(config(paths, overwrite=True))
    assert checkpoints.load_base(paths[2])


@pytest.mark.parametrize("which", ["base_model", "peft_checkpoint"])
def test_neither_input_is_ever_overwritten(files, which):
    paths = files()
    merging_config = config(paths, output=getattr(config(paths), which), overwrite=True)
    before = (paths[0].read_bytes(), paths[1].read_bytes())
    with pytest.raises(UserError, match=f"is the --{which} itself"):
        merge_files(merging_config)
    assert (paths[0].read_bytes(), paths[1].read_bytes()) == before


def test_an_output_of_an_unknown_kind_is_refused(files):
    with pytest.raises(UserError, match="expected a name that ends in .pth, .safetensors, .st or .gguf, or a folder"):
        merge_files(config(files(), output="merged.bin"))


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(files, tiny_checkpoint):
    paths = files()
    other = tiny_checkpoint("other.pth", seed=1)
    with pytest.raises(UserError, match="trained on another base"):
        merge_files(config((other, *paths[1:])))
    assert left_behind(paths) == {"other.pth"}


def test_a_file_that_reads_back_differently_is_not_kept(files, monkeypatch):
    paths = files()

    def damaged(path, layout, tensors, format, checksums):
        # With checksums that are right for what is written.
        write_tensors(path, layout, ((key, tensor + (key == "head.weight")) for key, tensor in tensors), format=format)

    monkeypatch.setattr(output, "write_tensors", damaged)
    with pytest.raises(UserError, match="head.weight did not read back"):
        merge_files(config(paths))
    assert left_behind(paths) == set()


def test_a_merge_whose_weights_compute_something_else_is_not_kept(files, monkeypatch):
    paths = files()
    monkeypatch.setattr(BoneLinear, "merged", staticmethod(lambda weight, *_: weight.clone()))
    with pytest.raises(AssertionError, match="blocks.0.att.receptance.weight: merged weight and adapter layer differ"):
        merge_files(config(paths))
    assert left_behind(paths) == set()


def test_a_merge_whose_logits_differ_is_not_kept(files, monkeypatch):
    paths = files()
    monkeypatch.setattr(BoneLinear, "merged", staticmethod(lambda weight, *_: weight.clone()))
    monkeypatch.setattr(verify, "verify_formula", lambda *_: None)
    with pytest.raises(UserError, match="more than the .* that arithmetic in fp32 explains"):
        merge_files(config(paths))
    assert left_behind(paths) == set()


@torch.no_grad()
@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_one_pass_over_the_base_gives_the_logits_with_the_adapter_and_without(files, kind, quant):
    alpha = {"alpha": 16.0} if kind in ("lora", "pissa") else {}
    paths = files(kind, quant=quant, **alpha)
    base = checkpoints.load_base(paths[0])
    adapter = read_adapter(str(paths[1]), base.state)
    found = verify._logits(base.state, quant, adapter)
    ids = (torch.arange(1, verify.CHECK_TOKENS + 1) * 7919 % base.arch.vocab_size)[None]
    expected = [load_model(paths[0], adapter=file, op="torch", quant=quant)(ids)[0] for file in (None, paths[1])]
    assert (expected[1] - expected[0]).norm() > 0.01 * expected[0].norm()
    assert len(found) == 2 - ADAPTERS[kind].needs_weight
    for row, wanted in zip(found, expected[-len(found) :], strict=True):
        assert (row - wanted).norm() < 1e-5 * wanted.norm()


def perturbed(monkeypatch, size):
    """Let what is merged be wrong by this much, relative to each weight."""
    original = BoneLinear.merged

    def merged(weight, *arguments):
        right = original(weight, *arguments)
        noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(5))
        return right * (1 + size * noise)

    monkeypatch.setattr(BoneLinear, "merged", staticmethod(merged))


def test_a_weight_that_is_wrong_in_the_fifth_digit_is_not_kept(files, monkeypatch):
    paths = files()
    perturbed(monkeypatch, 1e-4)
    with pytest.raises(AssertionError, match="merged weight and adapter layer differ"):
        merge_files(config(paths))


@pytest.mark.parametrize("dtype,size", [(torch.float32, 2e-3), (torch.bfloat16, 1.0)])
def test_logits_that_differ_by_a_few_times_what_rounding_explains_are_not_kept(files, monkeypatch, dtype, size):
    paths = files(dtype=dtype)
    perturbed(monkeypatch, size)
    monkeypatch.setattr(verify, "verify_formula", lambda *_: None)
    with pytest.raises(UserError, match="logits: .* more than the ") as refused:
        merge_files(config(paths))
    words = str(refused.value).replace(",", "").split()
    shares = [float(word.rstrip("%")) for word in words if word.endswith("%")]
    difference, limit = shares
    assert limit < difference < 15 * limit


def test_a_state_is_merged_without_any_rounding_and_said_to_be(files):
    paths = files("state", r=0, dtype=torch.bfloat16)
    lines = merge_files(config(paths))
    assert lines[1].startswith(f"adapter   {paths[1]}: initial state of 2 layers, 2 x 16 x 16 each, step 7")
    assert "(arithmetic in fp32 explains up to 0.01%)" in "\n".join(lines)
    assert not any(words in "\n".join(lines) for words in ("r 0", "merged    0", "0 weights"))


def test_a_whole_model_given_as_an_adapter_is_named_as_one(files, tiny_checkpoint):
    paths = files()
    merge_files(config(paths))
    for whole in (paths[0], paths[2]):
        with pytest.raises(UserError, match=f"{whole} is a whole model, not an adapter: nothing needs to be merged"):
            merge_files(config((tiny_checkpoint("other.pth"), whole, paths[2].with_name("new.pth"))))
    about = {"kind": "none", "base": "x", "format": 1}
    checkpoints.write_state(paths[1].with_name("full.pth"), checkpoints.read_state(paths[0]), about)
    with pytest.raises(UserError, match=r"is a whole model, in which every weight was trained \(--peft none\), not"):
        merge_files(config((paths[0], paths[1].with_name("full.pth"), paths[2]), overwrite=True))
    with pytest.raises(UserError, match="is a whole model, not an adapter"):
        load_model(paths[0], paths[2])


def test_an_adapter_is_not_merged_twice_into_one_base(files):
    paths = files()
    merge_files(config(paths))
    with pytest.raises(UserError, match="a base that it was merged into already needs it no more"):
        merge_files(config((paths[2], paths[1], paths[2].with_name("twice.pth"))))


@pytest.mark.parametrize("kind,what", [("bone", "adapter"), ("none", "model")])
def test_the_file_that_a_run_continues_from_names_the_one_to_merge(files, kind, what):
    paths = files()
    state = checkpoints.read_state(paths[1])
    resume = paths[1].with_name("resume.pth")
    moments = {f"{key}.exp_avg": tensor for key, tensor in state.items()}
    about = {"kind": kind, "base": "x", "format": 1, "r": 8, "trained": "rwkv-3.pth", "step": 1}
    checkpoints.write_state(resume, state | moments, about)
    said = f"is what --resume continues a run from.*the {what} that was saved with it is .*rwkv-3.pth"
    with pytest.raises(UserError, match=said):
        merge_files(config((paths[0], resume, paths[2])))


def test_the_logits_are_not_compared_when_the_user_says_so(files, monkeypatch):
    paths = files()
    monkeypatch.setattr(merging, "verify_logits", None)
    assert "logits    not compared (--verify 0)" in merge_files(config(paths, verify=False))
    assert paths[2].exists()


def test_a_merge_that_overflows_the_bases_dtype_is_not_kept(files):
    paths = files(dtype=torch.float16, std=1e6, metadata=False)
    with pytest.raises(UserError, match="would hold NaN or infinity"):
        merge_files(config(paths))
    assert left_behind(paths) == set()


def test_merge_py_needs_no_training_stack_and_no_compiler(files):
    paths = files()
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('merge.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('LOADED', *{name.split('.')[0] for name in sys.modules})\n"
    )
    flags = ["--base_model", paths[0], "--lora_checkpoint", paths[1], "--output", paths[2]]
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"lightning", "deepspeed", "bitsandbytes", "peft", "transformers"} & loaded == set()
    assert paths[2].exists() and "differ from base + adapter" in done.stdout


def test_merge_py_answers_a_mistake_with_a_sentence_and_status_2(files):
    paths = files()
    flags = ["--base_model", paths[1], "--peft_checkpoint", paths[1], "--output", paths[2]]
    done = subprocess.run([sys.executable, REPOSITORY / "merge.py", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "is an adapter, not a base checkpoint" in done.stderr
    assert left_behind(paths) == set()
