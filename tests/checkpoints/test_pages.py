"""Pages of mapped files: given back when nobody needs them, and never one that holds what no file holds."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.checkpoints import give_back, pages, read_state, taken_over
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.conversion.merge import write_model
from rwkv_bone.conversion.output import output_named
from rwkv_bone.inference.load import load_model
from rwkv_bone.models import build, load_base_into
from rwkv_bone.models.rwkv import GENERATIONS
from rwkv_bone.quantization import is_quantized
from rwkv_bone.training.place import place
from tests.conftest import random_model

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of this process that are pages of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(params=[".pth", ".safetensors", ".st"])
def file(request, tmp_path):
    """(path, what is in it): three large tensors, with small ones before, between and after them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3,), "large": (512, 512), "b": (5,), "wide": (64, 8192), "tall": (4096, 128), "c": (7,)}
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    path = tmp_path / f"file{request.param}"
    write_tensors(path, state, state.items(), format="pth" if path.suffix == ".pth" else "safetensors")
    return path, state


@linux
def test_the_pages_of_a_tensor_are_given_back_and_read_again(file):
    path, written = file
    state = read_state(path)
    total = sum(tensor.sum() for tensor in state.values())
    assert resident(path) > 0.9 * path.stat().st_size
    for tensor in state.values():
        give_back(tensor)
    assert resident(path) < 0.1 * path.stat().st_size
    assert all(torch.equal(state[key], tensor) for key, tensor in written.items())
    assert total == sum(tensor.sum() for tensor in state.values())


@linux
@pytest.mark.parametrize("turned", [False, True])
def test_only_the_tensor_that_is_named_loses_pages(file, turned):
    path, _ = file
    state = read_state(path)
    for tensor in state.values():
        tensor.sum()
    before = resident(path)
    give_back(state["wide"].t() if turned else state["wide"])
    assert state["wide"].nbytes - 8192 <= before - resident(path) <= state["wide"].nbytes


@linux
def test_what_was_written_into_a_mapped_tensor_is_never_lost(file):
    path, written = file
    state = read_state(path)
    for tensor in state.values():
        tensor.sum()
    state["wide"][5, 7] = 1e9
    state["wide"][40] += 1
    state["a"][0], state["b"][2], state["c"][6] = 10, 11, 12  # in pages that large tensors share with them
    state["large"][0, 0] = state["large"][-1, -1] = state["tall"][-1, -1] = 13
    expected = {key: tensor.clone() for key, tensor in state.items()}
    for _ in range(2):
        for tensor in state.values():
            give_back(tensor)
    assert resident(path) < 0.2 * path.stat().st_size
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert all(torch.equal(tensor, written[key]) for key, tensor in read_state(path).items())


@linux
def test_ordinary_memory_is_left_alone():
    for tensor in (torch.randn(300, 1000), torch.randn(1000, 300).t(), torch.randn(10, 99999)[:, 5:], torch.zeros(0)):
        expected = tensor.clone()
        give_back(tensor)
        assert torch.equal(tensor, expected)
    shared = torch.randn(300, 1000).share_memory_()
    expected = shared.clone()
    give_back(shared)
    assert torch.equal(shared, expected)
    give_back(torch.empty(300, 1000, device="meta"))


@pytest.mark.parametrize("missing", ["page map", "madvise"])
def test_a_system_that_does_not_say_whose_a_page_is_keeps_all_of_them(file, missing, monkeypatch):
    path, written = file
    if missing == "page map":
        monkeypatch.setattr(pages, "PAGEMAP", "/nowhere/pagemap")
    else:
        monkeypatch.setattr(pages, "_madvise", lambda: None)
    state = read_state(path)
    state["wide"][5, 7] = 1e9
    for key, tensor in state.items():
        give_back(tensor)
        assert torch.equal(tensor, written[key]) == (key != "wide")
    assert state["wide"][5, 7] == 1e9


@linux
def test_what_is_copied_gives_its_pages_back_and_what_is_not_keeps_them(file):
    path, _ = file
    state = read_state(path)
    for tensor in state.values():
        tensor.sum()
    before = resident(path)
    assert taken_over(state["wide"], torch.device("cpu"), torch.float32) is state["wide"]
    assert resident(path) == before
    assert torch.equal(taken_over(state["wide"], dtype=torch.bfloat16), state["wide"].bfloat16())
    assert resident(path) >= before  # compared, it has been read again
    taken_over(state["wide"], dtype=torch.bfloat16)
    taken_over(state["large"].t())
    taken_over(state["tall"], copy=True)
    assert resident(path) < 0.1 * path.stat().st_size


@pytest.fixture(params=["file.pth", "file.safetensors", "folder/"])
def model_file(request, tmp_path):
    """(path, its files, bytes) of a model of two layers of 256, in bf16."""
    sizes = {"n_embd": 256, "n_head": 4, "head_size": 64, "dim_ffn": 1024, "n_layer": 2, "vocab_size": 512}
    arch = replace(random_model().arch, **sizes, low_rank=GENERATIONS[7].low_rank_sizes(256))
    model = build(arch, op="torch")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    state = {key: tensor.detach().bfloat16() for key, tensor in model.state_dict().items()}
    single = tmp_path / ("file.pth" if request.param == "folder/" else request.param)
    checkpoints.write_state(single, state)
    if request.param != "folder/":
        return single, [single]
    write_model(output_named(f"{tmp_path}/folder/", shard_size="2MB"), checkpoints.load_base(single))
    folder = tmp_path / "folder"
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    return folder, shards


def resident_share(files):
    return sum(map(resident, files)) / sum(file.stat().st_size for file in files)


@linux
def test_a_model_that_was_checked_is_not_resident(model_file):
    path, files = model_file
    base = checkpoints.load_base(path)
    assert resident_share(files) < 0.25
    checkpoints.fingerprint(base.state)
    assert resident_share(files) < 0.25


@linux
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_of_a_quantised_base_only_the_rest_stays_resident(model_file, quant):
    path, files = model_file
    base = checkpoints.load_base(path)
    with torch.device("meta"):
        model = build(base.arch, op="torch")
    load_base_into(model, base.state, torch.bfloat16, quant=quant)
    inject(model, settings=AdapterSettings("bone", 4))
    place(model, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    whole = sum(tensor.nbytes for tensor in base.state.values())
    rest = sum(tensor.nbytes for key, tensor in base.state.items() if not is_quantized(key))
    assert resident_share(files) < rest / whole + 0.25 < 0.8


@linux
def test_of_a_base_in_another_dtype_only_the_copy_stays_resident(model_file):
    path, files = model_file
    base = checkpoints.load_base(path)
    with torch.device("meta"):
        model = build(base.arch, op="torch")
    load_base_into(model, base.state)
    place(model, torch.device("cpu"), torch.float32)
    assert resident_share(files) < 0.25
    loaded = load_model(path, dtype=torch.float32)
    assert resident_share(files) < 0.25
    assert all(torch.equal(tensor, base.state[key].float()) for key, tensor in loaded.state_dict().items())


@linux
def test_a_merge_keeps_neither_its_base_nor_its_output_resident(model_file, monkeypatch):
    path, files = model_file
    base = checkpoints.load_base(path)
    seen = []
    named = checkpoints.atomic.os.link

    def look(source, target):
        if str(target).endswith("merged.safetensors"):
            seen.append((resident_share(files), resident_share([source])))
        named(source, target)

    monkeypatch.setattr(checkpoints.atomic.os, "link", look)
    write_model(output_named(str(path.parent / "merged.safetensors")), base)
    assert seen and max(seen[0]) < 0.25


@linux
def test_what_is_resident_of_a_tensor_is_what_was_read_or_written_of_it(file):
    path, written = file
    state = read_state(path)
    tensor = state["wide"]
    give_back(tensor)
    assert pages.resident_bytes(tensor) == 0
    tensor.sum()
    assert pages.resident_bytes(tensor) == pytest.approx(tensor.nbytes, rel=0.01)
    own = torch.ones(2**20)
    assert pages.resident_bytes(own) == pytest.approx(own.nbytes, rel=0.01)
    assert pages.resident_bytes(torch.empty(2**20, device="meta")) == 0
