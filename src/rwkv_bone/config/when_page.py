"""The tables of docs/settings.md: python -m rwkv_bone.config.when_page docs/settings.md

Which setting acts when, of each program, from the tables of `acts.py`.
"""

from __future__ import annotations

import sys

from rwkv_bone.config import acts, pages
from rwkv_bone.errors import exit_status

BEGIN = "<!-- Made by python -m rwkv_bone.config.when_page docs/settings.md: change config/acts.py. -->"
PROGRAMS = {
    "train.py, and scripts/preview_data.sh": acts.TRAIN,
    "scripts/preview_data.sh alone": acts.PREVIEW,
    "merge.py": acts.MERGE,
    "scripts/convert.sh": acts.CONVERT,
    "scripts/chat.sh": acts.CHAT,
    "scripts/evaluate.sh": acts.EVALUATE,
    "train_hf.py": acts.HF,
}


def tables() -> str:
    """The tables, in Markdown."""
    return "\n\n".join(f"### {program}\n\n{_of(rows)}" for program, rows in PROGRAMS.items())


def _of(rows: acts.Table) -> str:
    return pages.table("setting | acts", [(f"`--{name}`", when.words) for name, when in rows.items()])


def renewed(page: str) -> str:
    """The text of the page with the tables of today; UserError if it has no marks for them."""
    return pages.renewed(page, BEGIN, tables())


def main() -> None:
    pages.write(renewed)


if __name__ == "__main__":
    sys.exit(exit_status(main))
