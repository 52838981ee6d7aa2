#!/bin/sh
# shellcheck disable=SC2329 # the functions part_* are called by their names
# Does everything run on this machine's GPU, and how fast: sh scripts/gpu_check.sh [--option value ...]
#
#   --out FOLDER       results: rows.jsonl (every check and figure), summary.md, logs/, and choice.json, a proposal for
#                      src/rwkv_bone/ops/choice.json from the measured times (default out/gpu_check)
#   --parts a,b        only these parts, of those listed at PARTS below, in that order
#   --budget SECONDS   what no longer fits is recorded as "not run" (default 480)
#   --device cuda|cpu  cpu: the same checks without a GPU
#   --quick            toy sizes, to test the check itself; a few minutes on two CPU cores
#
# The active python3 is used as it is, nothing is installed and no setting of the machine is changed; what is missing is
# named, and the parts that can do without it run. Wheels in the folder .whl of the repository, if there is one, are
# unpacked into a temporary folder. Each check has its own time limit, and a failing one does not stop the next.
# Exit status: 0 all passed, 1 something failed, 2 nothing was run, 3 nothing failed but not everything was run.
set -eu

PARTS='environment build quick run wkv regions tests steps stages memcheck packed resume slow'

repo=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
tools=$repo/scripts/gpu_check
out=$repo/out/gpu_check
parts=$PARTS
budget=480
device=cuda
quick=0

die() { echo "gpu_check: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1; shift; continue ;;
        --out | --parts | --budget | --device) [ $# -gt 1 ] || die "$1 needs a value" ;;
        *) die "unknown option $1; expected --out, --parts, --budget, --device or --quick" ;;
    esac
    case $1 in
        --out) out=$2 ;;
        --parts) parts=$(echo "$2" | tr , ' ') ;;
        --budget) budget=$2 ;;
        --device) device=$2 ;;
    esac
    shift 2
done
case $budget in '' | *[!0-9]*) die "--budget $budget: expected a whole number of seconds" ;; esac
case $device in cuda | cpu) ;; *) die "--device $device: expected cuda or cpu" ;; esac
for part in $parts; do
    case " $PARTS " in *" $part "*) ;; *) die "--parts $part: expected some of $PARTS" ;; esac
done
python=$(command -v python3 || command -v python) || die "there is no python3 on PATH"
"$python" -c 'import torch' 2> /dev/null || die "$python has no torch: activate an environment that has one"
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    die "torch of $python sees no GPU; the same checks without one: sh scripts/gpu_check.sh --device cpu --quick"
fi

mkdir -p -- "$out/logs"
out=$(CDPATH='' cd -- "$out" && pwd)
rows=$out/rows.jsonl
: > "$rows"
work=$(mktemp -d)
running=
trap '[ -z "$running" ] || { kill "$running"; wait "$running" || true; }; rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM

export RWKV_PYTHON="$python" PYTHONPATH="$work/site:$tools:$repo/src:$repo${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TMPDIR="$work/tmp"
mkdir -- "$TMPDIR"
# Kernels are built anew, so that the build is timed. The CPU's take longer and are not what is checked.
[ "$device" = cpu ] || export XDG_CACHE_HOME="$work/cache" TRITON_CACHE_DIR="$work/triton"
accelerator=gpu
patience=1 # times the limits below, which are about three times what an H100 needs
[ "$device" = cuda ] || { accelerator=cpu; patience=4; }

# --- running and recording ---

# seconds: since the machine started, in hundredths.
seconds() { cut -d ' ' -f 1 /proc/uptime; }
began=$(seconds)
# left: whole seconds of the budget.
left() { echo "$began $(seconds) $budget" | awk '{ print int($1 + $3 - $2) }'; }

record() { "$python" "$tools/rows.py" "$rows" check "part=$part" "$@"; }

# check NAME LIMIT COMMAND...: run it for at most LIMIT seconds and record how it went. Always succeeds. It is not begun
# where less than half of LIMIT is left, and is "cut" where the end of the budget ends it.
check() {
    name=$1 limit=$2
    shift 2
    available=$(left)
    if [ "$available" -lt $((limit / 2)) ]; then
        record "name=$name" 'status=not run' "why=of the $budget seconds too few were left"
        return 0
    fi
    allowed=$((limit * patience))
    whole=$allowed
    [ "$available" -ge "$allowed" ] || allowed=$available
    log=$out/logs/$name.txt
    start=$(seconds)
    code=0
    # In the background, since a signal is heard only while this script waits.
    (cd -- "$repo" && exec timeout -k 5 "$allowed" "$@") > "$log" 2>&1 < /dev/null &
    running=$!
    wait "$running" || code=$?
    running=
    status=pass
    [ "$code" -eq 0 ] || status=fail
    case $code in
        124 | 137)
            status=timeout
            [ "$allowed" -eq "$whole" ] || status='cut'
            ;;
    esac
    record "name=$name" "status=$status" "code=$code" "start=$start" "end=$(seconds)" "limit=$allowed" "log=$log"
}

# without NAME WHY: record that a check is left out.
without() { record "name=$1" 'status=not run' "why=$2"; }

# has PACKAGE...: whether all are installed; otherwise the part is recorded as not run.
has() {
    lacking=$("$python" "$tools/packages.py" lacking "$@")
    [ -z "$lacking" ] || { without "$part" "not installed: $lacking"; return 1; }
}

# pick QUICK FULL: the one that applies.
pick() { if [ "$quick" = 1 ]; then echo "$1"; else echo "$2"; fi; }

# --- the parts ---

part_environment() {
    check environment 60 "$python" "$tools/environment.py" "$rows"
    check requirements 30 "$python" "$tools/packages.py" report
}

# The kernels of all operators, as a training run gets them.
part_build() { check build 120 "$python" "$tools/build.py" "$device" "$rows"; }

# pytest_check NAME LIMIT WORDS...: tests for a GPU, or, without one, the forms of these tests for the CPU.
pytest_check() {
    test_name=$1 test_limit=$2
    shift 2
    marks='gpu and not slow'
    [ "$device" = cuda ] || marks='not gpu'
    [ "$part" != slow ] || marks='gpu and slow'
    # Two threads a process, so that several processes share the CPU.
    check "$test_name" "$test_limit" \
        env OMP_NUM_THREADS=2 "$python" -m pytest -p failures -p no:cacheprovider -m "$marks" "$@"
}

# workers DISTRIBUTION: flags of pytest for several processes, if there is a GPU and pytest-xdist.
workers() {
    if [ "$device" = cuda ] && [ -z "$("$python" "$tools/packages.py" lacking pytest-xdist)" ]; then
        echo "-n 6 --dist $1"
    fi
}

# The files of tests/ that hold tests for a GPU: others may need packages that are not there.
gpu_files() { cd -- "$repo" && grep -rl --include='test_*.py' 'mark\.gpu' tests; }

# WKV-7 against its reference, and the chunked kernels: where this fails nothing else means anything.
part_quick() {
    has pytest || return 0
    # shellcheck disable=SC2046 # lists of words
    {
        pytest_check quick 90 -x tests/ops/test_wkv7.py \
            -k "$(pick "public_function and length_17 and $device" 'not 31_bits')"
        [ "$quick" = 1 ] || pytest_check quick_chunked 120 $(workers load) -k 'not 31_bits' tests/ops/test_cuda_operators.py
    }
}

# Every other test for a GPU. A file's tests share what they train, but those of models are many and share little.
part_tests() {
    has pytest hypothesis || return 0
    models=tests/models/test_devices.py
    if [ "$quick" = 1 ]; then
        pytest_check tests 90 -k "$device and (bone-7 or answers)" "$models" tests/inference/test_generation_on_devices.py
        return 0
    fi
    # shellcheck disable=SC2046 # lists of words
    {
        pytest_check tests_models 90 $(workers load) "$models"
        pytest_check tests_others 180 $(workers loadfile) -k 'not 31_bits' \
            $(gpu_files | grep -v -e ops/test_wkv7 -e ops/test_cuda_operators -e ops/test_cuda_regions -e "$models")
    }
    [ "$device" = cpu ] || pytest_check tests_31_bits 60 tests/ops -k 31_bits
}

# What takes long on a GPU, too.
part_slow() {
    [ "$device" = cuda ] && has pytest hypothesis || return 0
    # shellcheck disable=SC2046 # lists of words
    pytest_check slow 300 $(workers load) $(gpu_files)
    check regions_inductor 240 "$python" benchmarks/regions.py --device "$device" --json "$rows"
}

# train NAME FOLDER FLAGS...: run_bone.sh, whose held-out loss must fall.
train() {
    run=$1 folder=$work/runs/$2
    shift 2
    check "$run" 150 "$python" "$tools/training.py" "$rows" "$run" "$folder" \
        sh "$repo/scripts/run_bone.sh" --accelerator "$accelerator" --proj_dir "$folder" "$@"
}

# short: flags of a run that is only to be seen working.
short() {
    pick '--epoch_count 1 --epoch_steps 6 --warmup_steps 2 --eval_samples 0' \
        '--epoch_count 1 --epoch_steps 40 --eval_samples 0'
}

# The two commands of README.
part_run() {
    has deepspeed lightning matplotlib || return 0
    # shellcheck disable=SC2046 # a list of flags
    train default default $(pick "$(short)" '')
    check merge 60 sh "$repo/scripts/merge_bone.sh" --output "$work/merged.pth" \
        --peft_checkpoint "$work/runs/default/$(pick rwkv-0 rwkv-3).pth"
}

part_stages() {
    has deepspeed lightning matplotlib || return 0
    # shellcheck disable=SC2046 # a list of flags
    {
        for stage in 1 2 3 2_offload 3_offload; do
            train "stage_$stage" "$stage" $(short) --strategy "deepspeed_stage_$stage"
        done
        train grad_cp grad_cp $(short) --strategy deepspeed_stage_3 --grad_cp 1
        train nf4 nf4 $(short) --quant nf4
        for task in dpo orpo; do
            train "$task" "$task" $(short) --task "$task" --data_file "$repo/assets/preferences_train.jsonl" \
                --eval_data "$repo/assets/preferences_heldout.jsonl"
        done
    }
}

# One epoch, then a second as its continuation.
part_resume() {
    has deepspeed lightning matplotlib || return 0
    # shellcheck disable=SC2046 # a list of flags
    train first_epoch resume $(short) --lr_schedule constant
    # shellcheck disable=SC2046
    train second_epoch resume $(short) --lr_schedule constant --epoch_count 2 --resume 1
}

# wkv NAME LIMIT WORDS...: time and error of kernels, WKV-7's in bf16 if not said otherwise.
wkv() {
    wkv_name=$1 wkv_limit=$2
    shift 2
    check "$wkv_name" "$wkv_limit" "$python" benchmarks/wkv.py --device "$device" --dtype bfloat16 --json "$rows" "$@"
}

part_wkv() {
    forms=own # every form on CUDA
    [ "$device" = cuda ] || forms=kernel
    if [ "$quick" = 1 ]; then
        wkv wkv7_toy 30 --shape 2 64 2 64 --repeat 3 --forms "$forms"
    else
        wkv wkv7_standard 60 --shapes standard choice --forms "$forms"
        wkv wkv7_w0 30 --shape 8 4096 40 64 --w0 --forms "$forms"
        wkv wkv7_float32 30 --shape 4 2048 32 64 --dtype float32 --forms "$forms"
        wkv wkv6_wkv5 40 --shape 4 2048 32 64 --operator wkv6 wkv5 --forms "$forms"
        wkv wkv6_wkv5_choice 60 --shapes choice --operator wkv6 wkv5 --forms "$forms"
    fi
    # A proposal, beside the rows.
    check choose 20 "$python" "$tools/choose.py" "$rows" "$repo/src/rwkv_bone/ops/choice.json"
}

part_packed() {
    if [ "$quick" = 1 ]; then
        wkv wkv7_packed 30 --shape 2 64 2 64 --documents 4 --repeat 3 --forms kernel
    else
        wkv wkv7_packed 30 --shape 4 4096 32 64 --documents 16 --forms kernel
    fi
}

# What is between the projections: its kernels against their definitions, then their time.
part_regions() {
    if [ "$quick" = 1 ]; then
        check regions 60 "$python" benchmarks/regions.py --device "$device" --quick --repeat 2 --json "$rows"
        return 0
    fi
    # shellcheck disable=SC2046 # a list of words
    if [ "$device" = cuda ] && has pytest; then
        pytest_check regions_tests 120 $(workers load) -k 'not 31_bits' tests/ops/test_cuda_regions.py
    fi
    check regions 60 "$python" benchmarks/regions.py --device "$device" --no_inductor --json "$rows"
}

# step NAME LIMIT WORDS...: a training step with random weights.
step() {
    step_name=$1 step_limit=$2
    shift 2
    check "$step_name" "$step_limit" "$python" benchmarks/step.py --device "$device" --json "$rows" "$@"
}

part_steps() {
    if [ "$quick" = 1 ]; then
        step step_toy 30 --size tiny --bsz 2 --ctx 64 --r 16 --steps 2
        step step_toy_packed 30 --size tiny --bsz 2 --ctx 64 --r 16 --steps 2 --documents 4 --grad_cp 0
    else
        step step_0.4B 60 --size 0.4B
        step step_0.4B_plain 60 --size 0.4B --regions torch
        step step_2.9B_8x4096 90 --size 2.9B --bsz 8 --ctx 4096 --steps 3
        step step_2.9B_8x4096_plain 90 --size 2.9B --bsz 8 --ctx 4096 --steps 3 --regions torch
        step step_1.5B 60 --size 1.5B
        step step_2.9B_2x4096_nocp 60 --size 2.9B --bsz 2 --ctx 4096 --grad_cp 0 --steps 3
        step step_2.9B_2x4096_wkv 60 --size 2.9B --bsz 2 --ctx 4096 --grad_cp wkv --steps 3
        step step_2.9B_packed 90 --size 2.9B --bsz 8 --ctx 4096 --documents 64 --steps 3
        step step_0.4B_torch 60 --size 0.4B --op torch --steps 2
    fi
}

# sanitize NAME LIMIT TOOL WORDS...: small problems under a tool of compute-sanitizer. Answers of the driver are not its
# business: ops/driver.py asks for what a module may not have, and checks every answer itself.
sanitize() {
    sanitize_name=$1 sanitize_limit=$2 tool=$3 apart=
    shift 3
    [ "$tool" != memcheck ] || apart='--report-api-errors no'
    # shellcheck disable=SC2086 # a list of flags
    check "$sanitize_name" "$sanitize_limit" "$sanitizer" --tool "$tool" $apart --error-exitcode 9 \
        "$python" "$tools/memcheck.py" cuda "$@"
}

# Small shapes of every kernel, under compute-sanitizer where there is a GPU.
part_memcheck() {
    if [ "$device" = cpu ]; then
        check memcheck 60 "$python" "$tools/memcheck.py" cpu
        return 0
    fi
    sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer || true)
    if [ -n "$sanitizer" ]; then
        sanitize memcheck 150 memcheck
        sanitize racecheck 90 racecheck chunked
        sanitize synccheck 60 synccheck chunked
    else
        for name in memcheck racecheck synccheck; do
            without "$name" 'compute-sanitizer is not installed (it comes with the CUDA toolkit)'
        done
    fi
}

# --- all of it ---

set -- "$repo"/.whl/*.whl
if [ -e "$1" ]; then
    part=environment
    check wheels 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$@"
fi
for part in $PARTS; do
    case " $parts " in
        *" $part "*)
            "part_$part"
            # After each part, so that it is there whatever becomes of the next.
            "$python" "$tools/summary.py" "$rows" "$out/summary.md" > "$work/summary" || true
            ;;
    esac
done
code=0
"$python" "$tools/summary.py" "$rows" "$out/summary.md" || code=$?
echo "results   $out/summary.md, $rows, $out/logs/"
exit "$code"
