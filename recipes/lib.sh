# shellcheck shell=sh disable=SC2154,SC2034 # $repo and the settings are the recipe's; run reads not_flags
# What the recipes share. They source it with $repo, the repository's folder, and with their flags in "$@".
#
# A recipe's variables are its settings. Those in $own are for its own steps, all others are flags of the program that
# trains. A flag on the command line sets its variable, and if it is not in $own it stays in "$@", for that program.
# Each step sees what an earlier call has finished, says so and goes on; the programs refuse other settings by name.
own='output methods tasks gsm8k math humaneval execute_code held prompts limit max_new batch'

# shellcheck source-path=SCRIPTDIR source=../scripts/lib.sh
. "$repo/scripts/lib.sh"
not_flags="repo $own"
say() { printf '%s\n' "recipe    $*"; }

# paths_from FOLDER: makes the setting $_name, if it is a path, one that begins at this folder.
paths_from() {
    _kept_repo=$repo repo=$1
    eval "_value=\$$_name"
    case $_name in
        load_model | gsm8k | math | humaneval) _value=$(in_repo_or_hub "$_value") ;;
        output | output_dir | held | prompts | model_name_or_path | data_path) _value=$(in_repo "$_value") ;;
    esac
    eval "$_name=\$_value"
    repo=$_kept_repo
}

smoke=0 plan=0 given='' # --smoke 1: the bundled model and a few rows; --plan 1: what the training would take
_left=$#
while [ "$_left" -gt 0 ]; do # sets variables; what is not the recipe's own goes back to the end of "$@"
    _word=$1 _left=$((_left - 1)) _kept=1
    shift
    case $_word in
        -h | --help)
            sed -n '2,/^# shellcheck/s/^# \{0,1\}//p' "$0" | sed '$d'
            printf '\nsettings:\n'
            sed -n -e '/^repo=/q' -e 's/^\([a-z][a-z0-9_]*=\)/    --\1/p' "$0"
            exit 0
            ;;
        --?*) ;;
        *) die "$_word: expected flags, --name value (--help lists them)" ;;
    esac
    _name=${_word%%=*}
    _name=${_name#--}
    case " smoke plan $own " in *" $_name "*) _kept='' ;; esac
    case $_name in
        smoke | plan) ;;
        *[!a-z0-9_]*) assigns "$_name" || _name= ;;
        *)
            if ! assigns "$_name"; then
                [ -n "$_kept" ] || die "--$_name is no setting of this recipe (--help lists them)"
                _name=
            fi
            ;;
    esac
    [ -z "$_kept" ] || set -- "$@" "$_word"
    _value='' _count=0
    case $_word in
        *=*) _value=${_word#*=} _count=1 ;;
        *)
            while [ "$_left" -gt 0 ]; do
                case $1 in --*) break ;; esac
                _value="$_value${_value:+ }$1" _count=$((_count + 1)) _left=$((_left - 1))
                [ -z "$_kept" ] || set -- "$@" "$1"
                shift
            done
            ;;
    esac
    [ -n "$_name" ] || continue
    case $_name$_count in
        methods[1-9]* | tasks[1-9]*) ;;
        data_file* | eval_data* | *1) ;;
        *) die "--$_name: expected one value" ;;
    esac
    case $_name$_value in
        smoke0 | smoke1 | plan0 | plan1) ;;
        smoke* | plan*) die "--$_name $_value: expected 0 or 1" ;;
    esac
    case $_name in data_file | eval_data) ;; *) eval "$_name=\$_value" && paths_from "$PWD" ;; esac
    given="$given $_name"
done

# small NAME=VALUE...: with --smoke 1 gives settings these values, but for those of the command line. They are quoted,
# or lib.sh would find them as assignments of the recipe.
small() {
    [ "$smoke" = 1 ] || return 0
    for _setting in load_model=assets/rwkv7-tiny.pth ctx_len=512 micro_bsz=2 accumulate_grad_batches=1 epoch_count=1 \
        epoch_steps=2 lr_init=1e-3 lr_final=1e-4 warmup_steps=0 accelerator=cpu devices=1 limit=2 max_new=24 "$@"; do
        case " $given " in *" ${_setting%%=*} "*) ;; *) eval "${_setting%%=*}=\${_setting#*=}" ;; esac
    done
    say 'a smoke run: a tiny model and a few rows; it shows that the steps work, and its numbers mean nothing'
}

# need NAME WHAT: ends here if the file that the setting NAME names is not there. WHAT says what is expected.
need() {
    case $plan$1 in 1load_model | 1data_path | 0*) ;; *) return 0 ;; esac # a plan needs no questions
    _name=$1
    eval "_typed=\$$1"
    paths_from "$repo"
    eval "_value=\$$1"
    case $_value in
        '') die "--$1 is empty: expected $2" ;;
        /*) [ -e "$_value" ] || die "--$1 $_typed: there is no such file or folder; expected $2" ;;
    esac
}

# train FOLDER FLAG...: train.py with the recipe's settings and these flags, into FOLDER.
train() {
    _folder=$1
    shift
    [ "$plan" = 0 ] || set -- --plan 1 "$@"
    say "training: $_folder"
    (run train.py --proj_dir "$_folder" "$@")
}

# check_methods FLAG...: ends here if train.py would refuse the recipe's settings, with these flags, for one of $methods:
# a mistyped flag shows before the base has answered for an hour.
check_methods() {
    [ "$plan" = 0 ] || return 0 # which refuses them itself
    for _method in $methods; do
        of_equal_size "$_method"
        # shellcheck disable=SC2086 # the words of $_adapter
        _said=$(run rwkv_bone.config.flags --proj_dir "$output/$_method" $_adapter "$@" 2>&1) ||
            { printf '%s\n' "$_said" >&2; exit 2; }
    done
}

# last_of FOLDER: the file of the last epoch there.
last_of() { printf '%s\n' "$1/rwkv-$((epoch_count - 1)).pth"; }

# merge ADAPTER MODEL FLAG...: folds the adapter into the base.
merge() {
    [ "$plan" = 0 ] || return 0
    _adapter=$1 _model=$2
    shift 2
    if [ -n "$(find "$_model" -newer "$_adapter" 2> /dev/null)" ]; then
        say "merged already: $_model"
    else # merge.py refuses a file that is there, such as that of another adapter
        "$RWKV_PYTHON" "$repo/merge.py" --base_model "$load_model" --peft_checkpoint "$_adapter" --output "$_model" "$@"
    fi
}

# evaluate FOLDER FLAG...: a task's answers and their count, into FOLDER. Goes on where an earlier call was stopped.
evaluate() {
    [ "$plan" = 0 ] || return 0
    _folder=$1
    shift
    say "evaluation: $_folder"
    sh "$repo/scripts/evaluate.sh" --output "$_folder" "$@"
}

# compare FOLDER FOLDER: two evaluations of the same questions, by McNemar's exact test.
compare() { [ "$plan" = 1 ] || sh "$repo/scripts/compare.sh" "$@"; }

# compare_methods TASK: a table of the base and $methods; the pages of scripts/compare.sh against the first method.
compare_methods() {
    [ "$plan" = 0 ] || return 0
    _first=${methods%% *}
    mkdir -p "$output/comparisons"
    for _method in base $methods; do
        [ "$_method" = "$_first" ] || compare "$output/answers/$_first-$1" "$output/answers/$_method-$1" \
            > "$output/comparisons/$1-$_method.txt"
    done
    say "comparisons with $_first, item by item: $output/comparisons"
    # shellcheck disable=SC2086 # the words of $methods
    "$RWKV_PYTHON" "$repo/recipes/table.py" "$output/answers" "$1" "$_first" base $methods
}

# of_equal_size METHOD: $_adapter becomes its flags. A block of 64 has as many parameters as LoRA's two matrices of rank
# 32 in an RWKV-7: 64 of each of 9 C outputs a layer, and 32 of 18 C inputs and outputs (tests/recipes/test_recipes.py).
of_equal_size() {
    case $1 in
        lora) _adapter='--peft lora --lora_r 32 --lora_alpha 64' ;; # alpha = 2 r, as in the paper
        rslora) _adapter='--peft lora --lora_r 32 --lora_alpha 64 --lora_rs 1' ;;
        pissa) _adapter='--peft pissa --lora_r 32' ;;
        bone) _adapter='--peft bone --bone_r 64' ;;
        bat) _adapter='--peft bone --bone_mode bat --bone_r 64' ;;
        *) die "--methods: $1 is none of lora rslora pissa bone bat" ;;
    esac
}

# answers MODEL FILE FLAG...: MODEL answers $prompts into FILE, as JSON lines.
answers() {
    [ "$plan" = 0 ] || return 0
    _model=$1 _file=$2
    shift 2
    if [ -s "$_file" ]; then
        say "answered already: $_file"
    else
        mkdir -p "${_file%/*}"
        sh "$repo/scripts/chat.sh" --load_model "$_model" --prompts "$prompts" "$@" > "$_file.part"
        mv -- "$_file.part" "$_file"
        say "answers: $_file"
    fi
}

# free_port: a port of this machine that nothing listens on.
free_port() {
    "$RWKV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

for _name in output prompts; do ! assigns "$_name" || paths_from "$repo"; done
RWKV_PYTHON=${RWKV_PYTHON:-$(sh "$repo/scripts/setup.sh")}
export RWKV_PYTHON
