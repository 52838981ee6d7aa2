"""Merge: `python merge.py --help` lists every flag; `scripts/merge_bone.sh` is a complete example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone.config.flags import parse_merge
from rwkv_bone.errors import exit_status


def main() -> None:
    config = parse_merge(sys.argv[1:])
    # Imported late: --help and mistakes in the flags are answered at once.
    from rwkv_bone.conversion.merge import merge_files

    print("\n".join(merge_files(config)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
