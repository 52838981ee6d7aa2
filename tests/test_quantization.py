"""Quantised projections: against bitsandbytes, against dense layers on the dequantised weight, and their memory."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv_bone import checkpoints, quantization
from rwkv_bone.adapters import ADAPTERS, AdapterSettings
from rwkv_bone.config import QUANTS
from rwkv_bone.errors import UserError
from rwkv_bone.inference.load import load_model
from rwkv_bone.models import build, load_base_into
from rwkv_bone.quantization import QuantLinear, as_trained, dequantize, is_quantized, quantize
from tests.conftest import REPOSITORY, random_model

QUANTISED = QUANTS[1:]
FOUR_BITS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole blocks of 64, fewer values than one, a last block cut short, and an odd number of values.
SHAPES = [(64, 64), (5, 2), (1, 1), (130, 66), (1, 65), (7, 9), (300, 901)]


def weights(shape, dtype):
    """Weights that hurt: ordinary, with blocks of zeros, all zero, with ties between two codes, with an outlier."""
    torch.manual_seed(0)
    ordinary = torch.randn(shape)
    holes, outlier = ordinary.clone(), ordinary.clone()
    holes.view(-1)[:128] = 0
    outlier.view(-1)[-1] = -3e4
    ties = (ordinary * 3).round() / 6
    return [weight.to(dtype) for weight in (ordinary, holes, torch.zeros(shape), ties, outlier, ordinary * 1e-6)]


@pytest.fixture(scope="module")
def bitsandbytes():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    # It compiles some of its Python for each shape, which takes seconds and changes nothing.
    with torch.compiler.set_stance("force_eager"):
        yield bitsandbytes.functional


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_four_bits_are_those_of_bitsandbytes_bit_for_bit(bitsandbytes, kind, dtype):
    for shape in SHAPES:
        for weight in weights(shape, dtype):
            packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind)
            ours = quantize(weight, kind)
            assert torch.equal(ours.codes, packed.view(-1)) and torch.equal(ours.scales, state.absmax)
            for state.dtype in DTYPES:
                found, expected = dequantize(ours, state.dtype), bitsandbytes.dequantize_4bit(packed, state)
                assert found.dtype == expected.dtype and torch.equal(found, expected)


def straddling(kind) -> list[tuple[float, float]]:
    """(x, m) with x / m and x * (1 / m) on two sides of a bound between two codes: who multiplies gets another code."""
    values = torch.tensor(quantization.TABLES[kind]).sort().values
    bounds = (values[1:] + values[:-1]) / 2
    m = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 0.5
    x = bounds[:, None] * m
    near = [x, x.nextafter(x + 1), x.nextafter(x - 1)]
    pairs = [
        (float(x[i, j]), float(m[j]))
        for x in near
        for i, j in (torch.bucketize(x / m, bounds) != torch.bucketize(x * (1 / m), bounds)).nonzero().tolist()
    ]
    assert len(pairs) > 20
    return pairs[:: len(pairs) // 20]


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_last_block_cut_short_is_divided_by_its_largest_value_and_a_whole_one_multiplied(kind):
    table = torch.tensor(quantization.TABLES[kind])
    values, order = table.sort(stable=True)
    bounds = (values[1:] + values[:-1]) / 2
    for x, m in straddling(kind):
        whole = torch.tensor([x, m] + [0.0] * 62)
        short = torch.tensor([x, m, 0.0])
        for weight in (short, whole, torch.cat([whole, short])):
            units = [
                part / part.abs().max() if len(part) < 64 else part * (1 / part.abs().max())
                for part in weight.split(64)
            ]
            expected = order[torch.bucketize(torch.cat(units), bounds)]
            codes = quantize(weight[None], kind).codes
            found = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: len(weight)]
            assert torch.equal(found, expected.to(torch.uint8))
            exact = table[found.long()] * torch.cat([part.abs().max().expand(len(part)) for part in weight.split(64)])
            assert torch.equal(dequantize(quantize(weight[None], kind)), exact[None])


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_bitsandbytes_divides_in_a_last_block_too(bitsandbytes, kind):
    for x, m in straddling(kind):
        for weight in (torch.tensor([[x, m, 0.0]]), torch.tensor([[x, m] + [0.0] * 66])):
            packed, _ = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind)
            assert torch.equal(quantize(weight, kind).codes, packed.view(-1))


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_every_value_of_every_block_gets_the_nearest_value_of_the_table(kind):
    """Without another implementation, for blocks of every length."""
    table = torch.tensor(quantization.TABLES[kind]).double()
    for weight in (weight for shape in SHAPES[:-1] for weight in weights(shape, torch.float32)):
        blocks = weight.flatten().split(quantization.BLOCK)
        scale = torch.cat([block.abs().max().expand(len(block)) for block in blocks]).view(weight.shape)
        nearest = (table * scale[..., None] - weight[..., None]).abs().amin(dim=-1)
        assert ((as_trained(weight, kind) - weight).abs() <= nearest + 1e-6 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_are_those_of_bitsandbytes(bitsandbytes, dtype):
    for shape in SHAPES:
        for weight in weights(shape, dtype):
            if not weight.abs().amax(dim=1).all():
                continue  # it divides by the zero of a row of zeros
            codes, largest, _ = bitsandbytes.int8_vectorwise_quant(weight)
            ours = quantize(weight, "int8")
            assert torch.equal(ours.codes, codes) and torch.equal(ours.scales, largest / 127)
            torch.testing.assert_close(
                dequantize(ours), bitsandbytes.int8_vectorwise_dequant(codes, largest), rtol=3e-7, atol=0
            )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_on_cuda_bitsandbytes_kernel_gives_the_same_numbers_as_pytorch(kind, monkeypatch):
    pytest.importorskip("bitsandbytes")
    for shape in SHAPES:
        for weight in weights(shape, torch.bfloat16):
            ours = quantize(weight.cuda(), kind)
            for dtype in DTYPES:
                monkeypatch.setattr(quantization, "has_bitsandbytes", lambda: True)
                theirs = dequantize(ours, dtype)
                monkeypatch.setattr(quantization, "has_bitsandbytes", lambda: False)
                assert torch.equal(theirs, dequantize(ours, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTISED)
def test_codes_and_scales_made_on_the_device_are_those_made_on_the_cpu(kind, monkeypatch):
    for chunk in (quantization.CHUNK_GPU, 640):
        monkeypatch.setattr(quantization, "CHUNK_GPU", chunk)
        for shape, dtype in product(SHAPES, DTYPES):
            for weight in weights(shape, dtype):
                ours, theirs = quantize(weight.cuda(), kind), quantize(weight, kind)
                assert ours.codes.is_cuda and torch.equal(ours.codes.cpu(), theirs.codes)
                assert torch.equal(ours.scales.cpu(), theirs.scales)


@pytest.mark.gpu
def test_a_base_is_quantised_on_the_device_one_tensor_at_a_time(tmp_path):
    path, total, largest = large_checkpoint(tmp_path)
    base = checkpoints.load_base(path)
    arch, state = base.arch, base.state
    with torch.device("meta"):
        model = build(arch, op="torch", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load_base_into(model, state, torch.bfloat16, quant="nf4", device="cuda")
    quantised = total * (4 + 32 / 64) / 16
    assert torch.cuda.memory_allocated() - before < 1.01 * quantised + 2**20
    # The weight, and of a chunk at most: as fp32, in units, its codes.
    assert torch.cuda.max_memory_allocated() - before < quantised + largest + 40 * quantization.CHUNK_GPU
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert module.codes.is_cuda and torch.equal(
                module.codes.cpu(), quantize(state[f"{name}.weight"], "nf4").codes
            )
    assert not any(parameter.is_cuda for parameter in model.parameters())


def test_a_base_is_quantised_on_the_device_that_is_asked_for():
    state = random_model().state_dict()
    with torch.device("meta"):
        model = build(random_model().arch, op="torch")
    load_base_into(model, state, quant="nf4", device="meta")
    assert {layer.codes.device.type for layer in model.modules() if isinstance(layer, QuantLinear)} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "kind, largest, typical", [("int8", 0.5 / 127, 0.009), ("nf4", 0.16, 0.1), ("fp4", 0.17, 0.13)]
)
def test_a_value_moves_by_half_a_step_at_most(kind, largest, typical):
    """largest: in units of the row's or block's largest value; typical: relative error of a normal weight, in norm."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    difference = (as_trained(weight, kind) - weight).abs()
    groups = (256, 512) if kind == "int8" else (-1, 64)
    units = weight.abs().view(groups).amax(dim=1, keepdim=True)
    assert (difference.view(groups) / units).max() <= largest * (1 + 1e-5)
    assert typical / 2 < difference.norm() / weight.norm() < typical


@pytest.fixture
def plainly(monkeypatch):
    """PyTorch alone computes, as where there is no compiler."""
    monkeypatch.setattr(quantization, "compiled", lambda: False)


def test_the_cpp_kernel_gives_pytorchs_bits_with_every_instruction_set_and_number_of_threads(monkeypatch):
    if not quantization.compiled():
        pytest.skip("no C++ compiler")
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(256, 256)
    every_half = torch.where(every_half.isfinite(), every_half, 0)
    # Larger than what one thread takes at once.
    many = torch.randn(300, 901, generator=torch.Generator().manual_seed(0))
    cases = [every_half, many, many.bfloat16(), torch.full((2, 70), 1e-39), torch.full((3, 50), 3e38)]
    cases += [weight for shape, dtype in product(SHAPES[1:-1], DTYPES) for weight in weights(shape, dtype)]
    for x, m in straddling("nf4"):
        cases += [torch.tensor([[x, m, 0.0]]), torch.tensor([[x, m] + [0.0] * 66])]
    library, threads = quantization.native.library(quantization.LIBRARY), torch.get_num_threads()
    for kind in QUANTISED:
        with monkeypatch.context() as without:
            without.setattr(quantization, "compiled", lambda: False)
            expected = [quantize(weight, kind) for weight in cases]
            values = [[dequantize(known, dtype) for dtype in DTYPES] for known in expected]
        try:
            for level, number in ((0, 1), (1, 3), (2, 1), (-1, 2)):
                torch.set_num_threads(number)
                if library.wkv_set_level(level) < 0:
                    continue
                for weight, known, back in zip(cases, expected, values, strict=True):
                    found = quantize(weight, kind)
                    assert torch.equal(found.codes, known.codes) and torch.equal(found.scales, known.scales)
                    assert all(
                        torch.equal(dequantize(found, dtype), value) for dtype, value in zip(DTYPES, back, strict=True)
                    )
        finally:
            library.wkv_set_level(-1)
            torch.set_num_threads(threads)


def test_a_process_without_a_compiler_quantises_with_pytorch(monkeypatch):
    def none(operator):
        raise quantization.BuildError("no C++ compiler was found")

    monkeypatch.setattr(quantization.native, "library", none)
    quantization.compiled.cache_clear()
    weight = torch.randn(65, 66, generator=torch.Generator().manual_seed(0))
    without = [as_trained(weight, kind) for kind in QUANTISED]
    monkeypatch.undo()
    quantization.compiled.cache_clear()
    assert all(torch.equal(as_trained(weight, kind), value) for kind, value in zip(QUANTISED, without, strict=True))


@pytest.mark.parametrize("kind", QUANTISED)
def test_working_in_chunks_changes_nothing(kind, monkeypatch, plainly):
    weight = torch.randn(37, 201, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, kind)
    values = dequantize(whole)
    for chunk in (1, 64, 640):
        monkeypatch.setattr(quantization, "CHUNK_CPU", chunk)
        found = quantize(weight, kind)
        assert torch.equal(found.codes, whole.codes) and torch.equal(found.scales, whole.scales)
        assert torch.equal(dequantize(found), values) and torch.equal(dequantize(whole), values)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_transposed_weight_is_quantised_by_its_own_rows(kind):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_trained(weight.t(), kind), as_trained(weight.t().contiguous(), kind))


def make(kind, in_features=48, out_features=96, seed=0):
    """(quantised layer, the weight that it stands for in fp32)."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) / in_features**0.5
    layer = QuantLinear(quantize(weight, kind))
    return layer, layer.dequantize(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_layer_is_a_linear_with_the_dequantised_weight(kind, dtype):
    layer, weight = make(kind)
    x, g = torch.randn(2, 5, 48, dtype=dtype), torch.randn(2, 5, 96, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), F.linear(theirs, weight.to(dtype))
    y.backward(g)
    expected.backward(g)
    assert torch.equal(y, expected) and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", QUANTISED)
def test_gradient_agrees_with_finite_differences(kind):
    layer, _ = make(kind, 6, 9)
    assert torch.autograd.gradcheck(layer, torch.randn(4, 6, dtype=torch.float64, requires_grad=True))


def test_a_quantised_layer_has_no_state_and_its_scales_are_never_rounded():
    layer, weight = make("nf4")
    assert not layer.state_dict() and not list(layer.parameters())
    for cast in (lambda: layer.to(torch.bfloat16), layer.half, layer.double):
        cast()
        assert layer.codes.dtype == torch.uint8 and torch.equal(layer.dequantize(torch.float32), weight)


def adapted(base, kind, seed=1):
    """`base` under an adapter in which no tensor is zero."""
    layer = ADAPTERS[kind](base, AdapterSettings(kind, 8), "att.key")
    torch.manual_seed(seed)
    for tensor in layer.tensors().values():
        nn.init.normal_(tensor, std=0.1)
    return layer


def gradients(layer, x, g):
    """[y, dx, gradient of each trained tensor] of one backward pass."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g.to(y.dtype))
    return [y.detach(), x.grad, *(getattr(layer, name).grad for name in layer.parameter_names)]


def dense(weight, dtype=torch.float32):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.to(dtype))
    return linear


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quant", QUANTISED)
def test_an_adapter_over_a_quantised_layer_is_the_adapter_over_its_weight(quant, adapter):
    base, weight = make(quant)
    x, g = torch.randn(2, 9, 48), torch.randn(2, 9, 96)
    layer, reference = adapted(base, adapter), adapted(dense(weight), adapter)
    expected = gradients(reference, x, g)
    for found, true in zip(gradients(layer, x, g), expected, strict=True):
        assert (found - true).norm() <= 1e-6 * true.norm()

    rounded = adapted(dense(weight, torch.bfloat16), adapter)
    half = gradients(rounded, x.bfloat16(), g)
    for found, plain, true in zip(gradients(layer, x.bfloat16(), g), half, expected, strict=True):
        assert found.dtype == plain.dtype
        # Not more than rounding costs the dense layer, which may be lucky.
        assert (found.float() - true).norm() <= max(1.5 * (plain.float() - true).norm(), 4e-3 * true.norm())


def kept(layer, x):
    """{address: bytes} of what autograd keeps for backward, the layer's parameters and buffers left out."""
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    saved = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", QUANTISED)
def test_only_codes_and_scales_are_kept_for_backward(quant, dtype):
    base, _ = make(quant, 256, 512)
    x = torch.randn(16, 256, dtype=dtype, requires_grad=True)
    assert kept(base, x) == {}
    r, tokens = 8, 16
    for adapter, most in (("bone", tokens * r), ("bat", tokens * 256)):
        # Bone keeps the sums of its inputs, Bat the inputs themselves; a bf16 copy of an adapter is small.
        layer = adapted(base, adapter)
        assert sum(kept(layer, x).values()) <= (most + (dtype == torch.bfloat16) * layer.bone.numel()) * dtype.itemsize


def names_of(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_model_is_the_model_of_the_dequantised_file(kind, version):
    plain = random_model(version=version)
    state = {key: tensor.detach() for key, tensor in plain.state_dict().items()}
    projections = {key for key in state if is_quantized(key)}
    assert {f"{name}.weight" for name in names_of(plain, nn.Linear)} == projections | {"head.weight"}

    with torch.device("meta"):
        model, reference = build(plain.arch, op="torch"), build(plain.arch, op="torch")
    load_base_into(model, state, torch.float32, quant=kind)
    assert {f"{name}.weight" for name in names_of(model, QuantLinear)} == projections
    assert model.state_dict().keys() == state.keys() - projections
    rounded = {key: as_trained(tensor, kind) if key in projections else tensor for key, tensor in state.items()}
    load_base_into(reference, rounded)
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids), rtol=0, atol=0)
        assert (model(ids) - plain(ids)).norm() > 1e-3 * plain(ids).norm()


def test_a_quantised_model_is_loaded_as_strictly_as_any():
    plain = random_model()
    state = plain.state_dict()
    del state["blocks.1.ffn.key.weight"]
    with torch.device("meta"):
        model = build(plain.arch, op="torch")
    with pytest.raises(UserError, match="missing blocks.1.ffn.key.weight"):
        load_base_into(model, state, torch.float32, quant="nf4")


def test_half_precision_files_are_quantised_from_their_own_values(tiny_checkpoint):
    path = tiny_checkpoint(dtype=torch.bfloat16)
    stored = checkpoints.read_state(path)["blocks.0.att.key.weight"]
    for dtype in (torch.float32, torch.bfloat16):
        layer = load_model(path, dtype=dtype, op="torch", quant="nf4").blocks[0].att.key
        assert torch.equal(layer.dequantize(torch.float32), as_trained(stored, "nf4"))


MEASURE = """
import os, sys, threading, time
import torch
from rwkv_bone import checkpoints
from rwkv_bone.models import build, load_base_into
from rwkv_bone.quantization import as_trained

def own():
    # Not the pages of the mapped file, which the system drops when it needs them.
    with open("/proc/self/statm") as file:
        _, resident, of_files = map(int, file.read().split()[:3])
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")

def watch():
    global largest
    while not done:
        largest = max(largest, own())
        time.sleep(0.003)

torch.set_num_threads(1)
base = checkpoints.load_base(sys.argv[1])
arch, state = base.arch, base.state
with torch.device("meta"):
    model = build(arch, op="torch", dtype=torch.bfloat16)
as_trained(torch.zeros(64, 64), sys.argv[2])  # what libraries allocate once is allocated
largest = before = own()
done = False
thread = threading.Thread(target=watch)
thread.start()
load_base_into(model, state, torch.bfloat16, quant=sys.argv[2])
done = True
thread.join()
print(max(largest, own()) - before)
"""


def large_checkpoint(folder):
    """(path, bytes of the projections, bytes of the largest): 100 MB of bf16."""
    arch = replace(random_model().arch, n_embd=2048, n_head=128, dim_ffn=8192, n_layer=1)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build(arch, op="torch").state_dict().items()}
    state = {key: torch.full(shape, 0.5, dtype=torch.bfloat16) for key, shape in shapes.items()}
    torch.save(state, folder / "large.pth")
    sizes = [tensor.nbytes for key, tensor in state.items() if is_quantized(key)]
    return folder / "large.pth", sum(sizes), max(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_the_quantised_size_and_not_the_files(tmp_path):
    path, total, largest = large_checkpoint(tmp_path)
    command = [sys.executable, "-c", MEASURE, path, "nf4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY / "src")
    assert done.returncode == 0, done.stderr
    quantised = total * (4 + 32 / 64) / 16
    assert 0.95 * quantised < int(done.stdout) < quantised + largest


def test_load_model_quantises_as_the_adapter_was_trained(tiny_checkpoint, tmp_path, caplog):
    path = tiny_checkpoint()
    base = checkpoints.read_state(path)
    adapter = {"blocks.0.att.key.bone": torch.randn(8, 32)}
    metadata = {"format": 1, "kind": "bone", "blocks": "in", "r": 8, "targets": ["blocks.0.att.key"], "extra": []}
    metadata |= {"quant": "int8", "base": checkpoints.fingerprint(base)}
    checkpoints.write_state(tmp_path / "adapter.pth", adapter, metadata)

    model = load_model(path, tmp_path / "adapter.pth", op="torch")
    assert {module.kind for module in model.modules() if isinstance(module, QuantLinear)} == {"int8"}
    expected = as_trained(base["blocks.0.att.key.weight"], "int8") + adapter["blocks.0.att.key.bone"].t().tile(1, 4)
    found = model.blocks[0].att.key(torch.eye(32)).t()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not caplog.records

    other = load_model(path, tmp_path / "adapter.pth", op="torch", quant="none")
    assert not names_of(other, QuantLinear)
    assert "trained on a base in int8, and is put on one in none" in caplog.text


def test_load_model_quantises_when_it_is_told_to(tiny_checkpoint):
    model = load_model(tiny_checkpoint(), op="torch", quant="fp4")
    assert len(names_of(model, QuantLinear)) == 12
    with pytest.raises(UserError, match="quant='4bit': expected one of none, int8, nf4, fp4, or None"):
        load_model(tiny_checkpoint(), op="torch", quant="4bit")


def test_the_benchmarks_correctness_check_passes():
    command = [sys.executable, REPOSITORY / "benchmarks" / "quant.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
