"""Merge a Bone or Bat: `merge.py` under the name in RWKV-PEFT's scripts of 2025."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_bone.commands import merge

if __name__ == "__main__":
    sys.exit(merge("merge/merge_disha.py", "disha"))
