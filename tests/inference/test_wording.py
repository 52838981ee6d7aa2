"""What is read around messages, and what ends an answer, in every template: written out by hand."""

import pytest

from rwkv_bone.data import load_template, load_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.inference.wording import Wording

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Bot: {% generation %}{{ message.content }}<end>"
    "{% endgeneration %}\n{% else %}You: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
# name: (first message "hi", closing of an answer, later message "more", opening, stops)
EXPECTED = {
    "raw": ("hi", None, None, "", ()),
    "world": (
        "User: hi\n\nAssistant:",
        "\n\n",
        "User: more\n\nAssistant:",
        "\n\nAssistant:",
        ("\n\n",),
    ),
    "g1": (
        "User: hi\n\nAssistant: <think>\n</think",
        "\n\n",
        "User: more\n\nAssistant: <think>\n</think",
        "\n\nAssistant: <think>\n</think",
        ("\n\n",),
    ),
    "g1-think": (
        "User: hi\n\nAssistant: <think",
        "\n\n",
        "User: more\n\nAssistant: <think",
        "\n\nAssistant: <think",
        ("\n\n",),
    ),
    "alpaca": (
        f"{PREAMBLE}### Instruction:\nhi\n\n### Response:",
        "\n\n",
        "### Instruction:\nmore\n\n### Response:",
        "\n\n### Response:",
        ("\n\n### Instruction:",),
    ),
    "chatml": (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_end|>",),
    ),
    "marked": ("You: hi\nBot: ", "<end>", "You: more\nBot: ", "\nBot: ", ("<end>",)),
    "format": ("Q: hi\nA:", "\n", "Q: more\nA:", "\nA:", ("\nQ:",)),
    "format with an end": ("[hi] ", " ###", "[more] ", "] ", ("###",)),
}


@pytest.fixture
def wording(tmp_path):
    files = {"chatml": CHATML, "marked": MARKED, "format": "Q: {prompt}\nA:{response}\n\n"}
    files["format with an end"] = "[{prompt}] {response} ###\n"

    def make(name: str) -> Wording:
        if name in files:
            (tmp_path / name).write_text(files[name])
        template = load_template(str(tmp_path / name) if name in files else name, "bytes")
        return Wording(template, load_tokenizer("bytes", 256))

    return make


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_read_around_messages_and_what_ends_an_answer(name, wording):
    first, closing, later, opening, stops = EXPECTED[name]
    made = wording(name)
    assert made.first("hi") == first
    if later is not None:
        assert made.next("more") == (closing, later)
    assert made.several == (later is not None)
    assert (made.opening, made.stops) == (opening, stops)


def test_a_system_turn_stands_first_and_is_refused_where_there_is_no_place_for_it(wording):
    assert wording("world").first("hi", "Be kind.") == "System: Be kind.\n\nUser: hi\n\nAssistant:"
    wording("world").check_system("Be kind.")
    for name in ("raw", "format"):
        wording(name).check_system("")
        with pytest.raises(UserError, match="cannot write a system turn: leave it out"):
            wording(name).check_system("Be kind.")


def test_the_end_of_the_document_is_no_text_that_is_looked_for(tmp_path):
    """A template that writes eos_token after answers: in bytes and World that is the token 0."""
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer("bytes", 256)
    made = Wording(load_template(str(tmp_path), "bytes"), tokenizer)
    assert made.stops == ()
    assert made.encode(made.next("more")[0]) == [0]
