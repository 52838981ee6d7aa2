"""The flags of evaluation. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_bone.config import BAD_ROWS, QUANTS, setting
from rwkv_bone.config.acts import EVALUATE
from rwkv_bone.config.fields import check_given, check_values
from rwkv_bone.config.flags import parse_section
from rwkv_bone.config.sections import ACCELERATORS, PRECISIONS
from rwkv_bone.errors import UserError

TASKS = ("gsm8k", "math", "humaneval", "svamp", "choice", "perplexity", "exact")
RULES = ("auto", "hashes", "flexible", "metamath", "number", "boxed", "minerva")
EXAMPLES = (
    (
        "a model with an adapter on GSM8K's test rows, with four worked examples before each question",
        "sh scripts/evaluate.sh --load_model my-model.pth --adapter out/mine/rwkv-1.pth --task gsm8k "
        "--data_file test.jsonl --shots 4 --shots_file train.jsonl --output out/gsm8k",
    ),
    (
        "HumanEval, ten samples each, with the code executed on this machine",
        "sh scripts/evaluate.sh --load_model my-model.pth --task humaneval --temperature 0.2 --top_p 0.95 --samples 10 "
        "--execute_code 1 --output out/humaneval",
    ),
    (
        "rows of your own: which answers are exactly the response",
        "sh scripts/evaluate.sh --load_model my-model.pth --task exact --data_file heldout.jsonl --output out/exact",
    ),
)


@dataclass(frozen=True)
class EvaluateConfig:
    load_model: str = setting(
        "", "model to evaluate: a .pth, .safetensors or .st file, an index of shards, a folder, or a name of the Hub"
    )
    adapter: str = setting("", "adapter to put on it: a file, or a directory of Hugging Face PEFT; empty = none")
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
        "how a question is written: raw (a text that the model completes), world, g1, g1-think, alpaca, or the path of "
        "a template; auto = that of the adapter's run, else of the model's folder, else world for the World tokenizer, "
        "else raw",
    )
    system: str = setting("", "text of a system turn at the beginning, for templates that have one; empty = none")
    task: str = setting("", "what is asked", TASKS)
    data_file: str = setting(
        "",
        "rows to evaluate on: a file, a folder, or a name of the Hub; empty = the test rows of the task, from the Hub",
    )
    task_field: tuple[str, ...] = setting(
        (), "names of the fields of your rows where they are not the task's: question=q answer=a.value"
    )
    limit: int = setting(0, "number of rows to evaluate, the first ones; 0 = all", at_least=0)
    bad_rows: str = setting("stop", "rows that cannot be used: stop, or skip and count them", BAD_ROWS)
    shots: int = setting(0, "number of worked examples before each question", at_least=0, at_most=1000)
    shots_file: str = setting("", "rows to take them from, chosen by the seed; never one that is evaluated")
    prompt: str = setting(
        "",
        r"how a question is put, with its fields in braces and \n for a line break, such as 'Q: {question}\nA:'; empty "
        "= as the task is published",
    )
    extract: str = setting(
        "auto",
        "what of an answer is judged: what follows #### (GSM8K's rule), lm_eval's flexible rule, what follows "
        "MetaMath's 'The answer is: ', the last number, the last \\boxed, Minerva's 'Final Answer'; auto = "
        "whichever of the marks of its kind the answer has",
        RULES,
    )
    execute_code: bool = setting(
        False, "1 = run the code that the model writes, on this machine; 0 = write it down, and do not judge it"
    )
    max_new: int = setting(
        0, "largest number of tokens of an answer; auto = the task's", at_least=1, at_most=10**7, auto=0
    )
    temperature: float = setting(
        0.0, "0 = always the most likely token; higher = more varied", at_least=0, warn_above=2
    )
    top_p: float = setting(
        1.0, "tokens are drawn from the most likely ones that reach this probability together", above=0, at_most=1
    )
    samples: int = setting(1, "number of answers to each question: maj@k and pass@k", at_least=1, at_most=10**4)
    seed: int = setting(
        0, "the same seed gives the same worked examples and the same answers", at_least=0, at_most=2**32 - 1
    )
    stop: tuple[str, ...] = setting(
        (),
        r"texts that end an answer, besides the end-of-document token, with \n for a line break; empty = what ends a "
        "turn in the template, or with raw what the task's publishers stop at",
    )
    batch: int = setting(32, "number of answers to write at a time", at_least=1, at_most=10**4)
    output: str = setting("", "folder for answers.jsonl, result.json and config.json; the same command goes on in it")
    overwrite: bool = setting(False, "1 = begin anew where the output holds an evaluation; 0 = go on with it")

    def __post_init__(self):
        check_given(self, "load_model", "output")
        if not self.task:
            raise UserError(f"--task is missing: expected one of {', '.join(TASKS)}")
        check_values(self)
        if any(not text for text in self.stop):
            raise UserError("--stop has an empty text, which would end every answer at once: remove it")
        for word in self.task_field:
            name, equals, value = word.partition("=")
            if not (name and equals and value):
                raise UserError(f"--task_field {word}: expected NAME=FIELD, such as question=q")
        if self.shots and not self.shots_file:
            raise UserError(
                f"--shots_file is missing: --shots {self.shots} takes worked examples from it, such as the task's "
                "training rows"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` with its line breaks."""
        return tuple(text.replace("\\n", "\n") for text in self.stop)

    @property
    def fields(self) -> dict[str, str]:
        """{name of the task: the user's name}."""
        return dict(word.split("=", 1) for word in self.task_field)


def parse_evaluate(argv: list[str], prog: str) -> EvaluateConfig:
    """The settings that `argv` asks for; UserError for anything unknown or missing. Notes go to standard error."""
    description = "Have a model answer a benchmark's questions, or your own, and count the right answers."
    return parse_section(prog, description, EvaluateConfig, argv, examples=EXAMPLES, table=EVALUATE)
