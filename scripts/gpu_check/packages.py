"""Which packages are there.

packages.py report            each that is missing or of another version than wanted, and what that means
packages.py lacking NAME ...  those of the names that are not installed, on one line
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from requirements_met import unmet  # noqa: E402

# What cannot run without them. The parts of the check are named as there.
MEANING = {
    "lightning": "nothing trains: parts run, stages and resume",
    "deepspeed": "nothing trains: parts run, stages and resume",
    "matplotlib": "training cannot draw its loss curve: parts run, stages and resume",
    "tqdm": "nothing trains: parts run, stages and resume",
    "ninja": "nothing here: DeepSpeed compiles nothing",
    "pyrwkv-tokenizer": "World models cannot be trained; the bundled one reads bytes",
    "tokenizers": "tokenizer.json files cannot be read; the bundled model reads bytes",
    "pytest": "no tests: parts quick and tests",
    "hypothesis": "no tests: part tests",
    "pytest-xdist": "the tests take longer, one after the other",
    "bitsandbytes": "nf4 and fp4 run in PyTorch, slower; its tests are skipped",
}
OPTIONAL = ("pytest", "hypothesis", "pytest-xdist", "bitsandbytes")


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def problems(requirements: Path) -> Iterator[str]:
    """What is missing or of another version, and what that means."""
    found = dict(unmet(requirements))
    found |= {name: f"{name} is not installed" for name in OPTIONAL if not installed(name)}
    for name, problem in found.items():
        yield f"{problem}: {MEANING.get(name, 'what needs it fails')}"


def report() -> None:
    lines = list(problems(REPOSITORY / "requirements.txt"))
    print("\n".join([*lines, f"{len(lines)} missing or of another version than wanted" if lines else "all there"]))


if __name__ == "__main__":
    if sys.argv[1] == "report":
        report()
    else:
        print(", ".join(name for name in sys.argv[2:] if not installed(name)))
