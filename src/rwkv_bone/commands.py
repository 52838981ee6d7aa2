"""The console scripts of the installed package. `train.py` and `merge.py` are the first two, for a checkout.

Each function parses `sys.argv`, does the work and returns the exit status. `prog` is the name that usage and errors
show. Imports are late: --help and mistakes in the flags are answered at once.
"""

from __future__ import annotations

import os
import sys

from rwkv_bone import signals
from rwkv_bone.errors import exit_status
from rwkv_bone.imports import uncollected


def train(prog: str = "rwkv-bone-train") -> int:
    """Fine-tune an RWKV model."""
    signals.hear()

    def body() -> None:
        from rwkv_bone import cards
        from rwkv_bone.config.flags import parse_train

        config = cards.settled(parse_train(sys.argv[1:], prog))
        from rwkv_bone.cluster.join import join
        from rwkv_bone.cluster.watch import Watch

        if config.run.plan:
            with join(config) as world, Watch(world, config.run.rank_timeout) as watch:
                with uncollected():
                    from rwkv_bone.planning.plan import plan as say_plan

                say_plan(config, watch)
            return
        # From here on a process that is lost is noticed, also while another loads the libraries.
        with join(config) as world, Watch(world, config.run.rank_timeout) as watch:
            with uncollected():
                from rwkv_bone.training.fit import fit

            fit(config, watch)

    return exit_status(body)


def plan(prog: str = "rwkv-bone-plan") -> int:
    """Say what a run would take; the flags are those of `train`."""
    sys.argv += ["--plan", "1"]
    return train(prog)


def merge(prog: str = "rwkv-bone-merge", kind: str = "") -> int:
    """Fold an adapter into its base checkpoint. kind: of the adapter, for the programs in merge/."""

    def body() -> None:
        from rwkv_bone.config.flags import parse_merge

        config = parse_merge(sys.argv[1:], prog, kind)
        from rwkv_bone.conversion.stopping import stoppable

        with stoppable():
            from rwkv_bone import allocator
            from rwkv_bone.conversion.merge import merge_files

            allocator.keep()
            print("\n".join(merge_files(config)))

    return exit_status(body)


def convert(prog: str = "rwkv-bone-convert") -> int:
    """Convert an adapter from one format to another."""

    def body() -> None:
        from rwkv_bone.conversion.flags import parse_convert

        config = parse_convert(sys.argv[1:], prog)
        from rwkv_bone.conversion.stopping import stoppable

        with stoppable():
            from rwkv_bone import allocator
            from rwkv_bone.conversion.convert import convert

            allocator.keep()
            print("\n".join(convert(config)))

    return exit_status(body)


def doctor(prog: str = "rwkv-bone-doctor") -> int:
    """Look whether this machine is fit for training; 1 if it is not."""
    status = []

    def body() -> None:
        from rwkv_bone.doctor.examine import main

        status.append(main(sys.argv[1:], prog))

    return exit_status(body) or status[0]


def preview(prog: str = "rwkv-bone-preview") -> int:
    """Show what a run would train on."""

    def body() -> None:
        from rwkv_bone.data.preview import main

        main(prog)

    return exit_status(body, shows=True)


def compare(prog: str = "rwkv-bone-compare") -> int:
    """Make one page of several runs, or compare two evaluations."""
    if any(os.path.isfile(os.path.join(word, "answers.jsonl")) for word in sys.argv[1:]):
        from rwkv_bone.evaluation.compare import main
    else:
        from rwkv_bone.report.compare import main

    return main(prog)


def evaluate(prog: str = "rwkv-bone-evaluate") -> int:
    """Count a model's right answers to a benchmark's questions."""

    def body() -> None:
        from rwkv_bone.evaluation.main import main

        main(prog)

    return exit_status(body, shows=True)


def chat(prog: str = "rwkv-bone-chat") -> int:
    """Talk to a model, or have it answer prompts."""

    def body() -> None:
        from rwkv_bone.chat.main import main

        main(prog)

    return exit_status(body, shows=True)


def lm_eval(prog: str = "rwkv-bone-lm-eval") -> int:
    """Evaluate a model with EleutherAI's lm_eval."""

    def body() -> None:
        from rwkv_bone.evaluation.harness_main import main

        main(prog)

    return exit_status(body, shows=True)
