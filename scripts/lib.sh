# shellcheck shell=sh disable=SC2034 # its variables are used by the scripts that source it
# Sourced by the other scripts. Sets $repo, the repository's folder, and $python, after setting up the environment; a
# caller that names a Python in $RWKV_PYTHON gets that one as it is.
repo=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${RWKV_PYTHON:-$(sh "$repo/scripts/setup.sh")}

# in_repo PATH: a path relative to the repository as an absolute one. Absolute and empty ones stay as they are.
in_repo() {
    case $1 in
        '' | /*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$repo/$1" ;;
    esac
}

# newest_adapter FOLDER: the path of its rwkv-N.pth with the largest N, or nothing.
newest_adapter() {
    newest=
    for file in "$1"/rwkv-*.pth; do
        number=${file##*/rwkv-}
        number=${number%.pth}
        case $number in '' | *[!0-9]*) continue ;; esac
        if [ -z "$newest" ] || [ "$number" -gt "$newest" ]; then newest=$number; fi
    done
    [ -z "$newest" ] || printf '%s\n' "$1/rwkv-$newest.pth"
}
