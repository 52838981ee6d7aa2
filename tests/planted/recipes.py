"""Mistakes in a recipe: sizes that are not equal, numbers of a header that are old, flags and results that get lost."""

from tests.planted.bug import Bug

TESTS = "tests/recipes/test_recipes.py -k "
BUGS = (
    Bug(
        "recipes/lib.sh",
        "_adapter='--peft pissa --lora_r 32'",
        "_adapter='--peft pissa --lora_r 64'",
        f"{TESTS}equally_many",
    ),
    Bug(
        "recipes/lib.sh", "_adapter='--peft bone --bone_r 64'", "_adapter='--peft bone --bone_r 32'", f"{TESTS}equally"
    ),
    Bug("recipes/qbone_24gb.sh", "#   18.6 GB: 13.3B", "#   18.2 GB: 13.3B", f"{TESTS}memory_in_a_header"),
    Bug(
        "recipes/chat_g1.sh",
        "trains 47.2 M parameters of a 2.9B",
        "trains 37.2 M parameters of a 2.9B",
        f"{TESTS}trained_parameters",
    ),
    Bug("recipes/metamath_gsm8k.sh", "accumulate_grad_batches=4 ", "accumulate_grad_batches=8 ", f"{TESTS}papers"),
    Bug("recipes/lib.sh", '[ -z "$_kept" ] || set -- "$@" "$1"', ":", f"{TESTS}typed_reaches"),
    Bug("recipes/lib.sh", 'eval "$_name=\\$_value" && paths_from "$PWD"', ":", f"{TESTS}typed_reaches"),
    Bug(
        "recipes/lib.sh",
        """[ "$plan" = 0 ] || set -- --plan 1 "$@"\n""",
        ":\n",
        f"{TESTS}asks_for_the_plan",
    ),
    Bug(
        "recipes/lib.sh",
        '    [ "$plan" = 0 ] || return 0\n    _adapter=$1',
        "    _adapter=$1",
        f"{TESTS}asks_for_the_plan",
    ),
    Bug("recipes/lib.sh", '/*) [ -e "$_value" ] ||', "/*) true ||", f"{TESTS}missing_or_wrong"),
    Bug("recipes/smoke/prompts.jsonl", '{"prompt": "What is snow?"}\n', "", f"{TESTS}'end_to_end_on'"),
    Bug(
        "recipes/lib.sh",
        '[ -n "$(find "$_model" -newer "$_adapter" 2> /dev/null)" ]',
        "false",
        f"{TESTS}'makes_nothing and state_persona'",
    ),
)
