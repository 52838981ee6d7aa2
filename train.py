"""Train: `python train.py --help` lists every flag; `scripts/run_bone.sh` is a complete example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone.commands import train

if __name__ == "__main__":
    sys.exit(train("train.py"))
