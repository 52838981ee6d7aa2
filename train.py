"""Train: `python train.py --help` lists every flag; `scripts/run_bone.sh` is a complete example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import exit_status


def main() -> None:
    config = parse_train(sys.argv[1:])
    # Imported late: --help and mistakes in the flags are answered at once.
    from rwkv_bone.training.fit import fit

    fit(config)


if __name__ == "__main__":
    sys.exit(exit_status(main))
