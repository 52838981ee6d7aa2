"""Exit 0 if the Python that runs this satisfies a requirements file, else print the first that is missing and exit 1.

Usage: requirements_met.py FILE [NAME ...]. With names, only those requirements count. Nothing is imported but installed
metadata is read, so the answer takes a fraction of a second.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit("neither packaging nor pip is installed")


def requirements(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from requirements(path.parent / line[3:].strip())
        elif line:
            yield Requirement(line)


def unmet(path, names=()):
    """Yields (name, what is wrong with it) of each requirement that is not satisfied."""
    for wanted in requirements(Path(path)):
        if names and wanted.name not in names:
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield wanted.name, f"{wanted} is not installed"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield wanted.name, f"{wanted} is needed, {found} is installed"


def main(path, *names):
    for _, problem in unmet(path, names):
        sys.exit(problem)


if __name__ == "__main__":
    main(*sys.argv[1:])
