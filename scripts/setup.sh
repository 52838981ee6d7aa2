#!/bin/sh
# Finds or makes the Python environment: sh scripts/setup.sh [--dev]
#
# The active python3 is used as it is if it satisfies requirements.txt; it is never changed. Otherwise .venv is made in
# the repository (once; a second call only checks it), on top of an installed torch if that will do. A torch that it
# installs itself is a build for CUDA that the NVIDIA driver of this machine runs. pip's own settings apply: a
# PIP_INDEX_URL or PIP_EXTRA_INDEX_URL that ends in /cpu, /cu126 or the like chooses another build. --dev adds what the
# tests need. Prints the path of the python to use on standard output, and what it does on standard error. Where it
# cannot go on it says why and what to do, and ends with status 2; the next call then removes what is half made.
# Several calls at once, also on machines that share the folder, make one .venv: the others wait, and say for whom.
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

repo=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0" 2> /dev/null || printf '%s\n' "$0")")/.." && pwd)
venv=$repo/.venv
unfinished=$venv/.unfinished # lies there while something is being installed
lock=$venv.lock              # lies there, with process@machine, while a call is at work
log=$venv/pip.log

say() { printf '%s\n' "setup: $*" >&2; }
die() { say "$@"; exit 2; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' > /dev/null 2>&1; }
version() {
    "$1" -c 'import platform; print("Python " + platform.python_version())' 2> /dev/null || echo 'no Python that works'
}
lacks() { "$1" "$repo/scripts/requirements_met.py" "$2" ${3:+"$3"} 2>&1; } # prints nothing when all is there
# devices QUESTION: the answer of src/rwkv_bone/devices.py.
devices() { PYTHONPATH=$repo/src${PYTHONPATH:+:$PYTHONPATH} "$python" -m rwkv_bone.devices "$1"; }

case "${1:-}" in
    '') requirements=$repo/requirements.txt ;;
    --dev) requirements=$repo/requirements-dev.txt ;;
    *) die "unknown option $1; expected --dev or nothing" ;;
esac
or_activate="or activate an environment that has what $requirements names; then run the same command again"
[ -d "$repo/src/rwkv_bone" ] || die "$0 is a copy: run scripts/setup.sh in the repository itself"

report() { # report WHICH [check]: what is used; check: also whether its torch can use the card
    about=$(devices "${2:-about}")
    say "using $python ($about), $1"
    compiler=
    for name in ${CXX:-g++ c++ clang++}; do
        if command -v "$name" > /dev/null; then compiler=$name; fi
    done
    if [ -z "$compiler" ] && [ -n "${CXX:-}" ]; then
        say "CXX=$CXX: there is no such compiler; correct the variable, or unset it. A GPU needs none"
    elif [ -z "$compiler" ]; then
        say "no C++ compiler: on the CPU the WKV operator runs in its slower PyTorch form; install one (Debian: g++)." \
            "A GPU needs none"
    fi
    echo "$python"
    exit 0
}

# give_up WHAT: WHAT did not work. The log of pip and the disk may show why; otherwise the message above does.
give_up() {
    free=$(df -Pk -- "$repo" 2> /dev/null | awk 'NR == 2 { print int($4 / 1024) }') || free=
    if grep -qs 'No space left on device' "$log" || [ "${free:-1000}" -lt 100 ]; then
        die "$1: the disk is full. Make room ($free MB are free at $repo; PyTorch for CUDA and the rest take 6000)" \
            "or, where ${TMPDIR:-/tmp} is what is full, set TMPDIR to a folder elsewhere, $or_activate"
    elif grep -Eqs 'connection broken by|onnection error|Max retries exceeded|ReadTimeout' "$log"; then
        die "$1: it cannot reach the package index. Check the network (behind a proxy set HTTPS_PROXY, for a mirror" \
            "PIP_INDEX_URL), $or_activate"
    fi
    die "$1, for the reason above. Fix that, $or_activate"
}

# install WORDS...: pip installs them into .venv.
install() {
    rm -f -- "$log"
    "$python" -m pip install --log "$log" --disable-pip-version-check "$@" >&2 && return
    [ -n "$made" ] || rm -f -- "$unfinished" # an older environment, in which pip has put back what it took away
    give_up "pip could not install what is missing"
}

python=$(command -v python3 || command -v python || true)
if [ -z "$python" ]; then
    missing='it has no python3'
elif ! recent "$python"; then
    missing="it has $(version "$python"), and 3.10 or newer is needed"
elif missing=$(lacks "$python" "$requirements"); then
    report "the active environment"
else
    missing="$missing (to use it: $python -m pip install -r '$requirements')"
fi
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
[ -z "$active" ] || say "not using the active environment $active: $missing"

# is_complete: .venv has everything, and nobody is at work in it.
is_complete() {
    set -- "$venv"/lib/python3*/site-packages/rwkv_bone.pth
    [ -e "$1" ] && [ ! -e "$unfinished" ] && [ ! -e "$lock" ] && recent "$venv/bin/python" &&
        lacks "$venv/bin/python" "$requirements" > /dev/null
}
if is_complete; then
    python=$venv/bin/python
    report "the environment of this repository"
fi

trap 'say "interrupted. Run the same command again: it begins anew"; exit 130' INT
trap 'say "interrupted. Run the same command again: it begins anew"; exit 143' TERM HUP
machine=$(uname -n) waited=0 blank=0
until (set -C && echo "$$@$machine" > "$lock") 2> /dev/null; do # makes the file only where there is none
    owner=
    { read -r owner < "$lock"; } 2> /dev/null || true
    process=${owner%@*}
    if [ -z "$owner" ]; then
        # Just made, or just gone; or it cannot be written, and then what follows says why.
        blank=$((blank + 1))
        [ "$blank" -lt 3 ] || break
    elif [ "${owner#*@}" = "$machine" ] && [ ! -d "/proc/$process" ] && ! kill -0 "$process" 2> /dev/null; then
        say "removing $lock of process $process, which has ended"
        rm -f -- "$lock"
        continue
    elif [ $((waited % 60)) -eq 0 ]; then
        say "waiting for process $process on ${owner#*@}, which is making $venv ($waited seconds; if it is not at work" \
            "there any more, remove $lock)"
    fi
    waited=$((waited + 1))
    sleep 1
done
trap 'rm -f -- "$lock"' EXIT
if [ -e "$unfinished" ]; then
    say "removing $venv, whose installation was interrupted"
    rm -rf -- "$venv" || give_up "$venv could not be removed"
fi
made=
if [ ! -x "$venv/bin/python" ]; then
    base=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if recent "$name"; then
            base=$name
            break
        fi
    done
    [ -n "$base" ] || die "no Python 3.10 or newer on PATH; found $(version "${python:-python3}")." \
        "Install one (Debian: apt install python3 python3-venv; conda: conda create -n rwkv python=3.12), $or_activate"
    "$base" -c 'import ensurepip, venv' 2> /dev/null ||
        die "$base has no venv module. Install it (Debian: apt install python3-venv), $or_activate"
    say "making $venv"
    made=yes
    mkdir -p -- "$venv" || give_up "$venv cannot be made"
fi

python=$venv/bin/python
check=about
if [ -n "$made" ]; then
    echo > "$unfinished" || give_up "$venv cannot be written"
    # First with sight of the packages of the Python below it, to learn whether that has a usable torch.
    "$base" -m venv --without-pip --system-site-packages "$venv" >&2 || give_up "$base could not make $venv"
    sees_base=
    if lacks "$python" "$repo/requirements.txt" torch > /dev/null; then sees_base=yes; fi
    "$base" -m venv ${sees_base:+--system-site-packages} "$venv" >&2 || give_up "$base could not make $venv"
fi
recent "$python" || die "$venv has $(version "$python"): remove that folder, and run the same command again"
if ! missing=$(lacks "$python" "$requirements"); then
    say "$missing: installing (minutes, the first time)"
    echo > "$unfinished" || give_up "$venv cannot be written"
    if ! lacks "$python" "$repo/requirements.txt" torch > /dev/null; then
        torch=$(devices pip) || exit 2
        # shellcheck disable=SC2086 # several words: a version, perhaps an index
        install $torch
    fi
    install --quiet -r "$requirements"
    "$python" -c 'import deepspeed, lightning, torch' > /dev/null ||
        give_up "what pip installed cannot be imported"
    check=check
fi
for folder in "$venv"/lib/python3*/site-packages; do
    [ -e "$folder/rwkv_bone.pth" ] || echo ../../../../src > "$folder/rwkv_bone.pth" # makes rwkv_bone importable
done
rm -f -- "$unfinished"
report "the environment of this repository" "$check"
