"""Evaluation: python -m rwkv_bone.evaluation.main --load_model my-model.pth --task gsm8k --output out/gsm8k"""

from __future__ import annotations

import sys

from rwkv_bone.errors import exit_status
from rwkv_bone.evaluation.flags import parse_evaluate

PROGRAM = "sh scripts/evaluate.sh"


def main(prog: str = PROGRAM) -> None:
    """Answer a task's questions and count the right ones."""
    cfg = parse_evaluate(sys.argv[1:], prog)
    from rwkv_bone.evaluation.evaluate import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    sys.exit(exit_status(main, shows=True))
