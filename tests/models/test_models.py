"""Every generation against other people's implementations, and against itself in every way it can be run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkv_bone import checkpoints, load_model
from rwkv_bone.config import ModelConfig
from rwkv_bone.errors import UserError
from rwkv_bone.models import (
    EVERY_BLOCK,
    LayerState,
    architecture_from_scratch,
    build,
    init_from_scratch,
    load_base_into,
    v7,
)
from rwkv_bone.models.rwkv import GENERATIONS
from tests.conftest import random_model
from tests.rwkv_oracle import logits as oracle_logits

TINY = {
    5: "models/rwkv.cpp-tiny/tiny-rwkv-5v2-730K-FP32.pth",
    6: "models/rwkv.cpp-tiny/tiny-rwkv-6v0-1m-FP32.pth",
    7: "models/rwkv.cpp-tiny/tiny-rwkv-7v0-834K-FP32.pth",
}
REVERSE = "models/blinkdl-reverse/rwkv7-reverse-L2-D32-ft.pth"
every_generation = pytest.mark.parametrize("version", [5, 6, 7])


def ids_of(vocab_size: int, length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("version, name", [(6, "6v0-1m"), (7, "7v0-834K")])
def test_logits_equal_those_that_rwkv_cpp_expects(shared, version, name):
    expected = np.fromfile(shared / f"models/rwkv.cpp-tiny/expected-logits-{name}.bin", dtype=np.float32)
    model = load_model(shared / TINY[version])
    with torch.no_grad():
        got = model(torch.tensor([[0x22, 0x69, 0x6E]]))[0, -1].numpy()
    assert np.abs(got - expected).max() < 1e-3


@pytest.mark.parametrize("version, path", [*TINY.items(), (7, REVERSE)])
@pytest.mark.parametrize("length", [1, 130])
def test_logits_equal_those_of_the_rwkv_package(shared, version, path, length):
    model = load_model(shared / path)
    ids = ids_of(model.arch.vocab_size, length)
    with torch.no_grad():
        got = model(ids)[0].numpy()
    assert np.abs(got - oracle_logits(shared / path, ids[0].tolist(), version)).max() < 1e-3


@every_generation
def test_a_random_model_of_several_heads_equals_the_rwkv_package(tiny_checkpoint, version):
    path = tiny_checkpoint(version=version, n_layer=3, n_embd=128, head_size=64, seed=3)
    ids = ids_of(61, 40)
    with torch.no_grad():
        got = load_model(path)(ids)[0].numpy()
    assert np.abs(got - oracle_logits(path, ids[0].tolist(), version)).max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_adds_the_decays_bias_where_it_is_not_trained_and_no_bit_changes(
    tiny_checkpoint, monkeypatch, dtype
):
    model, ids = load_model(tiny_checkpoint(version=7), op="cpu", dtype=dtype), ids_of(61, 37, batch=2)
    given, plain = [], v7.wkv7
    monkeypatch.setattr(v7, "wkv7", lambda **inputs: given.append(inputs) or plain(**inputs))

    def run(trained: bool) -> list[torch.Tensor]:
        for block in model.blocks:
            block.att.w0.requires_grad_(trained)
            block.att.w1.requires_grad_(True)
        logits = model(ids)
        return [logits, *torch.autograd.grad(logits.float().square().mean(), [b.att.w1 for b in model.blocks])]

    apart = run(trained=False)
    assert [x["w"].dtype for x in given] == [dtype] * len(model.blocks)
    for x, block in zip(given, model.blocks, strict=True):
        assert torch.equal(x["w0"].flatten(), block.att.w0.float().flatten())
    given.clear()
    added = run(trained=True)
    assert {x["w"].dtype for x in given} == {torch.float32} and {x["w0"] for x in given} == {None}
    assert all(torch.equal(x, y) for x, y in zip(apart, added, strict=True))


@every_generation
@pytest.mark.parametrize("op", ["torch", "cpu"])
def test_a_whole_sequence_equals_token_by_token(tiny_checkpoint, version, op):
    model, ids = load_model(tiny_checkpoint(version=version), op=op), ids_of(61, 37, batch=2)
    with torch.no_grad():
        whole, last = model(ids, return_state=True)
        state, pieces = None, []
        for t in range(ids.shape[1]):
            piece, state = model(ids[:, t : t + 1], state=state, return_state=True)
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(state, last, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@every_generation
def test_gradients_flow_through_a_carried_state_exactly(version):
    model, ids = random_model(version=version), ids_of(61, 24, batch=2)
    model(ids).square().sum().backward()
    whole = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    first, state = model(ids[:, :11], return_state=True)
    second = model(ids[:, 11:], state=state)
    (first.square().sum() + second.square().sum()).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[key], rtol=1e-3, atol=1e-4 * float(whole[key].abs().max()))


@every_generation
def test_a_state_holds_no_memory_but_its_own(version):
    _, state = random_model(version=version)(ids_of(61, 50, batch=2), return_state=True)
    for layer in state:
        assert all(part.dtype == torch.float32 for part in layer)
        assert all(part.untyped_storage().nbytes() == part.numel() * 4 for part in layer)


@every_generation
def test_every_parameter_gets_a_gradient(version):
    model = random_model(version=version, n_layer=3)
    labels = ids_of(61, 12, seed=1)
    model(ids_of(61, 12), labels=labels).backward()
    assert [key for key, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@every_generation
def test_loss_and_gradients_equal_plain_cross_entropy_on_the_logits(version):
    model, ids = random_model(version=version), ids_of(61, 20, batch=3)
    labels = ids_of(61, 20, batch=3, seed=1)
    labels[:, :5] = -100
    labels[1] = -100
    plain = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    plain.backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model(ids, labels=labels)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key], rtol=1e-3, atol=1e-5 * float(expected[key].abs().max())
        )


@every_generation
def test_recomputing_blocks_changes_no_gradient(version):
    model, ids, labels = random_model(version=version), ids_of(61, 20), ids_of(61, 20, seed=1)
    model(ids, labels=labels).backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=labels, recompute=EVERY_BLOCK).backward()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[key]), key


@every_generation
def test_bf16_loses_no_more_than_twice_what_the_rwkv_package_loses_in_bf16(tiny_checkpoint, version):
    path, ids = tiny_checkpoint(version=version, n_embd=64), ids_of(61, 50)
    exact, rounded = load_model(path), load_model(path, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = exact(ids)
        error = (rounded(ids).float() - expected).norm() / expected.norm()
        for name, parameter in rounded.named_parameters():
            if checkpoints.param_part(name) != "projection":
                parameter.data = parameter.data.float()
        mixed = (rounded(ids).float() - expected).norm() / expected.norm()
        theirs = torch.from_numpy(oracle_logits(path, ids[0].tolist(), version, "bf16"))
        allowed = 2 * (theirs - expected[0]).norm() / expected.norm()
    # The second: trained parameters are fp32 in a bf16 model.
    assert error < allowed and mixed < allowed


def test_v0_v1_v2_in_layer_0_are_loaded_and_change_nothing(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint()
    state = checkpoints.read_state(path)
    for name in ("v0", "v1", "v2"):
        state[f"blocks.0.att.{name}"] = torch.randn_like(state[f"blocks.1.att.{name}"])
    checkpoints.write_state(tmp_path / "with_v.pth", state)
    model, ids = load_model(tmp_path / "with_v.pth"), ids_of(61, 9)
    assert model.arch.v_in_layer0
    assert model.unused_keys() == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert list(model.state_dict()) != [] and set(model.state_dict()) == set(state)
    with torch.no_grad():
        assert torch.equal(model(ids), load_model(path)(ids))


@every_generation
def test_a_state_of_fewer_rows_than_an_unpacked_batch_or_of_another_model_is_refused(version):
    model, ids = random_model(version=version, n_layer=3), ids_of(61, 5, batch=3)
    state = model(ids, return_state=True)[1]
    model(ids, state=state)
    for rows in (1, 2, 0):
        fewer = [LayerState(*(part[:rows] for part in layer)) for layer in state]
        with pytest.raises(UserError, match=f"state: expected 3 rows, one a sequence, found {rows}"):
            model(ids, state=fewer)
        bounds = torch.tensor([0, 5, 10, 15])
        model(ids.view(1, 15), state=fewer, cu_seqlens=bounds)  # packed, the first documents go on
    with pytest.raises(UserError, match="state: expected 3 layers, as the model has, found 2"):
        model(ids, state=state[:2])
    for other in ({"n_embd": 64}, {"head_size": 8}, {"head_size": 32}):
        theirs = random_model(version=version, n_layer=3, **other)(ids, return_state=True)[1]
        with pytest.raises(UserError, match="of layer 0 is .*, expected .*: it is of another model"):
            model(ids, state=theirs)
    mixed = [*state[:2], LayerState(state[2].att_shift, state[2].wkv[:2], state[2].ffn_shift)]
    with pytest.raises(UserError, match=r"state: wkv of layer 2 is \[2, 2, 16, 16\], expected \[3, 2, 16, 16\]"):
        model(ids, state=mixed)


def decay_of(version: int, bias: torch.Tensor) -> torch.Tensor:
    """The factor by which a state shrinks in a token, in float64, where the networks add nothing to the bias."""
    bias = bias.detach().double()
    return torch.exp(-np.exp(-0.5) * bias.sigmoid()) if version == 7 else torch.exp(-bias.exp())


@pytest.mark.parametrize("trained", [False, True])
@every_generation
def test_over_thousands_of_tokens_a_state_decays_as_its_parameters_say_in_a_bf16_model_too(version, trained):
    """A rounding of the decay's exponent to bf16, up to 0.4 %, comes back as often as there are tokens."""
    T, H, N = 4096, 2, 16
    model = random_model(version=version, n_layer=4).requires_grad_(False)
    model.emb.dtype = torch.bfloat16
    for name, module in model.named_modules():
        if hasattr(module, "op"):
            module.op = "cpu"
        if name.endswith("att.key"):
            module.weight.zero_()  # nothing is written into the state, and nothing removed
    state = []
    for number, block in enumerate(model.blocks):
        att = block.att
        bias = att.w0 if version == 7 else att.time_decay
        # So slow that 20 to 90 % of the state is left: numbers that bf16 does not have.
        left = torch.linspace(0.2, 0.9, bias.numel()).roll(number)
        rate = -left.log() / T
        bias.copy_(((rate / np.exp(-0.5)).logit() if version == 7 else rate.log()).view(bias.shape))
        bias.requires_grad_(trained)
        for network in ("w2",) if version == 7 else ("time_decay_w2",) if version == 6 else ():
            getattr(att, network).zero_()
        one = torch.ones(1, H, N, N)
        state.append(LayerState(torch.zeros(1, 32), one, torch.zeros(1, 32)))
    with torch.no_grad():
        _, after = model(ids_of(61, T), state=state, return_state=True)
    for block, layer in zip(model.blocks, after, strict=True):
        bias = block.att.w0 if version == 7 else block.att.time_decay
        expected = (decay_of(version, bias) ** T).view(1, H, 1, N).expand(1, H, N, N)
        assert (layer.wkv.double() / expected - 1).abs().max() < 2e-3


@pytest.mark.parametrize("version", [6, 7])
def test_the_networks_part_of_the_decay_is_added_to_the_bias_in_fp32(monkeypatch, version):
    """Of layer 0, whose inputs do not depend on the bias: the network's part alone is what a bias of zero gives."""
    model, generation = random_model(version=version), GENERATIONS[version]
    model.emb.dtype = torch.bfloat16
    bias = model.blocks[0].att.w0 if version == 7 else model.blocks[0].att.time_decay
    given, operator = [], f"wkv{version}"
    plain = getattr(generation, operator)
    monkeypatch.setattr(generation, operator, lambda **inputs: given.append(inputs) or plain(**inputs))
    values = bias.detach().clone()
    for now in (torch.zeros_like(values), values):
        with torch.no_grad():
            bias.copy_(now)
        model(ids_of(61, 9))
    network, both = (given[i]["w"].flatten(2) for i in (0, len(model.blocks)))
    assert both.dtype == torch.float32 and network.abs().max() > 0
    assert torch.equal(both, network.float() + values)


def test_a_key_too_many_or_too_few_or_misshapen_is_named(tiny_checkpoint):
    base = checkpoints.load_base(tiny_checkpoint())
    arch, state = base.arch, base.state
    del state["blocks.1.ln2.bias"]
    state["blocks.1.att.extra"] = torch.zeros(1)
    state["blocks.0.ffn.value.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as caught:
        load_base_into(build(arch), state)
    for part in ("missing blocks.1.ln2.bias", "unexpected blocks.1.att.extra", "blocks.0.ffn.value.weight is [3, 3]"):
        assert part in str(caught.value)


def test_from_scratch_the_same_seed_gives_the_same_weights_and_upstream_scales():
    arch = architecture_from_scratch(ModelConfig(n_layer=4, n_embd=128, vocab_size=256))
    models = [build(arch) for _ in range(2)]
    for model in models:
        init_from_scratch(model, seed=7)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["blocks.0.att.output.weight"].abs().max() == 0 and first["blocks.0.ffn.value.weight"].abs().max() == 0
    assert first["emb.weight"].abs().max() <= 1e-4
    assert first["blocks.3.att.ln_x.weight"].eq(1).all() and first["blocks.0.ln1.weight"].eq(1).all()
    torch.testing.assert_close(
        first["blocks.2.att.key.weight"] @ first["blocks.2.att.key.weight"].T, 0.01 * torch.eye(128)
    )
    with torch.no_grad():
        loss = models[0](ids_of(256, 64), labels=ids_of(256, 64, seed=1)) / 64
    assert abs(float(loss) - np.log(256)) < 0.5


def upstream_rows(layer: int, n_layer: int, C: int, N: int) -> dict[str, list[float]]:
    """What RWKV-LM's RWKV-7 fills each vector of a layer with, channel by channel, in plain Python."""
    early, late = layer / (n_layer - 1), 1 - layer / n_layer
    rows: dict[str, list[float]] = {}
    for name, power in {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}.items():
        rows[f"att.{name}"] = [1 - (i / C) ** (power * late) for i in range(C)]
    rows["ffn.x_k"] = [1 - (i / C) ** (late**4) for i in range(C)]
    linear = [i / (C - 1) - 0.5 for i in range(C)]
    wave = [(i % N - (N - 1) / 2) / ((N - 1) / 2) for i in range(C)]
    zigzag = [x * abs(x) for x in wave]
    curve = [-6 + 6 * (i / (C - 1)) ** (1 + early**0.3) for i in range(C)]
    rows["att.w0"] = [w + 0.5 + 2.5 * z for w, z in zip(curve, zigzag, strict=True)]
    rows["att.a0"] = [-0.19 + 0.3 * z + 0.4 * x for z, x in zip(zigzag, linear, strict=True)]
    rows["att.v0"] = [0.73 - 0.4 * x for x in linear]
    rows["att.k_k"] = [0.71 - 0.1 * x for x in linear]
    rows["att.k_a"] = [1.02] * C
    rows["att.r_k"] = [-0.04] * C
    rows["att.ln_x.weight"] = [((1 + layer) / n_layer) ** 0.7] * C
    for name in ("ln0", "ln1", "ln2"):
        rows[f"{name}.weight"], rows[f"{name}.bias"] = [1.0] * C, [0.0] * C
    rows["att.ln_x.bias"] = [0.0] * C
    return rows


# A matrix is zero, or orthogonal times this.
UPSTREAM_MATRICES = {
    **dict.fromkeys(("att.receptance.weight", "att.value.weight", "ffn.key.weight"), 1.0),
    "att.key.weight": 0.1,
    **dict.fromkeys(("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1"), 0.0),
    **dict.fromkeys(("att.w2", "att.a2", "att.v2", "att.g2"), 0.1),
}


def test_from_scratch_every_key_has_the_values_that_upstream_gives_it():
    n_layer, C = 3, 128
    arch = architecture_from_scratch(ModelConfig(n_layer=n_layer, n_embd=C, vocab_size=512, head_size=32))
    model = build(replace(arch, v_in_layer0=True))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    init_from_scratch(model, seed=1)
    state = model.state_dict()
    rows = {f"blocks.{i}.{name}": row for i in range(n_layer) for name, row in upstream_rows(i, n_layer, C, 32).items()}
    rows |= {"ln_out.weight": [1.0] * C, "ln_out.bias": [0.0] * C}
    matrices = {f"blocks.{i}.{name}": scale for i in range(n_layer) for name, scale in UPSTREAM_MATRICES.items()}
    matrices["head.weight"] = 0.5 * (512 / C) ** 0.5
    for key, tensor in state.items():
        if key == "emb.weight":
            assert tensor.abs().max() <= 1e-4 and tensor.std() > 5e-5
        elif key in rows:
            torch.testing.assert_close(tensor.flatten(), torch.tensor(rows[key]), rtol=1e-5, atol=1e-5)
        else:
            # The network matrices of two axes that have more rows than columns are wider by the root of the ratio.
            scale = matrices[key] * (max(tensor.shape[0] / tensor.shape[1], 1) ** 0.5 if key[-1] == "2" else 1)
            short = tensor if tensor.shape[0] <= tensor.shape[1] else tensor.t()
            torch.testing.assert_close(short @ short.t(), scale**2 * torch.eye(len(short)), rtol=0, atol=1e-4)
    missing = {key for key in (*rows, *matrices) if key not in state}
    assert missing == {f"blocks.{i}.ln0.{part}" for i in (1, 2) for part in ("weight", "bias")}


def test_low_rank_sizes_follow_the_released_models():
    from rwkv_bone.models.v7 import low_rank_sizes

    assert low_rank_sizes(768) == {"w": 64, "a": 64, "v": 32, "g": 128}
    assert low_rank_sizes(2048) == {"w": 96, "a": 96, "v": 64, "g": 256}
    assert low_rank_sizes(2560) == {"w": 96, "a": 96, "v": 64, "g": 320}
    assert low_rank_sizes(4096) == {"w": 128, "a": 128, "v": 96, "g": 480}
