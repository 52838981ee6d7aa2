"""Evaluation: python -m rwkv_bone.evaluation.main --load_model my-model.pth --task gsm8k --output out/gsm8k"""

from __future__ import annotations

import sys

from rwkv_bone.errors import exit_status

PROGRAM = "sh scripts/evaluate.sh"


def main(prog: str = PROGRAM) -> None:
    """Answer a task's questions and count the right ones."""


if __name__ == "__main__":
    sys.exit(exit_status(main, shows=True))
