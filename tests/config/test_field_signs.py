"""Whose command line it is: RWKV-PEFT's and RWKV-LM's without --peft train every weight, and ours train Bone."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_bone.config import flags
from rwkv_bone.config.field_flags import TRAIN_FLAGS
from rwkv_bone.config.saved import to_json
from rwkv_bone.config.sections import AdapterConfig
from rwkv_bone.config.translate import translate_train
from rwkv_bone.config.unsaid import COMMON, SIZES
from rwkv_bone.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PLAIN = "--load_model m.pth --data_file d --ctx_len 512 --micro_bsz 8 --epoch_count 1"
ADAPTER = {spec.name for spec in fields(AdapterConfig)} - {"train_parts"}


def parse(line):
    return flags.parse_train(shlex.split(line))


def notes_of(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "sign",
    ["--my_testing x070", "--n_layer 24", "--n_embd 2048", "--vocab_size 65536", "--dim_ffn 7168", "--head_size_a 64"]
    + ["--data_type utf-8", "--data_type numpy", "--pre_ffn 0", "--dim_att 2048", "--ds_bucket_mb 2", "--fla"],
)
def test_any_flag_of_the_field_says_that_every_weight_is_trained(sign, capsys):
    assert parse(f"{PLAIN} {sign}").adapter.kind == "none"
    (note,) = [note for note in notes_of(capsys) if "every weight" in note]
    assert f"it has {sign.split()[0].replace('_size_a', '_size')}) without --peft trains every weight" in note


def test_the_full_tuning_script_of_every_year_trains_every_weight(capsys):
    sizes = "--vocab_size 65536 --n_layer 24 --n_embd 2048 --my_testing x070"
    adam = "--lr_init 1e-5 --lr_final 1e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8"
    line = f"{PLAIN} {sizes} {adam} --data_type binidx --ctx_len 512 --micro_bsz 4 --epoch_steps 9 --epoch_count 1"
    for more in ("", "--dataload pad --loss_mask pad", "--op cuda --lr_schedule cos", "--random_seed -1"):
        assert parse(f"{line} {more}").adapter.kind == "none"
        assert sum("trains every weight" in note for note in notes_of(capsys)) == 1


@pytest.mark.parametrize("name", sorted(ADAPTER - {"peft"}))
def test_a_setting_of_an_adapter_says_that_an_adapter_is_trained(name, capsys):
    value = {"targets": "att", "peft_load": "a.pth", "bone_mode": "bat", "lora_rs": "1", "lora_dropout": "0.5"}.get(
        name, "2"
    )
    kind = "lora" if name.startswith("lora") else "bone"
    try:
        assert parse(f"{PLAIN} --n_layer 24 --{name} {value}").adapter.peft == kind == "bone"
    except UserError as error:
        # An adapter all the same, but it must be said which.
        assert "give --peft lora" in str(error) and kind == "lora"
    assert not any("every weight" in note for note in notes_of(capsys))


@pytest.mark.parametrize(
    "words",
    [
        "--data_type binidx --dataload pad --loss_mask pad",
        "--data_type sft --sft_field q a --sft_split train[:9]",
        "--data_type tokens --dataload get --loss_mask none",
        "--strategy deepspeed_stage_1 --precision bf16 --grad_cp 1 --accelerator cpu --devices 2",
        "--lr_init 1e-4 --lr_final 1e-5 --warmup_steps -1 --random_seed -1 --precision bf16-mixed",
        "--epoch_steps 100 --epoch_count 2 --epoch_begin 0 --epoch_save 1 --op cuda --chunk_ctx 512 --wandb w",
        "--n_layer 0 --n_embd 0 --vocab_size 0 --dim_ffn 0 --head_size 0",
        "--num_workers 4 --optimizer adamw --dropout 0 --merge 1 --enable_progress_bar True",
    ],
)
def test_flags_that_our_pages_or_other_trainers_have_say_nothing(words, capsys):
    assert parse(f"{PLAIN} {words}").adapter.kind == "bone"
    assert not any("RWKV-PEFT or RWKV-LM" in note for note in notes_of(capsys))


def test_names_of_projections_from_habit_make_no_line_one_of_the_field(capsys):
    line = f"{PLAIN} --target_modules att --epoch_steps 10 --accumulate_grad_batches 2 --lr_init 1e-3 --lr_final 1e-4"
    assert parse(line).run.epoch_steps == 10 and notes_of(capsys) == []
    # And they say nothing about the year of one that is.
    assert parse(f"{line} --n_layer 24").run.epoch_steps == 5


def test_only_what_nobody_types_here_is_a_sign():
    ours = {spec.name for section in flags.SECTIONS.values() for spec in fields(section)}
    assert set(SIZES) <= ours and not set(TRAIN_FLAGS) & ours and COMMON < set(TRAIN_FLAGS)


def commands() -> list[tuple[str, str]]:
    """(place, command) of every run of train.py or of a run script that a page or a script of ours shows."""
    found = []
    for page in PAGES:
        for code in re.findall(r"(?ms)^```sh\n(.*?)^```$", page.read_text(encoding="utf-8")):
            for line in code.replace("\\\n", " ").splitlines():
                if re.search(r"(train\.py|rwkv-bone-train|scripts/run_\w+\.sh|preview_data\.sh)( |$)", line):
                    found.append((page.name, line.strip()))
    for path in [REPOSITORY / "train.py", *(REPOSITORY / "scripts").glob("run_*.sh")]:
        found += [(path.name, line) for line in re.findall(r"sh scripts/run_\S+ [^\n]*", path.read_text())]
    found += [("--help", command) for _, command in flags.TRAIN_EXAMPLES]
    return found


COMMANDS = commands()


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[f"{place}-{i}" for i, (place, _) in enumerate(COMMANDS)])
def test_no_command_line_of_ours_is_taken_for_one_of_the_field(place, command):
    """But for the one that shows how to bring theirs, and new models, whose lines say --peft none themselves."""
    theirs = place == "migrating.md" and "--pre_ffn" in command
    words = re.findall(r"--([a-z]\w*)", command)
    signs = [name for name in words if name in TRAIN_FLAGS or name in (*SIZES, "head_size_a")]
    assert bool(signs) == (theirs or "--peft none" in command and "n_layer" in words)


def test_there_are_commands_to_look_at():
    assert len(COMMANDS) > 20 and {"README.md", "adapters.md", "migrating.md"} <= {place for place, _ in COMMANDS}


def test_no_script_of_ours_has_a_variable_that_is_a_sign():
    paths = [path for path in (REPOSITORY / "scripts").glob("run_*.sh") if path.name != "run_bone_hf.sh"]
    for path in paths:
        head = path.read_text().split("\nrepo=")[0]
        names = set(re.findall(r"(?m)^([a-z]\w*)=", head))
        assert "peft" in names and not names & {*TRAIN_FLAGS, *SIZES}
    assert len(paths) >= 5


def test_a_run_that_goes_on_keeps_what_it_trains(tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(parse(f"{PLAIN} --bone_r 8")))
    config = parse(f"--resume 1 --proj_dir {tmp_path} {PLAIN} --n_layer 24")
    assert (config.adapter.kind, config.adapter.bone_r) == ("bone", 8)
    assert not any("every weight" in note for note in notes_of(capsys))


def test_the_data_alone_is_read_without_notes_about_training(capsys):
    given = {"data_file": ("d",), "vocab_size": 70, "lr_init": 1e-3, "lr_final": 1e-4}
    settings, notes = translate_train(given, trains=False)
    assert settings == given and notes == []


# --- what the field means by flags that it leaves out ---

THEIRS = f"{PLAIN} --my_testing x070 --train_parts ln --lr_init 1e-4 --lr_final 1e-4"
BONE = """--peft bone --bone_config '{"bone_mode":"bone","bone_r":8}'"""
DISHA = """--peft disha --disha_config '{"mode":"bone","load":"","r":8}'"""
MISS = """--peft miss --peft_config '{"r":8}'"""


def about(words, capsys):
    """The notes of a command line about what it leaves unsaid."""
    parse(f"{THEIRS} {words}")
    return [note for note in notes_of(capsys) if " is read as " not in note and " is ignored" not in note]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (f"{BONE} --lr_init 1e-2 --lr_final 1e-4", ["--lr_schedule exp"]),
        (f"{BONE} --lr_init 1e-4 --lr_final 0", ["--lr_schedule linear"]),
        (f"{BONE} --lr_init 1e-4 --lr_final 1e-4", []),
        (f"{BONE} --lr_init 1e-2 --lr_final 1e-4 --lr_schedule exp", []),
        (f"{DISHA} --lr_init 1e-2 --lr_final 1e-4", []),
        (f"{MISS} --lr_init 1e-2 --lr_final 1e-4", []),
        (f"{BONE} --data_type binidx", ["--dataload get"]),
        (f"{DISHA} --data_type binidx", ["--dataload pad"]),
        (f"{MISS} --data_type binidx", ["--dataload pad"]),
        (f"{BONE} --data_type binidx --dataload pad", ["reads on into the next one"]),
        (f"{BONE} --data_type binidx --dataload pad --loss_mask pad", []),
        (f"{BONE} --data_type sft", ["--template alpaca"]),
        (f"{BONE} --data_type sft --template alpaca", []),
    ],
)
def test_what_differs_in_meaning_is_named_once_and_only_where_it_matters(words, expected, capsys):
    notes = about(words, capsys)
    assert len(notes) == len(expected)
    assert all(text in note for text, note in zip(expected, notes, strict=True))


def test_epoch_steps_of_2026_are_the_samples_to_keep(capsys):
    config = parse(f"{THEIRS} {MISS} --data_type binidx --epoch_steps 200 --accumulate_grad_batches 4")
    assert (config.data.sft_split, config.run.epoch_steps) == ("[:200]", 0)
    assert any("--epoch_steps 200 is read as --sft_split [:200]" in note for note in notes_of(capsys))
    config = parse(f"{THEIRS} {MISS} --data_type sft --epoch_steps 200 --sft_split train[:9]")
    assert (config.data.sft_split, config.run.epoch_steps) == ("train[:9]", 0)
    assert any("--epoch_steps 200 is ignored: with sft" in note for note in notes_of(capsys))
    assert parse(f"{THEIRS} --peft state --op fla --data_type binidx --epoch_steps 200".replace("--train_parts ln", "")
                 ).data.sft_split == "[:200]"  # fmt: skip


def test_defaults_that_differ_are_named_in_one_note(capsys):
    line = "--load_model m.pth --data_file d --my_testing x070 --ctx_len 512 --epoch_count 3"
    parse(line)
    (data, training) = [note for note in notes_of(capsys) if "another default" in note]
    assert data.endswith(": --micro_bsz 8 (there 12)")
    assert training.endswith(": --lr_init auto (there 6e-4), --lr_final auto (there 1e-5)")
    for words, there in (
        ("--peft lora --op fla", "r 8, alpha 32, dropout 0.01"),
        ("--peft lora --persistent_workers", "r 8, alpha 8"),
        ("--peft pissa", "r 8"),
    ):
        parse(f"{THEIRS} {words}")
        assert [f"without --lora_r has r 32; in RWKV-PEFT {there}" in note for note in notes_of(capsys)].count(
            True
        ) == 1


def test_parts_of_the_base_beside_every_weight_are_ignored_aloud(capsys):
    adapter = parse(THEIRS).adapter
    assert (adapter.kind, adapter.train_parts) == ("none", ())
    assert any("--train_parts ln is ignored: every weight is trained" in note for note in notes_of(capsys))


def test_the_parts_that_the_field_trains_unasked_are_named_where_it_does(capsys):
    line = f"{PLAIN} --my_testing x070"
    for words, named in ((BONE, True), (DISHA, True), (MISS, False), ("--train_type state", False)):
        parse(f"{line} {words}")
        assert any("time and ln too" in note for note in notes_of(capsys)) == named
