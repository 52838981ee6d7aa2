"""GGUF files against llama.cpp, which loads them, computes with them and cuts text by them."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import Architecture, architecture_of
from rwkv_bone.conversion import gguf_names
from rwkv_bone.conversion.gguf_file import WORLD_TEMPLATE, obstacle, read_gguf, write_gguf
from rwkv_bone.conversion.gguf_names import rows
from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenizer import WorldTokenizer, world_tokens
from rwkv_bone.errors import UserError
from rwkv_bone.inference.load import assemble
from rwkv_bone.models import RWKV, build
from tests.live_bytes import LiveBytes
from tests.llama_cpp import ask

BYTES = [b"", *(bytes([value]) for value in range(1, 256))]
IDS = [number * 7919 % 256 for number in range(1, 60)]
RANKS = {6: {"mix": 8, "decay": 12}, 7: {"w": 12, "a": 20, "v": 8, "g": 24}}


def random_weights(version: int = 7, seed: int = 0, **sizes) -> RWKV:
    """A model in which every tensor is random and matters, and no two sizes are the same."""
    sizes = {"n_layer": 3, "n_embd": 128, "head_size": 64, "dim_ffn": 96, "vocab_size": 256, **sizes}
    arch = Architecture(version, n_head=sizes["n_embd"] // sizes["head_size"], low_rank=RANKS[version], **sizes)
    model, generator = build(arch, op="torch"), torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".ln" in f".{key}":
            noise = key.endswith("weight") + 0.2 * noise
        elif parameter.dim() == 2 and key.endswith(".weight"):
            noise *= parameter.shape[1] ** -0.5
        elif parameter.shape[-2] > 1 and "faaaa" not in key and "r_k" not in key:
            # A low-rank matrix, which multiplies from the right.
            noise *= parameter.shape[-2] ** -0.5
        else:
            noise *= 0.5
        parameter.data = noise
    return model.eval()


def write(path: Path, state: dict[str, Tensor], outtype: str = "f32", tokens=BYTES, **others) -> Path:
    write_gguf(path, architecture_of(state), state, iter(state.items()), outtype, tokens, **others)
    return path


@torch.no_grad()
def our_logits(model: RWKV, ids=IDS) -> np.ndarray:
    return model(torch.tensor([ids]))[0].numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def models() -> dict[int, RWKV]:
    return {version: random_weights(version) for version in (6, 7)}


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("piece", [0, 7, 1])
def test_llama_cpp_computes_our_logits_in_f32(tmp_path, models, version, piece):
    path = write(tmp_path / "model.gguf", models[version].state_dict())
    found, expected = ask(path, IDS, piece=piece).logits, our_logits(models[version])
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# llama.cpp rounds activations too, to the type of the matrix they meet. Found: 0.002, 0.02 and 0.06.
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("outtype, limit", [("f16", 0.004), ("bf16", 0.04), ("q8_0", 0.09)])
def test_llama_cpp_computes_our_logits_in_fewer_bits(tmp_path, models, version, outtype, limit):
    path = write(tmp_path / "model.gguf", models[version].state_dict(), outtype)
    found, expected = ask(path, IDS).logits, our_logits(models[version])
    assert 1e-4 < distance(found, expected) < limit
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize(
    "sizes",
    [
        {"version": 7, "v_in_layer0": True},
        {"version": 7, "n_layer": 1},
        {"version": 7, "n_layer": 1, "v_in_layer0": True},
        {"version": 7, "n_embd": 256, "head_size": 128},
        {"version": 7, "n_embd": 192, "dim_ffn": 33},
        {"version": 6, "n_layer": 1},
        {"version": 6, "head_size": 8},
        {"version": 6, "n_embd": 40, "head_size": 20},
    ],
    ids=str,
)
def test_every_size_that_is_written_is_computed(tmp_path, sizes):
    model = random_weights(**sizes)
    found = ask(write(tmp_path / "model.gguf", model.state_dict()), IDS).logits
    np.testing.assert_allclose(found, our_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("version, order", [(7, "rkwvag"), (7, "rwkvga"), (6, "rwkvg"), (6, "wkvgr")])
def test_another_order_of_the_mixes_would_show(tmp_path, models, monkeypatch, version, order):
    prefix = {6: "att.time_maa_", 7: "att.x_"}[version]
    fused, *others = gguf_names.LAYER[version]
    wrong = replace(fused, keys=tuple(prefix + name for name in order))
    monkeypatch.setitem(gguf_names.LAYER, version, (wrong, *others))
    path = write(tmp_path / "model.gguf", models[version].state_dict())
    assert distance(ask(path, IDS).logits, our_logits(models[version])) > 0.01


@pytest.mark.parametrize("version", [6, 7])
def test_a_low_rank_matrix_that_is_not_transposed_would_show(tmp_path, models, monkeypatch, version):
    table = tuple(
        replace(row, form="same") if row.name == "time_mix_w1.weight" else row for row in gguf_names.LAYER[version]
    )
    monkeypatch.setitem(gguf_names.LAYER, version, table)
    path = write(tmp_path / "model.gguf", models[version].state_dict())
    with pytest.raises(AssertionError, match="blk.0.time_mix_w1.weight"):
        ask(path, IDS)


def test_llama_cpp_wants_the_tensors_of_layer_0_that_it_does_not_use(tmp_path, models, monkeypatch):
    monkeypatch.setattr(gguf_names, "V_IN_LAYER_0", ())
    path = write(tmp_path / "model.gguf", models[7].state_dict())
    with pytest.raises(AssertionError, match="blk.0.time_mix_v0.weight"):
        ask(path, IDS)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "bf16"])
def test_what_is_read_back_is_what_was_written_but_for_the_cast(tmp_path, models, version, dtype, outtype):
    state = {key: tensor.to(dtype) for key, tensor in models[version].state_dict().items()}
    found = read_gguf(write(tmp_path / "model.gguf", state, outtype))
    assert found.keys() == state.keys()
    kind = {"auto": dtype, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[outtype]
    for key, tensor in state.items():
        matrix = key.endswith(".weight") and tensor.dim() == 2
        assert found[key].dtype == (kind if matrix else torch.float32), key
        assert torch.equal(found[key], tensor.to(found[key].dtype)), key


def test_a_file_of_several_dtypes_keeps_them_all_exact(tmp_path, models):
    state = {
        key: tensor.to([torch.float32, torch.bfloat16, torch.float16][number % 3])
        for number, (key, tensor) in enumerate(models[7].state_dict().items())
    }
    found = read_gguf(write(tmp_path / "model.gguf", state, "auto"))
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q8_0_is_off_by_half_a_step_and_the_rounding_of_the_step(tmp_path, models, dtype):
    state = {key: tensor.to(dtype) for key, tensor in models[7].state_dict().items()}
    # Blocks of zeros, of one number, and of numbers so small that their step is none of fp16's normal numbers.
    state["emb.weight"][1], state["emb.weight"][2, 5:] = 0, 0
    state["emb.weight"][3] *= 1e-5
    found = read_gguf(write(tmp_path / "model.gguf", state, "q8_0"))
    rounded = 0
    for key, tensor in state.items():
        if not (key.endswith(".weight") and tensor.dim() == 2):
            assert torch.equal(found[key], tensor.float()), key
            continue
        blocks = tensor.float().reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        # The integer is that of the exact step, and it is multiplied by the step as fp16 has it.
        limit = step / 2 + 127 * (step.half().float() - step).abs()
        error = (found[key].reshape(-1, 32) - blocks).abs()
        assert (error <= limit * 1.0001).all(), key
        rounded += (error > limit / 4).sum().item()
    assert rounded > 1000


def test_a_row_that_is_no_multiple_of_32_is_stored_as_f16_and_counted(tmp_path, caplog):
    model = random_weights(dim_ffn=100)
    path = write(tmp_path / "model.gguf", model.state_dict(), "q8_0")
    assert "3 matrices, such as blocks.0.ffn.value.weight, are stored as f16 and not as q8_0" in caplog.text
    found = read_gguf(path)
    value = model.state_dict()["blocks.1.ffn.value.weight"]
    assert torch.equal(found["blocks.1.ffn.value.weight"], value.half())
    assert distance(ask(path, IDS).logits, our_logits(model)) < 0.09


def test_equal_models_give_equal_bytes(tmp_path, models):
    state = models[7].state_dict()
    files = [
        write(tmp_path / name, state, "q8_0", chat_template="{{ x }}") for name in ("a.gguf", ".b.123.partial.gguf")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tensors_are_written_as_they_come(tmp_path, models):
    state = {key: tensor.bfloat16() for key, tensor in models[7].state_dict().items()}

    def fresh() -> Iterator[tuple[str, Tensor]]:
        # Not what was needed before, to compare shapes, which LiveBytes counts though it takes no memory.
        live.peak = live.now
        for key, tensor in state.items():
            yield key, tensor.clone()

    with LiveBytes() as live:
        write_gguf(tmp_path / "model.gguf", architecture_of(state), state, fresh(), "f32", BYTES)
    # A tensor, the one before it, and one of them in fp32; and what is kept of one layer's vectors.
    assert live.peak < 5 * max(tensor.nbytes for tensor in state.values())


def test_sizes_and_tokens_are_as_llama_cpp_reads_them(tmp_path, models):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    found = ask(write(tmp_path / "7.gguf", models[7].state_dict(), "q8_0", chat_template=template), IDS[:1]).metadata
    expected = {
        "general.architecture": "rwkv7",
        "general.name": "RWKV-7 396K",
        "general.file_type": "7",
        "rwkv7.context_length": "1048576",
        "rwkv7.embedding_length": "128",
        "rwkv7.block_count": "3",
        "rwkv7.feed_forward_length": "96",
        "rwkv7.wkv.head_size": "64",
        "rwkv7.attention.layer_norm_epsilon": "0.000010",
        "rwkv7.attention.decay_lora_rank": "12",
        "rwkv7.attention.iclr_lora_rank": "20",
        "rwkv7.attention.value_residual_mix_lora_rank": "8",
        "rwkv7.attention.gate_lora_rank": "24",
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.bos_token_id": "0",
        "tokenizer.ggml.eos_token_id": "0",
        "tokenizer.chat_template": template,
    }
    assert {key: found.get(key) for key in expected} == expected
    found = ask(write(tmp_path / "6.gguf", models[6].state_dict()), IDS[:1]).metadata
    expected = {
        "rwkv6.time_mix_extra_dim": "8",
        "rwkv6.time_decay_extra_dim": "12",
        "rwkv6.rescale_every_n_layers": "0",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["rwkv6.attention.layer_norm_epsilon"] == "0.000010"


def test_a_wrong_epsilon_would_show(tmp_path, models, monkeypatch):
    monkeypatch.setattr("rwkv_bone.conversion.gguf_file.LAYER_NORM_EPS", 1e-3)
    path = write(tmp_path / "model.gguf", models[7].state_dict())
    assert np.abs(ask(path, IDS).logits - our_logits(models[7])).max() > 1e-3


TEXTS = [
    "The quick brown fox, 3.14159 \u2260 22/7.\n\nUser: what's \\n in C?\tA newline\r\n",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u5427\u3002",
    "\u7e41\u9ad4\u4e2d\u6587\u8207\u6587\u8a00\u6587",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30ab\u30bf\u30ab\u30ca",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\U0001f469\u200d\U0001f680 \U0001f600\U0001f3fd e\u0301 \xe9",
    "def f(x):\n    return {\"a\": 'b', '\\\\': x[0]}  # 'quoted' and \"quoted\"\n\n\n",
    " " * 130 + "=" * 70 + "\x00\x01\x7f",
]


def test_llama_cpp_cuts_text_as_the_world_tokenizer_does(tmp_path):
    model = random_weights(n_layer=1, n_embd=64, vocab_size=65536)
    path = write(tmp_path / "world.gguf", model.state_dict(), "q8_0", world_tokens())
    texts = [*TEXTS, "".join(TEXTS), "\n".join(TEXTS)]
    found = ask(path, IDS[:2], texts)
    tokenizer = WorldTokenizer()
    assert found.ids == [tokenizer.encode(text) for text in texts]
    assert found.metadata["tokenizer.ggml.eot_token_id"] == str(tokenizer.encode("\n\n")[0]) == "261"
    assert found.logits.shape == (2, 65536)
    assert found.metadata["tokenizer.chat_template"] == WORLD_TEMPLATE
    # What the file says of each id, once more by the table of tokens.
    reader = gguf.GGUFReader(path)
    words, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert (words[0], kinds[0]) == ("<s>", 3)
    assert words[65530:] == [f"[PAD{number}]" for number in range(65530, 65536)] and set(kinds[65530:]) == {5}
    assert set(kinds[1:65530]) == {1}


def test_the_template_of_a_world_model_writes_what_training_wrote():
    texts = [("system", "Be brief.\r\n\r\nAlways."), ("user", " Hi\n \n\n  there\nyou "), ("assistant", "Yes\n\nno")]
    texts += [("user", ""), ("assistant", "last")]
    conversation = Conversation("row 1", tuple(Turn(role, text) for role, text in texts))
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(WORLD_TEMPLATE)
    messages = [{"role": role, "content": text} for role, text in texts]
    written = load_template("world", "world")
    assert template.render(messages=messages[:-1], add_generation_prompt=True) == written.prompt(conversation)
    whole = "".join(segment.text for segment in written.render(conversation))
    assert template.render(messages=messages) == whole + "\n\n"


def test_llama_cpp_cuts_text_into_bytes(tmp_path, models):
    path = write(tmp_path / "model.gguf", models[7].state_dict())
    texts = [text.replace("\x00", "") for text in TEXTS]
    assert ask(path, IDS[:1], texts).ids == [list(text.encode()) for text in texts]


@pytest.mark.parametrize(
    "name, expected",
    [("7v0-834K", "expected-logits-7v0-834K.bin"), ("6v0-1m", "expected-logits-6v0-1m.bin")],
)
def test_models_trained_by_others_give_the_logits_that_others_computed(tmp_path, shared, name, expected):
    folder = shared / "models" / "rwkv.cpp-tiny"
    base = checkpoints.load_base(folder / f"tiny-rwkv-{name}-FP32.pth")
    path = write(tmp_path / "model.gguf", base.state)
    found = ask(path, IDS, ['"in']).logits
    np.testing.assert_allclose(found, our_logits(assemble(base.arch, base.state, op="torch")), rtol=0, atol=1e-3)
    theirs = np.fromfile(folder / expected, np.float32)
    np.testing.assert_allclose(ask(path, list(b'"in')).logits[-1], theirs, rtol=0, atol=1e-3)


def test_what_llama_cpp_cannot_compute_is_refused_with_the_reason(tmp_path, shared, models):
    state = checkpoints.load_base(shared / "models" / "rwkv.cpp-tiny" / "tiny-rwkv-5v2-730K-FP32.pth").state
    with pytest.raises(UserError, match="llama.cpp knows RWKV-6 and RWKV-7, and this is RWKV-5"):
        write(tmp_path / "model.gguf", state)
    state = checkpoints.load_base(shared / "models" / "blinkdl-reverse" / "rwkv7-reverse-L2-D32-ft.pth").state
    with pytest.raises(UserError, match="with heads of 16, which this model has, its numbers are wrong"):
        write(tmp_path / "model.gguf", state)
    with pytest.raises(UserError, match="vocabulary of 300 is neither"):
        write(tmp_path / "model.gguf", random_weights(n_layer=1, vocab_size=300).state_dict())
    state = {**models[7].state_dict(), "blocks.0.att.time_state": torch.ones(2, 64, 64)}
    assert "has no place for an initial state, and this model has one, such as blocks.0.att.time_state" in obstacle(
        models[7].arch, state
    )
    with pytest.raises(UserError, match="initial state"):
        write(tmp_path / "model.gguf", state)
    assert not list(tmp_path.iterdir())


def test_keys_and_shapes_must_be_the_models(tmp_path, models):
    state = models[7].state_dict()
    arch = models[7].arch
    ranks = {**state, "blocks.1.att.a1": torch.ones(128, 16), "blocks.1.att.a2": torch.ones(16, 128)}
    fewer = {key: tensor for key, tensor in state.items() if key != "blocks.2.att.k_k"}
    more = {**state, "blocks.0.att.k_b": torch.ones(1)}
    for wrong, message in (
        (ranks, r"blocks.1.att.a1 is \[128, 16\], expected \[128, 20\]"),
        (fewer, "missing blocks.2.att.k_k"),
        (more, "unexpected blocks.0.att.k_b"),
    ):
        with pytest.raises(UserError, match=message):
            write_gguf(tmp_path / "model.gguf", arch, wrong, iter(wrong.items()), "f32", BYTES)
    with pytest.raises(UserError, match="257 tokens for 256 ids"):
        write(tmp_path / "model.gguf", state, tokens=[*BYTES, b"more"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "outtype, value, message",
    [
        ("f16", 65505.0, r"att.key.weight holds 65505, more than f16 can hold \(65504\): give another --outtype"),
        ("f16", -1e6, "blocks.1.att.key.weight holds 1e"),
        ("bf16", 3.4e38, "blocks.1.att.key.weight holds 3.4e"),
        ("q8_0", 127 * 65504.0 + 1, r"blocks.1.att.key.weight holds 8.31901e\+06"),
        ("f32", float("inf"), "blocks.1.att.key.weight: NaN or infinity"),
        ("q8_0", float("nan"), "blocks.1.att.key.weight: NaN or infinity"),
    ],
)
def test_a_number_too_large_for_its_type_is_refused_by_name(tmp_path, models, outtype, value, message):
    state = dict(models[7].state_dict())
    state["blocks.1.att.key.weight"] = state["blocks.1.att.key.weight"].clone()
    state["blocks.1.att.key.weight"][3, 5] = value
    with pytest.raises(UserError, match=message):
        write(tmp_path / "model.gguf", state, outtype)


def test_the_largest_number_of_a_type_is_kept(tmp_path, models):
    state = dict(models[7].state_dict())
    state["blocks.1.att.key.weight"] = state["blocks.1.att.key.weight"].clone()
    for outtype, value in (("f16", 65504.0), ("q8_0", 127 * 65504.0)):
        state["blocks.1.att.key.weight"][3, 5] = -value
        found = read_gguf(write(tmp_path / f"{outtype}.gguf", state, outtype))["blocks.1.att.key.weight"]
        assert found[3, 5].item() == -value and found.isfinite().all()


def test_a_damaged_or_foreign_file_is_a_users_error(tmp_path, models):
    path = write(tmp_path / "model.gguf", models[7].state_dict())
    content = path.read_bytes()
    for size in (0, 3, 20, 5000, len(content) - 4096):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="cannot be read as GGUF"):
            read_gguf(path)
    # A list that is longer than the file: gguf's own reader goes on as long as the list says.
    types = b"tokenizer.ggml.token_type" + (9).to_bytes(4, "little") + (5).to_bytes(4, "little")
    assert types + (256).to_bytes(8, "little") in content
    path.write_bytes(content.replace(types + (256).to_bytes(8, "little"), types + (1 << 22).to_bytes(8, "little")))
    with pytest.raises(UserError, match=r"cannot be read as GGUF \(it ends within its header\)"):
        read_gguf(path)
    layers = b"rwkv7.block_count" + (4).to_bytes(4, "little")
    path.write_bytes(content.replace(layers + (3).to_bytes(4, "little"), layers + (1 << 31).to_bytes(4, "little")))
    with pytest.raises(UserError, match="2147483648 layers with heads of 64 do not fit its [0-9]+ tensors"):
        read_gguf(path)
    heads = b"rwkv7.wkv.head_size" + (4).to_bytes(4, "little")
    path.write_bytes(content.replace(heads + (64).to_bytes(4, "little"), heads + (96).to_bytes(4, "little")))
    with pytest.raises(UserError, match="time_mix_r_k.weight is 128, which is no blocks.0.att.r_k of heads of 96"):
        dict(read_gguf(path))
    key = b"blk.1.channel_mix_key.weight" + (2).to_bytes(4, "little")
    at = content.index(key) + len(key) + 16
    path.write_bytes(content[:at] + (9).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UserError, match="blk.1.channel_mix_key.weight is Q8_1: expected f32, f16, bf16 or q8_0"):
        read_gguf(path)
    path.write_bytes(content.replace(b"blk.1.time_mix_k_a", b"blk.1.time_mix_k_b"))
    with pytest.raises(UserError, match="blk.1.time_mix_k_a.weight, blk.1.time_mix_k_b.weight"):
        read_gguf(path)
    path.write_bytes(content.replace(b"rwkv7", b"llama"))
    with pytest.raises(UserError, match="a GGUF file of llama: expected rwkv6 or rwkv7"):
        read_gguf(path)
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        read_gguf(tmp_path / "none.gguf")


def test_without_the_package_the_error_says_what_to_install(tmp_path, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        write(tmp_path / "model.gguf", models[7].state_dict())


@pytest.mark.parametrize("version", [6, 7])
def test_the_table_has_every_tensor_of_upstream_and_every_name_of_gguf_once(models, version):
    table = rows(version, 3)
    assert {key for row in table for key in row.keys} == set(models[version].state_dict())
    assert len({row.name for row in table}) == len(table)
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[f"RWKV{version}"]]
    names = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in known}
    assert {row.name.rpartition(".")[0] for row in table if not row.name.startswith(("blk.1", "blk.2"))} <= names
