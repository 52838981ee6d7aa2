# shellcheck shell=sh disable=SC2154 # $repo and the settings are the script's
# What the scripts share that a user copies and edits. They source it with $repo, the repository's folder.
#
# The variables of a script are its settings. Of every `name=value` in its text, a name in small letters is passed as
# the flag --name, one in capitals is exported, and one that begins with _ is the script's own. The program refuses a
# flag that it does not know, so no variable is ignored in silence.
die() { printf '%s\n' "error: $*" >&2; exit 2; } # dash's echo would change backslashes
_lib=$repo/scripts/lib.sh # As in the scripts, comments let these lines run where lines end as on Windows.
! grep -q "$(printf '\r')" "$_lib" || die "Windows line ends; fix: sed -i 's/\r\$//' '$_lib'" #

[ -f "$0" ] || die "$0 is not the path of this script, whose text is read: run it as sh FILE"

# variables: the names that the script assigns, one a line, found in its text without what is quoted or a comment.
variables() {
    sed -E -e "s/'[^']*'|\"(\\\\.|[^\\\\\"])*\"|\\\\.|(^|[[:blank:]])#.*//g" -e '/^[[:blank:]]*export /d' "$0" |
        tr ';\t ' '[\n*]' | sed -n 's/^\([[:alpha:]][[:alnum:]_]*\)=.*/\1/p'
}
assigns() { variables | grep -Eqx "$1"; }

# in_repo PATH: a path relative to the repository as an absolute one. Absolute and empty ones stay as they are.
in_repo() {
    case $1 in
        '' | /*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$repo/$1" ;;
    esac
}

# in_repo_or_hub NAME: as in_repo, but owner/name stays as it is if the repository has no folder owner. Then it is a
# name of the Hugging Face Hub.
in_repo_or_hub() {
    case $1 in
        hf://*) printf '%s\n' "$1" ;;
        */*/* | /* | *[!0-9A-Za-z_./@-]*) in_repo "$1" ;;
        *.pth | *.safetensors | *.st | *.bin | *.json | *.jsonl | *.gz | *.csv | *.tsv | *.parquet | *.txt)
            in_repo "$1"
            ;;
        */?*) if [ -d "$repo/${1%/*}" ]; then in_repo "$1"; else printf '%s\n' "$1"; fi ;;
        *) in_repo "$1" ;;
    esac
}

# named_in_repo WORD: FILE or NAME=FILE, the file as in_repo_or_hub; a file with a = in its path stays whole.
named_in_repo() {
    case ${1%%=*} in
        "$1" | '' | *[/.:,[:blank:]]*) in_repo_or_hub "$1" ;;
        *) if [ -e "$repo/$1" ]; then in_repo "$1"; else printf '%s=%s\n' "${1%%=*}" "$(in_repo_or_hub "${1#*=}")"; fi ;;
    esac
}

# run PROGRAM ARGUMENT...: becomes train.py or the like, or a module, with the script's variables as flags, then
# --typed, then the arguments, which override them: the program leaves out, with a note, a variable that they leave
# without effect, and refuses an argument without effect. Variables named in $not_flags are left out. $own_flag is one
# more flag of the script's own.
not_flags=repo own_flag=
run() {
    _program=$1
    shift
    # A bare word would become one more value of the last flag above.
    case ${1:--} in -*) ;; *) die "$1: expected flags, --name value (--help lists them)" ;; esac
    _arguments=$#
    _names=$(variables)
    set -f
    for _name in $_names; do
        case " $not_flags " in *" $_name "*) continue ;; esac
        eval "_value=\${$_name-} _is_set=\${$_name+yes}" # the name is letters, digits and underscores
        [ -n "$_is_set" ] || continue                    # a piece of some value, such as a second line of it
        case $_name in
            data_file | eval_data | input) # paths or names of the Hub, one a line
                set -- "$@" "--$_name"
                _spaces=$IFS IFS='
'
                for _word in $_value; do
                    _word=${_word#"${_word%%[![:blank:]]*}"}
                    case $_name in
                        eval_data) set -- "$@" "$(named_in_repo "$_word")" ;;
                        *) set -- "$@" "$(in_repo_or_hub "$_word")" ;;
                    esac
                done
                IFS=$_spaces
                ;;
            columns | data_weights | dataset_field | eval_field | report_to | resume_with | sft_field | stop | target_modules | targets | task_field | train_parts) # words
                # shellcheck disable=SC2086
                set -- "$@" "--$_name" $_value
                ;;
            base_model | compare | load_model) # a path or a name of the Hub
                set -- "$@" "--$_name=$(in_repo_or_hub "$_value")"
                ;;
            adapter | bone_load | cache_dir | config | data_path | eval_path | lora_checkpoint | lora_init | \
                model_name_or_path | output | output_dir | peft_checkpoint | peft_load | pissa_init | proj_dir | \
                prompts | sample_prompts | shots_file | state_checkpoint) # a path
                set -- "$@" "--$_name=$(in_repo "$_value")"
                ;;
            deepspeed | eval_general | template | tokenizer) # a path or a name
                [ ! -f "$repo/$_value" ] || _value=$(in_repo "$_value")
                set -- "$@" "--$_name=$_value"
                ;;
            *[[:lower:]]*) set -- "$@" "--$_name=$_value" ;;
            *) export "${_name?}" ;; # for the program's environment, such as CUDA_VISIBLE_DEVICES
        esac
    done
    [ -z "$own_flag" ] || set -- "$@" "$own_flag"
    set -- "$@" --typed
    while [ "$_arguments" -gt 0 ]; do # the arguments to the end
        set -- "$@" "$1"
        shift
        _arguments=$((_arguments - 1))
    done
    [ -z "${RWKV_PYTHON:-}" ] || command -v "$RWKV_PYTHON" > /dev/null ||
        die "RWKV_PYTHON=$RWKV_PYTHON: there is no such program; correct the variable, or unset it"
    python=${RWKV_PYTHON:-$(sh "$repo/scripts/setup.sh")}
    case $_program in
        *.py) exec "$python" "$repo/$_program" "$@" ;;
    esac
    export PYTHONPATH="$repo/src${PYTHONPATH:+:$PYTHONPATH}"
    exec "$python" -m "$_program" "$@"
}

# run_on_newest FLAG KIND PROGRAM ARGUMENT...: as run, but the newest adapter in $proj_dir is passed as FLAG, or with the
# argument --best the one of the lowest held-out loss, unless an adapter is named. The argument --proj_dir names another
# folder. KIND is what scripts/run_KIND.sh trains. With FLAG adapter the model itself is meant where --base_model or
# --load_model is given without --adapter and --proj_dir, and where proj_dir is empty: then no adapter is passed.
run_on_newest() {
    _flag=$1 _kind=$2 _program=$3 _typed_folder='' _best=''
    shift 3
    not_flags="$not_flags proj_dir"
    _left=$#
    while [ "$_left" -gt 0 ]; do # takes the arguments of the script out of those of the program
        _argument=$1 _left=$((_left - 1))
        shift
        case $_argument in
            --best) _best=1 ;;
            --proj_dir=*) _typed_folder=${_argument#*=} ;;
            --proj_dir)
                [ "$_left" -gt 0 ] || die "--proj_dir: expected a folder"
                _typed_folder=$1 _left=$((_left - 1))
                shift
                ;;
            *) set -- "$@" "$_argument" ;;
        esac
    done
    if assigns proj_dir && ! assigns 'adapter|lora_checkpoint|peft_checkpoint|state_checkpoint'; then
        _named=
        case " $*" in
            *" --$_flag"* | *' --lora_checkpoint'* | *' --peft_checkpoint'* | *' --state_checkpoint'*) _named=1 ;;
        esac
        [ -z "$_named" ] || [ -z "$_best$_typed_folder" ] ||
            die "an adapter is named: leave out --best and --proj_dir, which say where to look for one"
        case "$_flag $*" in
            *' --adapter'*) ;;
            'adapter '*--base_model* | 'adapter '*--load_model*) [ -n "$_best$_typed_folder" ] || proj_dir= ;;
        esac
        if [ "$_flag$proj_dir$_typed_folder" = adapter ]; then
            [ -z "$_best" ] || die "--best takes the adapter from proj_dir, which is empty here: --proj_dir names one"
            own_flag=--adapter=
            run "$_program" "$@"
        fi
        if [ -n "$_typed_folder" ]; then _folder=$_typed_folder; else _folder=$(in_repo "$proj_dir"); fi
        _adapter=$(newest_adapter "$_folder")
        if [ -n "$_best" ]; then
            _adapter=$_folder/rwkv-best.pth
            [ -f "$_adapter" ] || die "--best: no rwkv-best.pth in $_folder; a run with held-out data makes one" \
                "(--eval_data or --eval_split)"
        elif [ -z "$_adapter" ] && [ -z "$_named" ] && [ $# -eq 0 ]; then
            _what=adapter
            [ "$_kind" != state ] || _what=state
            _alone=
            ! assigns load_model || _alone="; for the model alone give --load_model $(in_repo_or_hub "$load_model")"
            die "no $_what rwkv-N.pth in ${_typed_folder:-$proj_dir}; sh scripts/run_$_kind.sh makes one$_alone"
        fi
        # Where there is none, the program says so, unless it is asked for something else, such as --help.
        own_flag=--$_flag=${_adapter:-$_folder/rwkv-N.pth}
    elif [ -n "$_best$_typed_folder" ]; then
        die "$0 names an adapter: leave out --best and --proj_dir, or remove that variable"
    fi
    run "$_program" "$@"
}

# newest_adapter FOLDER: the path of its newest adapter, or nothing: rwkv-N.pth of the largest N, or rwkv-N-sS.pth of a
# run that stopped at step S of epoch N.
newest_adapter() {
    _newest='' _newest_epoch=-1 _newest_step=-1
    for _file in "$1"/rwkv-*.pth; do
        _epoch=${_file##*/rwkv-}
        _epoch=${_epoch%.pth} _step=
        case $_epoch in *-s*) _step=${_epoch#*-s} _epoch=${_epoch%%-s*} ;; esac
        case $_epoch in '' | *[!0-9]*) continue ;; esac
        case $_step in *[!0-9]*) continue ;; '') _step=999999999999 ;; esac # the end of an epoch comes after its steps
        [ -s "$_file" ] || continue                                         # what a power cut has left
        if [ "$_epoch" -gt "$_newest_epoch" ] ||
            { [ "$_epoch" -eq "$_newest_epoch" ] && [ "$_step" -gt "$_newest_step" ]; }; then
            _newest=$_file _newest_epoch=$_epoch _newest_step=$_step
        fi
    done
    [ -z "$_newest" ] || printf '%s\n' "$_newest"
}
