"""`merge.py` of this repository, where RWKV-PEFT's scripts look for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_bone.commands import merge

if __name__ == "__main__":
    sys.exit(merge("merge/merge.py"))
