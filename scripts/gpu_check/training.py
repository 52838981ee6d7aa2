"""Run a training script and note what it left: training.py ROWS NAME FOLDER COMMAND ...

Exits with the command's status, or with 1 if the held-out loss did not fall.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from rows import append


def figures(folder: Path) -> dict:
    """Of a finished run: losses, and what its steps took."""
    records = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    heldout = json.loads((folder / "evaluation.json").read_text())
    later = records[len(records) // 2 :]  # the first steps warm up
    # Those that there are: a processor has no reserved memory.
    peaks = {key: max(r[key] for r in records) for key, x in records[0].items() if key.startswith("peak_") and x}
    return {
        "steps": len(records),
        "loss": [records[0]["loss"], records[-1]["loss"]],
        "heldout": [heldout[when]["loss"] for when in ("before", "after")],
        "exact_match": [heldout[when]["exact_match"] for when in ("before", "after")],
        "step_seconds": statistics.median(r["seconds"] for r in later),
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in later),
        **peaks,
    }


def main(rows: str, name: str, folder: str, *command: str) -> int:
    status = subprocess.run(command).returncode
    if status:
        return status
    found = figures(Path(folder))
    append(Path(rows), {"what": "run", "name": name, **found})
    before, after = found["heldout"]
    print(f"held-out loss {before:.4f} -> {after:.4f}, {found['tokens_per_s']:,.0f} tokens/s")
    return not after < before


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
