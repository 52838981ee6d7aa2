"""Train: `python train.py --help` lists every flag; `scripts/run_bone.sh` is a complete example."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program hears it: no traceback of imports

from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone.commands import train

if __name__ == "__main__":
    sys.exit(train("train.py"))
