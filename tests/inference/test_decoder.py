"""A token at a time: the logits are those of the whole text read at once, in float64, whatever the model is made of."""

import copy

import pytest
import torch

from rwkv_bone import load_model
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.inference import compiled as module
from rwkv_bone.inference.decoder import Decoder
from rwkv_bone.models import LayerState
from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.quantization import QuantLinear, quantize
from tests.conftest import random_model
from tests.rwkv_oracle import logits as oracle_logits

IDS = [5, 60, 7, 1, 33, 12, 2, 48]
LEVELS = ("portable", "avx2", "avx512")
# Head sizes of whole and half vectors, and sizes that leave a rest in every loop.
SIZES = {
    "usual": {"n_embd": 128, "head_size": 64},
    "half a vector": {"n_embd": 24, "head_size": 8, "dim_ffn": 99},
    "long rows": {"n_embd": 32, "head_size": 16, "dim_ffn": 2085},
    "odd": {"n_embd": 48, "head_size": 16, "dim_ffn": 101, "vocab_size": 67},
}
RANKS = {6: {"mix": 5, "decay": 67}, 7: {"w": 3, "a": 70, "v": 17, "g": 33}}


@pytest.fixture(params=LEVELS)
def level(request):
    try:
        library = native.library("step")
    except BuildError as problem:
        pytest.skip(str(problem))
    if library.wkv_set_level(LEVELS.index(request.param)) < 0:
        pytest.skip("this processor lacks the instructions")
    yield
    library.wkv_set_level(-1)


def of_dtype(model, dtype: torch.dtype):
    """A copy whose weights and arithmetic are of this dtype."""
    other = copy.deepcopy(model).to(dtype)
    other.dtype = other.emb.dtype = dtype
    return other.eval()


@torch.no_grad()
def exact(model, ids=IDS) -> torch.Tensor:
    """[T, V] float64, by the model's own forward without any state."""
    return of_dtype(model, torch.float64)(torch.tensor([ids]))[0]


def one_by_one(decoder: Decoder, ids=IDS) -> torch.Tensor:
    """[T, V], each from the state that the token before it left."""
    state, rows = None, []
    for token in ids:
        logits, state = decoder.step(token, state)
        rows.append(logits)
    return torch.stack(rows)


def together(model, texts: list[list[int]]) -> torch.Tensor:
    """[R, T, V]: what follows each token of texts of one length, which are read side by side."""
    start = module.FlatState(model._start, model._arch.n_head, model._arch.head_size)
    states = module.flat_states(
        [LayerState(*(part.repeat(len(texts), *[1] * (part.dim() - 1)) for part in layer)) for layer in start]
    )
    return torch.stack([model.advance(ids, states).clone() for ids in zip(*texts, strict=True)], dim=1)


def texts_of(R: int) -> list[list[int]]:
    """Texts of four tokens, none like its neighbours."""
    return [[(7 * i + 3 * t * t + 5) % 61 for t in range(4)] for i in range(R)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row."""
    return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def compiled_decoder(model) -> Decoder:
    decoder = Decoder(model)
    assert decoder._compiled is not None
    return decoder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_tokens_one_by_one_give_the_logits_of_the_whole_text(level, version, size):
    ranks = RANKS.get(version) if size == "odd" else None
    model = random_model(seed=3, version=version, low_rank=ranks, n_layer=3, **SIZES[size])
    for dtype, limit in ((torch.float32, 3e-5), (torch.bfloat16, 3e-5)):
        stored = of_dtype(model, dtype)
        # Only the arithmetic is compared: bfloat16 weights are float64 numbers too.
        assert error(one_by_one(compiled_decoder(stored)), exact(stored)) < limit


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_sequence_gives_the_same_numbers_beside_any_number_of_others(level, version, size):
    ranks = RANKS.get(version) if size == "odd" else None
    model = random_model(seed=3, version=version, low_rank=ranks, n_layer=2, **SIZES[size])
    texts = texts_of(70)
    alone = torch.stack([one_by_one(compiled_decoder(model), ids) for ids in texts])
    for R in (1, 2, 3, 7, 33, 70):
        assert torch.equal(together(compiled_decoder(model)._compiled, texts[:R]), alone[:R])
    # To bfloat16 weights a processor may multiply bfloat16 vectors: no worse than the model's forward, which does too.
    stored = of_dtype(model, torch.bfloat16)
    found = together(compiled_decoder(stored)._compiled, texts)
    for R in (1, 2, 7):
        assert torch.equal(together(compiled_decoder(stored)._compiled, texts[:R]), found[:R])
    expected = exact(stored, texts[5])
    assert error(found[5], expected) < error(stored(torch.tensor([texts[5]]))[0], expected)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_prompt_read_at_once_and_its_answer_read_by_token_go_on_from_each_other(version):
    model = random_model(seed=4, version=version)
    expected, decoder = exact(model), compiled_decoder(model)
    _, state = decoder.read(IDS[:3])
    logits, state = decoder.step(IDS[3], state)
    assert error(logits, expected[3]) < 3e-5
    logits, state = decoder.read(IDS[4:7], state)
    assert error(logits, expected[6]) < 3e-5
    assert error(decoder.step(IDS[7], state)[0], expected[7]) < 3e-5


@pytest.mark.parametrize("version", [5, 6, 7])
def test_an_initial_state_is_where_the_first_token_begins(version):
    model = random_model(seed=5, version=version)
    model.add_time_state()
    for block in model.blocks:
        torch.nn.init.normal_(block.att.time_state)
    assert error(one_by_one(compiled_decoder(model)), exact(model)) < 3e-5


def test_a_value_mix_in_the_first_layer_is_not_read():
    model = random_model(seed=6)
    expected = one_by_one(compiled_decoder(model))
    att = model.blocks[0].att
    for name in ("v0", "v1", "v2"):
        setattr(att, name, torch.nn.Parameter(torch.randn_like(getattr(model.blocks[1].att, name))))
    assert torch.equal(one_by_one(compiled_decoder(model)), expected)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("kind", [None, *ADAPTERS])
def test_adapters_and_quantised_projections_are_part_of_every_token(level, kind, quant):
    model = random_model(seed=7, n_embd=64, head_size=32, dim_ffn=192, vocab_size=64)
    if quant != "none":
        for block in model.blocks:
            for owner in (block.att, block.ffn):
                for name, layer in list(owner.named_children()):
                    if isinstance(layer, torch.nn.Linear):
                        setattr(owner, name, QuantLinear(quantize(layer.weight, quant)))
    plain = exact(model)
    if kind:
        r = 8 if kind.startswith("bat") else 7  # the last block of 7 is shorter
        inject(model, settings=AdapterSettings(kind, r, alpha=11.0), targets=["att", "ffn", "head"])
        generator = torch.Generator().manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, ADAPTERS[kind]):
                for name in layer.parameter_names:
                    tensor = layer.get_parameter(name)
                    tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    expected = exact(model)
    assert kind is None or error(plain, expected) > 1e-2
    decoder = Decoder(model.eval())
    # A folded weight in place of codes would take the memory that they save: there the model's forward is taken.
    assert (decoder._compiled is None) == (quant != "none" and str(kind).startswith("bat"))
    assert error(one_by_one(decoder), expected) < 1e-4
    if one_call := decoder._compiled:
        texts = texts_of(6)
        alone = torch.stack([one_by_one(decoder, ids) for ids in texts])
        assert torch.equal(together(one_call, texts), alone)


def test_a_state_is_never_changed_and_can_go_on_twice():
    decoder = compiled_decoder(random_model(seed=8))
    _, state = decoder.read(IDS[:4])
    _, state = decoder.step(9, state)
    kept = [LayerState(*(part.clone() for part in layer)) for layer in state]
    first, other = decoder.step(3, state), decoder.step(4, state)
    again = decoder.step(3, state)
    assert all(
        torch.equal(*parts) for old, new in zip(kept, state, strict=True) for parts in zip(old, new, strict=True)
    )
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    # Also from a copy, which lies in memory in another way.
    assert torch.equal(decoder.step(3, kept)[0], first[0])
    assert torch.equal(first[1][1].wkv, again[1][1].wkv)


def test_a_step_does_not_depend_on_the_number_of_threads():
    model = random_model(seed=9, n_embd=256, head_size=64, dim_ffn=1024, n_layer=1)  # large enough for several threads
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            for stored in (model, of_dtype(model, torch.bfloat16)):
                decoder = compiled_decoder(stored)
                found += [one_by_one(decoder), together(decoder._compiled, texts_of(33))]
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[4:], found))


def test_a_long_text_is_read_in_pieces():
    model, ids = random_model(seed=10), torch.randint(1, 61, (50,)).tolist()
    whole = Decoder(model).read(ids)
    for piece in (1, 7, 49, 50):
        logits, state = Decoder(model, piece=piece).read(ids)
        assert error(logits, whole[0].double()) < 1e-5
        torch.testing.assert_close(state[1].wkv, whole[1][1].wkv, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_is_refused_by_name():
    decoder = Decoder(random_model(seed=11))
    with pytest.raises(ValueError, match="no token to read"):
        decoder.read([])
    for token in (-1, 61):
        for read in (lambda token=token: decoder.read([1, token]), lambda token=token: decoder.step(token, None)):
            with pytest.raises(ValueError, match=f"token {token}: expected 0 to 60"):
                read()
    with pytest.raises(ValueError, match="piece 0"):
        Decoder(random_model(seed=11), piece=0)


def test_without_a_compiler_the_same_is_read(monkeypatch):
    library = native.library

    def fail(name):
        if name == "step":
            raise BuildError("no C++ compiler was found")
        return library(name)

    model = random_model(seed=12)
    monkeypatch.setattr(native, "library", fail)
    decoder = Decoder(model)
    assert decoder._compiled is None and error(one_by_one(decoder), exact(model)) < 3e-5


def test_no_other_model_is_compiled():
    assert module.compiled(random_model(seed=0)) is not None
    assert module.compiled(of_dtype(random_model(seed=0), torch.float64)) is None
    assert module.compiled(random_model(seed=0, n_embd=36, head_size=12)) is None


@pytest.mark.slow
@pytest.mark.parametrize("version", [5, 6, 7])
def test_tokens_one_by_one_are_those_of_the_rwkv_package(version, tiny_checkpoint):
    path = tiny_checkpoint(version=version, n_embd=128, head_size=64, vocab_size=256)
    expected = torch.from_numpy(oracle_logits(path, IDS, version)).double()
    assert error(one_by_one(compiled_decoder(load_model(path))), expected) < 1e-4
