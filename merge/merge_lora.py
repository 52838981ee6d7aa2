"""Merge a LoRA: `merge.py` under RWKV-PEFT's name, also for `ALPHA BASE ADAPTER OUTPUT` without flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_bone.commands import merge

if __name__ == "__main__":
    sys.exit(merge("merge/merge_lora.py", "lora"))
