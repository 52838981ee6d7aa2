"""The flags of chat. The standard library only."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

from rwkv_bone.config import BAD_ROWS, QUANTS, setting
from rwkv_bone.config.acts import CHAT
from rwkv_bone.config.fields import check_given, check_values
from rwkv_bone.config.flags import parse_section
from rwkv_bone.config.layers import TYPED, split_argv
from rwkv_bone.config.sections import ACCELERATORS, PRECISIONS
from rwkv_bone.errors import UserError

THINKING = ("dim", "hide")
COLORS = ("auto", "always", "never")
# What `/settings NAME VALUE` can change while the program runs.
CHANGEABLE = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
    "max_new",
    "seed",
    "stop",
    "thinking",
)
EXAMPLES = (
    (
        "the newest adapter of scripts/run_bone.sh on its base, always the most likely token",
        "sh scripts/chat.sh --temperature 0",
    ),
    (
        "a model with an adapter, beside the model without it",
        "sh scripts/chat.sh --load_model my-model.pth --adapter out/mine/rwkv-1.pth --compare my-model.pth",
    ),
    (
        "answers to a file of prompts, as JSON lines",
        "sh scripts/chat.sh --load_model my-model.pth --prompts questions.jsonl --output answers.jsonl",
    ),
)


@dataclass(frozen=True)
class ChatConfig:
    load_model: str = setting(
        "", "model to talk to: a .pth, .safetensors or .st file, an index of shards, a folder, or a name of the Hub"
    )
    adapter: str = setting("", "adapter to put on it: a file, or a directory of Hugging Face PEFT; empty = none")
    compare: str = setting(
        "", "second model, which answers every message too, with the same settings and no adapter; empty = none"
    )
    quant: str = setting(
        "auto",
        "format of the frozen projections: 8 bits (int8), 4 bits (nf4, fp4), or none; auto = what the adapter was "
        "trained on, else none",
        ("auto", *QUANTS),
    )
    precision: str = setting("auto", "dtype of weights and arithmetic; auto = that of the file", ("auto", *PRECISIONS))
    accelerator: str = setting("auto", "where to run; auto = on a GPU if there is one", ACCELERATORS)
    tokenizer: str = setting(
        "auto",
        "bytes, world, or the path of a tokenizer.json; auto = the model folder's, else by the vocabulary's size",
    )
    template: str = setting(
        "auto",
        "how a message is written: raw, world, g1, g1-think, alpaca, or the path of a template; auto = that of the "
        "adapter's run, else of the model's folder, else world for the World tokenizer, else raw",
    )
    system: str = setting(
        "",
        "text of a system turn at the beginning, for templates that have one, and rows of prompts that bring none; "
        "empty = none",
    )
    max_new: int = setting(1000, "largest number of tokens of an answer", at_least=1, at_most=10**7)
    temperature: float = setting(
        1.0, "0 = always the most likely token; higher = more varied", at_least=0, warn_above=2
    )
    top_p: float = setting(
        0.3, "tokens are drawn from the most likely ones that reach this probability together", above=0, at_most=1
    )
    presence_penalty: float = setting(
        0.0, "taken off the logit of every token that the answer already has", at_least=-10, at_most=10
    )
    frequency_penalty: float = setting(
        0.0, "taken off the logit of a token for each time that the answer already has it", at_least=-10, at_most=10
    )
    penalty_decay: float = setting(
        0.996, "factor by which earlier tokens count less with each new one, for the penalties", at_least=0, at_most=1
    )
    seed: int = setting(0, "the same seed gives the same answers", at_least=0, at_most=2**32 - 1)
    stop: tuple[str, ...] = setting(
        (),
        r"texts that end an answer, besides the end-of-document token, with \n for a line break; empty = what ends a "
        "turn in the template",
    )
    thinking: str = setting("dim", "what is between <think> and </think>: shown dim, or hide", THINKING)
    color: str = setting("auto", "colours; auto = on a terminal, unless NO_COLOR is set", COLORS)
    undo: int = setting(20, "number of earlier turns whose states are kept, for /undo", at_least=0, at_most=10**4)
    history: bool = setting(
        True, "1 = keep what is typed for the arrow keys, in a file that only you can read; 0 = do not"
    )
    prompts: str = setting(
        "",
        "file of prompts to answer, as JSON lines: a text, one prompt a line, or rows as training data has them; - = "
        "standard input; empty = a conversation, or standard input if that is no terminal",
    )
    output: str = setting("", "file for these answers; empty = standard output")
    overwrite: bool = setting(False, "1 = replace the output if it exists; 0 = refuse to")
    bad_rows: str = setting("stop", "prompts that cannot be used: stop, or skip and count them", BAD_ROWS)
    sft_field: tuple[str, ...] = setting(
        (), "names of the fields of rows, as for training: of prompt and response, or one, of the messages or the text"
    )
    batch: int = setting(32, "number of prompts to answer at a time", at_least=1, at_most=10**4)

    def __post_init__(self):
        check_values(self)
        check_given(self, "load_model")
        if len(self.sft_field) > 2:
            raise UserError(f"--sft_field {' '.join(self.sft_field)}: expected one or two names")
        if any(not text for text in self.stops):
            raise UserError("--stop has an empty text, which would end every answer at once: remove it")

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` with its line breaks."""
        return tuple(text.replace("\\n", "\n") for text in self.stop)


def parse_chat(argv: list[str], prog: str, talks: bool = True) -> ChatConfig:
    """The settings that `argv` asks for; UserError for anything unknown or missing. Notes go to standard error.

    talks: there is a terminal for a conversation. Without one, prompts come through standard input: --prompts -.
    """
    if not talks and not any(word.partition("=")[0] == "--prompts" for word in argv):
        script, typed = split_argv(argv)
        argv = [*script, TYPED, "--prompts=-", *typed]
    description = "Talk to a model, with or without an adapter, or have it answer a file of prompts."
    with contextlib.redirect_stdout(sys.stderr if wants_other_output(argv) else sys.stdout):
        return parse_section(prog, description, ChatConfig, argv, examples=EXAMPLES, table=CHAT)


def wants_other_output(argv: list[str]) -> bool:
    """Whether a command line may write JSON lines to standard output: all but those that ask for help."""
    return not {"-h", "--help"} & set(argv)
