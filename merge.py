"""Merge: `python merge.py --help` lists every flag; `scripts/merge_bone.sh` is a complete example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone import cli


def main() -> None:
    config = cli.parse_merge(sys.argv[1:])
    # Imported late: --help and mistakes in the flags are answered at once.
    from rwkv_bone.merging import merge_files

    print("\n".join(merge_files(config)))


if __name__ == "__main__":
    sys.exit(cli.run(main))
