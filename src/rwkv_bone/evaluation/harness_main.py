"""lm_eval on a model: python -m rwkv_bone.evaluation.harness_main --load_model my-model.pth --tasks arc_easy

The flags of a model are ours; every other flag goes to lm_eval as it is, which refuses what it does not know.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from rwkv_bone.config import QUANTS, setting
from rwkv_bone.config.fields import check_given, check_values
from rwkv_bone.config.flags import Parser, add_fields
from rwkv_bone.config.layers import split_argv
from rwkv_bone.config.other_names import intended_flag
from rwkv_bone.config.sections import ACCELERATORS, PRECISIONS
from rwkv_bone.errors import UserError, exit_status

PROGRAM = "sh scripts/lm_eval.sh"
DESCRIPTION = "Evaluate a model, with or without an adapter, on the tasks of EleutherAI's lm_eval."
EPILOG = (
    "Every other flag goes to lm_eval as it is: --tasks, --num_fewshot, --limit, --apply_chat_template, --gen_kwargs, "
    "--output_path, --log_samples, --include_path and so on. `lm-eval run --help` lists them, `lm-eval ls tasks` the "
    "tasks."
)
EXAMPLES = (
    (
        "a model with an adapter on two tasks, their data from the Hub",
        "sh scripts/lm_eval.sh --load_model my-model.pth --adapter out/mine/rwkv-1.pth --tasks arc_easy,lambada_openai",
    ),
    (
        "five worked examples before each question, every answer kept",
        "sh scripts/lm_eval.sh --load_model my-model.pth --tasks gsm8k --num_fewshot 5 --output_path out/lm_eval "
        "--log_samples",
    ),
    (
        "tasks of your own, from a folder of .yaml files",
        "sh scripts/lm_eval.sh --load_model my-model.pth --tasks mine --include_path tasks",
    ),
)

NO_TASKS = "--tasks is missing: expected names of lm_eval's tasks, or paths of .yaml files"
# The names of these flags as arguments of the model class, where they differ.
ARGUMENTS = {"load_model": "pretrained", "adapter": "peft"}


@dataclass(frozen=True)
class HarnessConfig:
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
        "how messages are written with --apply_chat_template: world, g1, g1-think, alpaca, or the path of a template; "
        "auto = that of the adapter's run, else of the model's folder, else world for the World tokenizer",
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_given(self, "load_model")


def split(argv: list[str], prog: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """({setting: value}, the words for lm_eval, our flags) of a command line; UserError for a wrong value of ours."""
    parser = Parser(prog, DESCRIPTION, EXAMPLES)
    parser.epilog = EPILOG
    add_fields(parser.add_argument_group("settings"), HarnessConfig)
    values: dict[str, Any] = {}
    rest: list[str] = []
    for words in split_argv(argv):  # a script's variables, and what was typed over them
        given, others = parser.parse_known_args(words)
        values |= vars(given)
        rest += others
    return values, rest, [option for action in parser._actions for option in action.option_strings]


def main(prog: str = PROGRAM) -> None:
    """Have lm_eval evaluate the model: its tables go to standard output."""
    values, words, ours = split(sys.argv[1:], prog)
    try:
        from lm_eval._cli.harness import HarnessCLI
        from lm_eval.config.evaluate_config import EvaluatorConfig
        from lm_eval.utils import setup_logging
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        raise UserError("lm_eval is not installed: pip install -r requirements/lm_eval.txt") from None

    setup_logging()
    cli = HarnessCLI()
    _check_known(cli, words, ours, prog)
    cfg = HarnessConfig(**values)
    if not words:  # lm_eval would show its help
        raise UserError(NO_TASKS)
    sys.argv = ["lm-eval", "run", *words]
    args = cli.parse_args()
    file = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    _check(cfg, args, file)

    from rwkv_bone.devices import select_device
    from rwkv_bone.evaluation.harness import NAME

    args.model = NAME
    args.model_args = {
        ARGUMENTS.get(spec.name, spec.name): getattr(cfg, spec.name)
        for spec in fields(cfg)
        if spec.name != "accelerator" and getattr(cfg, spec.name) != spec.default
    }
    args.device = args.device or file.get("device") or select_device(cfg.accelerator)
    if "batch_size" not in args and "batch_size" not in file:
        args.batch_size = "auto"  # lm_eval's default is 1
    try:
        cli.execute(args)
    except ValueError as error:
        if not _raised_by_lm_eval(error):
            raise
        raise UserError(f"lm_eval: {error}") from error


def _check_known(cli: Any, words: list[str], ours: list[str], prog: str) -> None:
    """UserError for a flag that is neither ours nor lm_eval's."""
    theirs = cli._subparsers.choices["run"]
    _, unknown = theirs.parse_known_args(words)
    if unknown:
        meant = intended_flag(unknown[0], [*ours, *theirs._option_string_actions])
        hint = f"; did you mean {meant}?" if meant else ""
        raise UserError(f"{unknown[0].split('=')[0]} is not a flag of {prog}{hint} (--help lists them)")


def _check(cfg: HarnessConfig, args: Any, file: dict[str, Any]) -> None:
    """UserError for flags of lm_eval that ours replace, before the model is loaded."""
    for name in ("model", "model_args"):
        if getattr(args, name) is not None or file.get(name):
            where = f"--{name}" if getattr(args, name) is not None else f"{name} in --config {args.config}"
            raise UserError(f"{where}: the model is given by --load_model and the flags beside it: remove {name}")
    device = args.device or file.get("device")
    if device and cfg.accelerator != "auto":
        raise UserError(f"--accelerator {cfg.accelerator} and --device {device} of lm_eval say the same: give one")
    if not args.tasks and not file.get("tasks"):
        raise UserError(NO_TASKS)


def _raised_by_lm_eval(error: BaseException) -> bool:
    """Whether the line that raised it is lm_eval's: then it is about flags or tasks, and says what is wrong."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "lm_eval"


if __name__ == "__main__":
    sys.exit(exit_status(main, shows=True))
