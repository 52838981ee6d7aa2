"""Append one row to a file of rows: rows.py FILE WHAT KEY=VALUE ..., and say it on standard output.

For a check, `start` and `end` become `seconds`, and the log's last line becomes `last`, with paths by their last names,
since rows are kept and folders are of one machine; the end of a failing check's log is shown too.
"""

import json
import re
import sys
from pathlib import Path

SHOWN_LINES = 25
FOLDERS = re.compile(r"(?<![\w./])/(?:[\w.+-]+/)+")  # of an absolute path


def append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def check_row(fields: dict[str, str]) -> tuple[dict, list[str]]:
    """(the row of a check, the lines of its log)"""
    row = {"what": "check", **{key: fields[key] for key in ("part", "name", "status")}}
    log = []
    if "start" in fields:
        row["seconds"] = round(float(fields["end"]) - float(fields["start"]), 1)
        row |= {key: int(fields[key]) for key in ("limit", "code")}
        log = Path(fields["log"]).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(log) if line.strip()), "")
        row["last"] = FOLDERS.sub("", last)[-300:]
    if "why" in fields:
        row["why"] = fields["why"]
    return row, log


def main(path: str, what: str, *words: str) -> None:
    fields = dict(word.split("=", 1) for word in words)
    row, log = check_row(fields) if what == "check" else ({"what": what, **fields}, [])
    append(Path(path), row)
    if what == "check":
        took = f"{row['seconds']:6.1f} s" if "seconds" in row else " " * 8
        print(f"{row['status']:8} {took}  {row['name']:24} {row.get('why') or row['last']}", flush=True)
        if row["status"] not in ("pass", "not run"):
            print("".join(f"    | {line}\n" for line in log[-SHOWN_LINES:]), end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
