"""Merge: `python merge.py --help` lists every flag; `scripts/merge_bone.sh` is a complete example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone.commands import merge

if __name__ == "__main__":
    sys.exit(merge("merge.py"))
