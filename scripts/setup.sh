#!/bin/sh
# Finds or makes the Python environment: sh scripts/setup.sh [--dev]
#
# The active python3 is used as it is if it satisfies requirements.txt; it is never changed. Otherwise .venv is made in
# the repository (once; a second call only checks it), on top of an installed torch if that will do. A torch that it
# installs itself is a build for CUDA that the NVIDIA driver of this machine runs. pip's own settings apply: a
# PIP_INDEX_URL or PIP_EXTRA_INDEX_URL that ends in /cpu, /cu126 or the like chooses another build. --dev adds what the
# tests need. Prints the path of the python to use on standard output, and what it does on standard error.
set -eu

repo=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$repo/.venv
unfinished=$venv/.unfinished # lies there while the environment is being made

say() { echo "setup: $*" >&2; }
die() { say "$@"; exit 2; }
lacks() { "$1" "$repo/scripts/requirements_met.py" "$2" ${3:+"$3"} 2>&1; } # prints nothing when all is there
devices() { PYTHONPATH=$repo/src${PYTHONPATH:+:$PYTHONPATH} "$python" -m rwkv_bone.devices "$1"; } # src/rwkv_bone/devices.py, with its questions
install() { "$python" -m pip install --disable-pip-version-check "$@" >&2; }

case "${1:-}" in
    '') requirements=$repo/requirements.txt ;;
    --dev) requirements=$repo/requirements-dev.txt ;;
    *) die "unknown option $1; expected --dev or nothing" ;;
esac

report() { # report WHICH [check]: what is used; check: also whether its torch can use the card
    about=$(devices "${2:-about}")
    say "using $python ($about), $1"
    if ! command -v "${CXX:-c++}" > /dev/null && ! command -v g++ > /dev/null && ! command -v clang++ > /dev/null; then
        say "no C++ compiler: on the CPU the WKV operator runs in its slower PyTorch form; install one (Debian: g++)." \
            "A GPU needs none"
    fi
    echo "$python"
    exit 0
}

python=$(command -v python3 || command -v python || true)
if [ -n "$python" ] && missing=$(lacks "$python" "$requirements"); then
    report "the active environment"
fi
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    say "not using the active environment: ${missing:-it has no python3}"
fi

if [ -e "$unfinished" ]; then
    say "removing $venv, whose installation was interrupted"
    rm -rf -- "$venv"
fi
if [ ! -x "$venv/bin/python" ]; then
    base=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            base=$name
            break
        fi
    done
    [ -n "$base" ] || die "no Python 3.10 or newer on PATH; found $(python3 --version 2>&1 || true)"
    "$base" -c 'import ensurepip, venv' 2> /dev/null ||
        die "$base has no venv module; install it (Debian: python3-venv) or activate an environment with requirements.txt"
    say "making $venv"
    mkdir -p -- "$venv"
    : > "$unfinished"
    # First with sight of the packages of the Python below it, to learn whether that has a usable torch.
    "$base" -m venv --without-pip --system-site-packages "$venv" >&2
    if lacks "$venv/bin/python" "$repo/requirements.txt" torch > /dev/null; then
        "$base" -m venv --system-site-packages "$venv" >&2
    else
        "$base" -m venv "$venv" >&2
    fi
fi

python=$venv/bin/python
check=about
if ! missing=$(lacks "$python" "$requirements"); then
    say "$missing: installing (minutes, the first time)"
    if ! lacks "$python" "$repo/requirements.txt" torch > /dev/null; then
        torch=$(devices pip) || exit 2
        # shellcheck disable=SC2086 # several words: a version, perhaps an index
        install $torch
    fi
    install --quiet -r "$requirements"
    "$python" -c 'import deepspeed, lightning, torch' > /dev/null
    check=check
fi
for folder in "$venv"/lib/python3*/site-packages; do
    [ -e "$folder/rwkv_bone.pth" ] || echo ../../../../src > "$folder/rwkv_bone.pth" # makes rwkv_bone importable
done
rm -f -- "$unfinished"
report "the environment of this repository" "$check"
