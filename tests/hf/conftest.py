"""Small models of three architectures with random weights, and a tokenizer of bytes: nothing is downloaded."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    # The three differ in what matters here: biases (Qwen), tied embeddings (Gemma), sizes that 32 does not divide.
    "llama": (transformers.LlamaConfig, {}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}),
    "qwen": (transformers.Qwen2Config, {"intermediate_size": 56}),
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Rows to train on.
NUMBERS = [("1 in words: ", "one"), ("2 in words: ", "two"), ("3 in words: ", "three"), ("4 in words: ", "four")] * 4


@pytest.fixture
def make_model():
    """Factory: `make_model("llama", dtype=torch.bfloat16)`; equal arguments give equal weights, none of them zero."""

    def make(name: str = "llama", dtype=torch.float32, **changes):
        config_class, more = ARCHITECTURES[name]
        config = config_class(**{**SIZES, **more, **changes})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def ids():
    return torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture
def folder(make_model, tokenizer, tmp_path, monkeypatch):
    """A model's folder, and rows to train on and to measure with."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    make_model("gemma").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name, pairs in (("train.jsonl", NUMBERS), ("held.jsonl", NUMBERS[:4])):
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in pairs]
        (tmp_path / name).write_text("\n".join(lines))
    return tmp_path


def fill(model, seed: int = 0, std: float = 0.1):
    """Give whatever is trainable values as training might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model
