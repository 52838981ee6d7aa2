"""The shell scripts: safe shell, real flags, the right Python, and nothing taken for good that is half made.

They run in a copy of the repository whose path has spaces, with a `python3` on PATH that is the Python of these tests
(which has everything), or a stand-in for one that has not.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.config import MergeConfig
from rwkv_bone.config.flags import ALIASES, SECTIONS, parse_merge, parse_section, parse_train
from rwkv_bone.conversion.flags import ConvertConfig
from rwkv_bone.data.prepare import PrepareConfig
from rwkv_bone.data.preview import PreviewConfig
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation.flags import EvaluateConfig, parse_evaluate
from rwkv_bone.evaluation.harness_main import HarnessConfig
from rwkv_bone.hf.flags import HfConfig
from rwkv_bone.training.project import kept
from tests.nvidia import NOT_LOADED, write_failing_smi, write_program, write_smi, write_torch

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))
RECIPES = sorted((REPOSITORY / "recipes").glob("*.sh"))
KINDS = ("bone", "bat", "lora", "pissa", "state")
RUN_SCRIPTS = tuple(f"run_{kind}.sh" for kind in KINDS)
TASK_SCRIPTS = ("run_dpo.sh", "run_orpo.sh")
MERGE_SCRIPTS = tuple(f"merge_{kind}.sh" for kind in KINDS)
TRAIN_SETTINGS = [spec for section in SECTIONS.values() for spec in fields(section)]
# script -> the settings of its program; those that a user copies and edits
SETTINGS = {
    **dict.fromkeys((*RUN_SCRIPTS, *TASK_SCRIPTS), TRAIN_SETTINGS),
    **dict.fromkeys(MERGE_SCRIPTS, fields(MergeConfig)),
    "run_bone_hf.sh": fields(HfConfig),
    "chat.sh": fields(ChatConfig),
    "evaluate.sh": fields(EvaluateConfig),
    "lm_eval.sh": fields(HarnessConfig),
    "convert.sh": fields(ConvertConfig),
    "prepare_data.sh": fields(PrepareConfig),
    "preview_data.sh": [*TRAIN_SETTINGS, *fields(PreviewConfig)],
    "plan.sh": TRAIN_SETTINGS,
}
USES_NEWEST_ADAPTER = (*MERGE_SCRIPTS, "convert.sh", "chat.sh", "evaluate.sh", "lm_eval.sh")  # that of proj_dir
SHELLS = ("dash", "bash")
NOT_PASSED_ON = ("VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_VISIBLE_DEVICES", "PIP_INDEX_URL")
TOOLS = ("awk", "bash", "dash", "df", "dirname", "grep", "mkdir", "readlink", "rm", "sed", "sh", "sleep", "tr", "uname")
ECHO = "import json, sys; print(json.dumps(sys.argv[1:]))\n"


class Clone:
    """A copy of what the scripts need, and the PATH they run with."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone of mine"
        self.scripts = self.root / "scripts"
        self.bin = folder / "the bin"
        self.elsewhere = folder / "else where"
        self.bin.mkdir()
        self.elsewhere.mkdir()
        for name in ("scripts", "src", "requirements"):
            shutil.copytree(REPOSITORY / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(REPOSITORY / name, self.root)
        for name in ("train.py", "merge.py", "train_hf.py"):
            (self.root / name).write_text(ECHO)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.python(f'exec "{sys.executable}" "$@"')

    def python(self, body: str) -> None:
        """Makes `python3` a shell script with this body."""
        write_program(self.bin / "python3", body)

    def echo_modules(self) -> None:
        """Makes the modules that scripts run print their arguments too, as train.py and merge.py here do."""
        names = "chat/main conversion/convert data/prepare data/preview evaluation/main evaluation/harness_main"
        for name in names.split():
            (self.root / "src" / "rwkv_bone" / f"{name}.py").write_text(ECHO)

    def environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON} | {"PATH": str(self.bin)}

    def run(self, *command, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=cwd or self.elsewhere,
            env=self.environment() | variables,
            capture_output=True,
            text=True,
        )

    def sh(self, script: str, *words: str) -> subprocess.CompletedProcess:
        return self.run("sh", self.scripts / script, *words)

    def edit(self, script: str, *lines: str, **values: str) -> None:
        """Adds lines to the settings of a script, and gives settings that it has other values, written as in shell."""
        text = (self.scripts / script).read_text()
        for name, value in values.items():
            text, count = re.subn(rf"(?m)^{name}=[^\s]*", lambda _: f"{name}={value}", text)  # noqa: B023
            assert count
        text = text.replace("\nrepo=", "\n" + "".join(f"{line}\n" for line in lines) + "repo=", 1)
        (self.scripts / script).write_text(text)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.delenv("RWKV_PYTHON", raising=False)
    return Clone(tmp_path)


@pytest.fixture
def ready(clone, monkeypatch):
    """A clone whose scripts run the Python of these tests, without asking setup.sh."""
    monkeypatch.setenv("RWKV_PYTHON", sys.executable)
    return clone


def arguments(result) -> list[str]:
    """What the stand-in for train.py or merge.py was called with."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[0])


def variables(result) -> list[str]:
    """The flags that are a script's variables, where nothing was typed over them."""
    given = arguments(result)
    assert given.pop() == "--typed"
    return given


def sentence(result) -> str:
    """The last line of a script that could not go on: it is ours, and the status is 2."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    line = result.stderr.splitlines()[-1]
    assert re.match("(setup|error): ", line)
    return line


def settings(script: str) -> dict[str, str]:
    """name -> the rest of its line, of the settings at the top of a script."""
    head = (REPOSITORY / "scripts" / script).read_text().split("\nrepo=")[0]
    return dict(re.findall(r"^([a-z]\w*)=(.*)$", head, re.MULTILINE))


@pytest.mark.parametrize("script", [*SCRIPTS, *RECIPES], ids=lambda path: f"{path.parent.name}/{path.name}")
@pytest.mark.parametrize("shell", ["sh", *SHELLS])
def test_scripts_are_valid_in_every_shell(script, shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], check=True)


def test_shellcheck_has_no_complaint():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed")
    subprocess.run([program, "-x", *SCRIPTS, *RECIPES, REPOSITORY / ".ci" / "run"], check=True, cwd=REPOSITORY)


def test_continuous_integration_runs_the_test_script_and_then_the_slow_tests():
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == ["sh scripts/test.sh", "exec sh scripts/test.sh -m slow"]


def test_scripts_differ_in_their_headers_settings_and_last_lines_alone():
    shared = set()
    for script in SETTINGS:
        text = (REPOSITORY / "scripts" / script).read_text()
        header, begin, rest = re.fullmatch(r"(#!/bin/sh\n(?:#.*\n)+)(set -eu.*\n.*\n)((?:.*\n)+)", text).groups()
        found, own = rest.split("\nrepo=", 1)[1].split('. "$repo/scripts/lib.sh"\n')
        shared.add((begin, found))
        assert header.splitlines()[1].endswith(f": sh scripts/{script} [--flag value ...]")
        assert 1 <= len(own.splitlines()) <= 2 and own.startswith(("run ", "run_on_newest ", "(run_on_newest "))
        assert os.access(REPOSITORY / "scripts" / script, os.X_OK)
    assert len(shared) == 1


@pytest.mark.parametrize("script", SETTINGS)
def test_every_variable_is_a_setting_with_a_line_of_meaning(script):
    known = {spec.name for spec in SETTINGS[script]}
    if script in USES_NEWEST_ADAPTER:
        known.add("proj_dir")
    for name, rest in settings(script).items():
        assert name in known
        assert re.search(r" # \w.+", rest), f"{name} has no comment"


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_run_scripts_need_no_edits_and_pass_a_valid_command_line(script, clone):
    config = parse_train(arguments(clone.sh(script)))
    assert config.run.strategy == "deepspeed_stage_1"
    assert config.adapter.kind == script.removeprefix("run_").removesuffix(".sh")
    assert config.run.proj_dir == f"{clone.root}/out/{config.adapter.kind}"
    for name, path in (("load_model", config.model.load_model), ("data_file", *config.data.data_file)):
        relative = Path(path).relative_to(clone.root)
        assert str(relative) == settings(script)[name].split()[0]
        assert (REPOSITORY / relative).is_file()


@pytest.mark.parametrize("script", TASK_SCRIPTS)
def test_scripts_of_preference_tasks_need_no_edits_either(script, clone):
    config = parse_train(arguments(clone.sh(script)))
    assert config.data.task == script.removeprefix("run_").removesuffix(".sh")
    assert config.run.proj_dir == f"{clone.root}/out/{config.data.task}"
    for path in (config.model.load_model, *config.data.data_file, *config.data.eval_data, config.run.sample_prompts):
        assert not path or (REPOSITORY / Path(path).relative_to(clone.root)).is_file()


def test_the_plan_is_of_the_run_of_run_bone(clone):
    own = [words for words in variables(clone.sh("plan.sh")) if words != "--plan=1"]
    assert own == variables(clone.sh("run_bone.sh"))
    assert parse_train(arguments(clone.sh("plan.sh"))).run.plan


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_any_variable_can_be_overridden_and_paths_stay_the_callers(script, ready):
    words = ["--micro_bsz", "3", "--data_file", "my rows.jsonl", "--train_parts", "ln", "time"]
    config = parse_train(arguments(ready.sh(script, *words)))
    assert (config.data.micro_bsz, config.adapter.train_parts) == (3, ("ln", "time"))
    assert config.data.data_file == ("my rows.jsonl",)


@pytest.mark.parametrize("script", RUN_SCRIPTS)
@pytest.mark.parametrize("words", ["--peft none", "--peft lora --lora_r 3", "--peft bone --bone_r 3", "--peft state"])
def test_another_kind_takes_the_settings_of_the_scripts_own_kind_with_it(script, words, ready):
    config = parse_train(arguments(ready.sh(script, *words.split())))
    assert config.adapter.peft == words.split()[1]
    assert {"lora": config.adapter.lora_r, "bone": config.adapter.bone_r}.get(config.adapter.peft, 3) == 3


@pytest.mark.parametrize("script", SETTINGS)
@pytest.mark.parametrize("shell", SHELLS)
def test_every_variable_of_a_script_is_passed(script, shell, ready):
    ready.echo_modules()
    given = arguments(ready.run(shell, ready.scripts / script, "--last"))
    assert given[-2:] == ["--typed", "--last"]
    del given[-2:]
    flags = [word.split("=")[0].removeprefix("--") for word in given if word.startswith("--")]
    expected = list(settings(script))
    if script in USES_NEWEST_ADAPTER:
        expected.remove("proj_dir")
        expected.append("peft_checkpoint" if script in MERGE_SCRIPTS else "adapter")
    assert flags == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_lines_that_a_user_adds_are_passed_exactly(shell, ready):
    odd = """ it's "so" $HOME `id` \\n * ; a=b # c """
    quoted = "'" + odd.replace("'", "'\\''") + "'"
    ready.edit(
        "run_bone.sh",
        "weight_decay=0.01",
        "beta1=0.8; beta2=0.95 # two in a line, and the comment's a=b",
        f"wandb={quoted}",
        "    adam_eps=-1e-3",
        "train_parts='ln  time' # several words",
        "peft_config='{\"r\": 8}'",
        "_mine=helper",
        'save_steps="${_mine#helper}7"',
        "export lower_case=1",
        "IN_CAPITALS=2",
        eval_data="''",
    )
    (ready.root / "train.py").write_text(
        "import os\n" + ECHO.replace("argv[1:]", "argv[1:] + [os.environ['IN_CAPITALS']]")
    )
    given = arguments(ready.run(shell, ready.scripts / "run_bone.sh"))
    assert given[-2:] == ["--typed", "2"]
    del given[-2:]
    added = given[given.index("--grad_cp=auto") + 1 :]
    assert added == [
        "--weight_decay=0.01",
        "--beta1=0.8",
        "--beta2=0.95",
        f"--wandb={odd}",
        "--adam_eps=-1e-3",
        "--train_parts",
        "ln",
        "time",
        '--peft_config={"r": 8}',
        "--save_steps=7",
    ]
    assert given[given.index("--eval_data") + 1].startswith("--")


def test_a_variable_that_is_no_setting_is_refused(ready):
    ready.edit("run_bone.sh", "lerning_rate=1")
    with pytest.raises(UserError, match="--lerning_rate is not a flag"):
        parse_train(arguments(ready.sh("run_bone.sh")))


def test_a_word_that_is_no_flag_is_refused(ready):
    ready.edit("prepare_data.sh", "input='a b'")
    assert "stray: expected flags" in sentence(ready.sh("prepare_data.sh", "stray"))


@pytest.mark.parametrize(
    "line, expected",
    [
        ("""wandb="it's"; save_steps=7 # the user's""", ["--wandb=it's", "--save_steps=7"]),
        (r"""wandb="a\"b # c"; save_steps=7""", ['--wandb=a"b # c', "--save_steps=7"]),
        (r"""wandb=it\'s; save_steps=7 # isn't""", ["--wandb=it's", "--save_steps=7"]),
        ("wandb='a\nsave_steps=7'", ["--wandb=a\nsave_steps=7"]),
        ("if true; then wandb=a; fi\n\tsave_steps=7", ["--wandb=a", "--save_steps=7"]),
        ("if false; then wandb=a; fi", []),
        ("wandb=a#b", ["--wandb=a#b"]),
    ],
)
def test_assignments_are_found_as_the_shell_reads_them(line, expected, ready):
    ready.edit("run_bone.sh", line)
    given = variables(ready.sh("run_bone.sh"))
    assert given[given.index("--grad_cp=auto") + 1 :] == expected


def test_variables_of_the_environment_are_no_settings(ready):
    ready.edit(
        "run_bone.sh",
        "#weight_decay=1",
        "template=raw # not weight_decay=2",
        "wandb='run #3 weight_decay=3'; beta1=0.8",
        'my_testing="4 # weight_decay=4"; beta2=0.9',
    )
    before = variables(ready.sh("run_bone.sh"))
    assert before[-5:] == ["--template=raw", "--wandb=run #3 weight_decay=3", "--beta1=0.8", *before[-2:]]
    assert before[-2:] == ["--my_testing=4 # weight_decay=4", "--beta2=0.9"]
    result = ready.run("sh", ready.scripts / "run_bone.sh", weight_decay="9", micro_bsz="9", repo="/", proj_dir="/")
    assert variables(result) == before


def test_paths_are_the_repositorys_and_texts_stay_as_they_are(ready):
    """Every setting that is text is of one of these kinds: a new one belongs into scripts/lib.sh and here."""
    paths = (
        "adapter base_model cache_dir compare config data_path eval_path load_model model_name_or_path output "
        "output_dir peft_checkpoint peft_load pissa_init proj_dir prompts sample_prompts shots_file"
    ).split()
    files = ["data_file", "eval_data", "input"]
    words = (
        "columns data_weights dataset_field eval_field report_to resume_with sft_field stop target_modules targets "
        "task_field train_parts"
    ).split()
    names = ["deepspeed", "eval_general", "template", "tokenizer"]  # or files
    texts = "cards dataset_split field hf_base mask_id my_testing prompt sft_split shard_size system wandb".split()
    known = {spec.name: spec for specs in SETTINGS.values() for spec in specs}
    textual = {
        name for name, spec in known.items() if type(spec.default) in (str, tuple) and not spec.metadata["choices"]
    }
    textual |= {"train_parts", "report_to", "config", "my_testing"}
    assert textual == {*paths, *files, *words, *names, *texts}
    assert {name for name, spec in known.items() if type(spec.default) is tuple} == {*files, *words}

    aliases = [alias for name, alias in ALIASES.items() if name in paths]
    paths += aliases
    script = ready.scripts / "run_bone.sh"
    text = script.read_text()
    lines = "".join(f"{name}='a b/c'\n" for name in (*paths, *words, *names, *texts))
    lines += "".join(f"{name}='a b\n  /c d\n'\n" for name in files)
    script.write_text(re.sub(r"(?ms)^load_model=.*?(?=^repo=)", lambda _: lines, text))
    given = variables(ready.sh("run_bone.sh"))
    root = ready.root
    expected = [f"--{name}={root}/a b/c" for name in paths]
    for name in words:
        expected += [f"--{name}", "a", "b/c"]
    expected += [f"--{name}=a b/c" for name in (*names, *texts)]
    for name in files:
        expected += [f"--{name}", f"{root}/a b", "/c d"]
    assert given == expected

    (root / "a b").mkdir()
    (root / "a b" / "c").touch()
    given = arguments(ready.sh("run_bone.sh"))
    assert all(f"--{name}={root}/a b/c" in given for name in names)


def test_names_of_the_hub_stay_as_they_are_unless_such_a_folder_is_in_the_repository(ready):
    names = [
        "RWKV/RWKV7-1.5B-20260805",
        "RWKV/x@v1.0",
        "hf://scripts/x",
        "nowhere/model.pth",
        "scripts/x",
        "a/b/c",
        "m",
    ]
    given = []
    for name in names:
        ready.edit("run_bone.sh", load_model=name, data_file=name, eval_data=name)
        config = parse_train(arguments(ready.sh("run_bone.sh")))
        assert config.data.data_file == (config.model.load_model,)
        assert config.data.eval_data == (config.model.load_model,)
        given.append(config.model.load_model)
    assert given == names[:3] + [f"{ready.root}/{name}" for name in names[3:]]


def test_a_python_that_the_caller_names_is_taken_as_it_is(clone, monkeypatch):
    monkeypatch.setenv("RWKV_PYTHON", f"{clone.bin}/my python")
    (clone.bin / "python3").rename(clone.bin / "my python")
    result = clone.sh("run_bone.sh")
    assert arguments(result) and "setup:" not in result.stderr


def test_a_python_that_is_not_there_is_named(clone, monkeypatch):
    monkeypatch.setenv("RWKV_PYTHON", "/no/python")
    assert sentence(clone.sh("run_bone.sh")).startswith("error: RWKV_PYTHON=/no/python: there is no such program")


def test_a_script_with_data_of_ones_own_does_not_measure_the_bundled_numbers(ready, capsys):
    config = parse_train(arguments(ready.sh("run_bone.sh", "--data_file", "mine.jsonl")))
    assert (config.data.data_file, config.data.eval_data) == (("mine.jsonl",), ())
    assert "of the script is left out: it belongs to that data_file" in capsys.readouterr().out
    config = parse_train(arguments(ready.sh("run_bone.sh", "--data_file", "mine.jsonl", "--eval_split", "0.1")))
    assert (config.data.eval_data, config.data.eval_split) == ((), 0.1)
    assert parse_train(arguments(ready.sh("run_bone.sh"))).data.eval_data[0].endswith("numbers_heldout.jsonl")


def test_an_edited_variable_may_hold_any_path(ready):
    ready.edit("run_bone.sh", load_model="'/data/my model.pth'", eval_data="''", data_file="'my rows.jsonl'")
    config = parse_train(arguments(ready.sh("run_bone.sh")))
    assert (config.model.load_model, config.data.eval_data) == ("/data/my model.pth", ())
    assert config.data.data_file == (f"{ready.root}/my rows.jsonl",)


@pytest.mark.parametrize("script", MERGE_SCRIPTS)
def test_merge_scripts_take_the_newest_adapter_by_number(script, ready):
    kind = script.removeprefix("merge_").removesuffix(".sh")
    folder = ready.root / "out" / kind
    folder.mkdir(parents=True)
    for name in ("rwkv-2.pth", "rwkv-10.pth", "rwkv-9.pth", "rwkv-init.pth", "rwkv-3-step-50.pth", "rwkv-11.json"):
        (folder / name).write_text("x")
    (folder / "rwkv-12.pth").touch()  # what a power cut has left
    config = parse_merge(arguments(ready.sh(script)))
    assert config.peft_checkpoint == str(folder / "rwkv-10.pth")
    assert config.output == f"{ready.root}/out/rwkv7-tiny-{kind}.pth"
    config = parse_merge(arguments(ready.sh(script, "--lora_checkpoint", "mine.pth", "--overwrite")))
    assert config.peft_checkpoint == "mine.pth" and config.overwrite


@pytest.mark.parametrize(
    "names, newest",
    [
        (["rwkv-0-s90.pth", "rwkv-0-s100.pth"], "rwkv-0-s100.pth"),
        (["rwkv-0-s100.pth", "rwkv-0.pth", "rwkv-1-s5.pth"], "rwkv-1-s5.pth"),
        (["rwkv-1-s500.pth", "rwkv-1.pth", "rwkv-0.pth", "rwkv-best.pth"], "rwkv-1.pth"),
    ],
)
def test_what_an_interrupted_run_saved_last_is_its_newest_adapter(names, newest, ready):
    """As training/project.py's `kept` orders them: the end of an epoch comes after its steps."""
    folder = ready.root / "out" / "bone"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("x")
    assert parse_merge(arguments(ready.sh("merge_bone.sh"))).peft_checkpoint == str(folder / newest)
    assert [path.name for path in kept(folder)][-1] == newest


@pytest.mark.parametrize("script", USES_NEWEST_ADAPTER)
def test_the_best_adapter_and_another_folder_can_be_asked_for(script, ready, tmp_path):
    ready.echo_modules()
    alone = script not in MERGE_SCRIPTS
    kind = "bone" if alone else script.removeprefix("merge_").removesuffix(".sh")
    flag = "adapter" if alone else "peft_checkpoint"
    for folder in (ready.root / "out" / kind, tmp_path / "of mine"):
        folder.mkdir(parents=True)
        for name in ("rwkv-0.pth", "rwkv-best.pth"):
            (folder / name).write_text("x")

    def adapter(*words: str) -> str:
        given = arguments(ready.sh(script, *words))
        assert "--best" not in given and not [word for word in given if word.startswith("--proj_dir")]
        (found,) = [word for word in given if word.startswith(f"--{flag}=")]
        return found.removeprefix(f"--{flag}=")

    assert adapter("--best") == f"{ready.root}/out/{kind}/rwkv-best.pth"
    assert adapter("--proj_dir", f"{tmp_path}/of mine") == f"{tmp_path}/of mine/rwkv-0.pth"
    assert adapter(f"--proj_dir={tmp_path}/of mine", "--best") == f"{tmp_path}/of mine/rwkv-best.pth"
    (ready.root / "out" / kind / "rwkv-best.pth").unlink()
    assert sentence(ready.sh(script, "--best")) == (
        f"error: --best: no rwkv-best.pth in {ready.root}/out/{kind}; a run with held-out data makes one (--eval_data "
        "or --eval_split)"
    )
    named = sentence(ready.sh(script, "--best", f"--{flag}", "mine.pth"))
    assert named.startswith("error: an adapter is named: leave out --best and --proj_dir")
    assert sentence(ready.sh(script, "--proj_dir")) == "error: --proj_dir: expected a folder"


@pytest.mark.parametrize("script", USES_NEWEST_ADAPTER)
def test_a_script_without_an_adapter_says_how_to_make_one(script, ready):
    kind = script.removeprefix("merge_").removesuffix(".sh") if script in MERGE_SCRIPTS else "bone"
    what = "state" if kind == "state" else "adapter"
    expected = f"error: no {what} rwkv-N.pth in out/{kind}; sh scripts/run_{kind}.sh makes one"
    if script in ("chat.sh", "evaluate.sh", "lm_eval.sh"):
        expected += f"; for the model alone give --load_model {ready.root}/assets/rwkv7-tiny.pth"
    assert sentence(ready.sh(script)) == expected


def test_chat_takes_the_newest_adapter_unless_a_model_is_named(ready):
    ready.echo_modules()
    (ready.root / "out" / "bone").mkdir(parents=True)
    (ready.root / "out" / "bone" / "rwkv-9.pth").write_text("x")

    def parsed(*words):
        config = parse_section("chat.sh", "", ChatConfig, arguments(ready.sh("chat.sh", *words)))
        return config.load_model, config.adapter

    base, adapter = f"{ready.root}/assets/rwkv7-tiny.pth", f"{ready.root}/out/bone/rwkv-9.pth"
    assert parsed() == (base, adapter)
    assert parsed("--temperature", "0") == (base, adapter)
    assert parsed("--adapter", "a.pth") == (base, "a.pth")
    assert parsed("--load_model", "m.pth") == ("m.pth", "")
    assert parsed("--load_model=m.pth", "--adapter", "a.pth") == ("m.pth", "a.pth")


def test_evaluation_leaves_the_rows_of_its_script_out_where_another_task_is_named(ready):
    ready.echo_modules()

    def rows(*words):
        return parse_evaluate(arguments(ready.sh("evaluate.sh", "--load_model", "m.pth", *words)), "evaluate").data_file

    assert rows() == rows("--task", "exact") == f"{ready.root}/assets/numbers_heldout.jsonl"
    assert rows("--task", "gsm8k") == "" and rows("--task", "gsm8k", "--data_file", "t.jsonl") == "t.jsonl"


@pytest.mark.parametrize("name", ["peft_checkpoint", "lora_checkpoint"])
def test_a_merge_script_may_name_the_adapter_itself(name, ready):
    (ready.root / "out" / "bone").mkdir(parents=True)
    (ready.root / "out" / "bone" / "rwkv-9.pth").write_text("x")
    ready.edit("merge_bone.sh", f"{name}=out/rwkv-2.pth")
    config = parse_merge(arguments(ready.sh("merge_bone.sh")))
    assert config.peft_checkpoint == f"{ready.root}/out/rwkv-2.pth"


@pytest.mark.parametrize(
    "words, variables, is_model",
    [
        ([], {}, False),
        (["--to", "lora"], {}, False),
        (["--base_model", "m.pth", "--output", "m.gguf"], {}, True),
        (["--base_model=m.pth", "--adapter", "a.pth"], {}, False),
        ([], {"proj_dir": ""}, True),
    ],
)
def test_the_model_itself_is_converted_where_no_adapter_is_meant(words, variables, is_model, ready):
    (ready.root / "out" / "bone").mkdir(parents=True)
    (ready.root / "out" / "bone" / "rwkv-9.pth").write_text("x")
    ready.echo_modules()
    ready.edit("convert.sh", **variables)
    config = parse_section("convert", "", ConvertConfig, arguments(ready.sh("convert.sh", *words)))
    assert (not config.adapter) == is_model


def test_a_missing_adapter_is_never_taken_for_a_conversion_of_the_model(ready):
    ready.echo_modules()
    given = arguments(ready.sh("convert.sh", "--output", "m.gguf"))
    assert given[given.index("--typed") - 1] == f"--adapter={ready.root}/out/bone/rwkv-N.pth"


def test_a_conversion_may_name_the_adapter_in_the_script(ready):
    ready.echo_modules()
    ready.edit("convert.sh", "adapter=out/mine.pth")
    config = parse_section("convert", "", ConvertConfig, arguments(ready.sh("convert.sh", "--base_model", "m.pth")))
    assert config.adapter == f"{ready.root}/out/mine.pth"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("tools", ["", "no readlink -f"])
def test_a_script_is_the_same_wherever_it_lies_and_is_linked_from(shell, tools, ready):
    script = ready.scripts / "run_bone.sh"
    expected = arguments(ready.run(shell, script))
    if tools:  # as on systems where it has no -f
        write_program(ready.bin / "readlink", "exit 1")
    deep = ready.root / "my own" / "runs of mine"
    deep.mkdir(parents=True)
    (ready.elsewhere / "copy.sh").write_text(script.read_text())  # not executable
    shutil.copy(script, deep / "run.sh")
    inside = ready.root / "src"
    ways = [
        ([shell, "../a clone of mine/scripts/run_bone.sh"], ready.elsewhere),
        ([shell, "run_bone.sh"], ready.scripts),
        (["./run_bone.sh"], ready.scripts),
        ([deep / "run.sh"], ready.elsewhere),
        ([shell, "run.sh"], deep),
        ([shell, ready.elsewhere / "copy.sh"], ready.root),
        ([shell, "../../else where/copy.sh"], inside),
    ]
    if not tools:
        (ready.elsewhere / "relative").symlink_to("../a clone of mine/scripts/run_bone.sh")
        (ready.elsewhere / "folder").symlink_to(ready.scripts)
        (ready.bin / "a command").symlink_to(ready.elsewhere / "relative")
        ways += [
            ([shell, "relative"], ready.elsewhere),
            (["./relative"], ready.elsewhere),
            ([shell, "else where/relative"], ready.elsewhere.parent),
            ([shell, "folder/run_bone.sh"], ready.elsewhere),
            (["a command"], ready.elsewhere),
            (["sh", "-c", "'a command'"], ready.bin),
        ]
    for command, folder in ways:
        assert arguments(ready.run(*command, cwd=folder)) == expected, (command, folder)
    decoy = ready.elsewhere / ready.root.name / "scripts"  # where a cd that looks into CDPATH would go
    decoy.mkdir(parents=True)
    command = (shell, f"{ready.root.name}/scripts/run_bone.sh")
    assert arguments(ready.run(*command, cwd=ready.root.parent, CDPATH=str(ready.elsewhere))) == expected


@pytest.mark.parametrize("script", SETTINGS)
def test_a_copy_outside_of_the_repository_names_it_or_says_so(script, ready):
    ready.echo_modules()
    expected = arguments(ready.sh(script, "--flag"))
    copy = ready.elsewhere / "my copy.sh"
    shutil.copy(ready.scripts / script, copy)
    (ready.elsewhere / "scripts").mkdir()  # of another project
    (ready.elsewhere / "scripts" / "lib.sh").write_text("echo another; exit 1")
    assert sentence(ready.run("sh", copy)) == f"error: no repository at '{ready.elsewhere}': set repo= in {copy}"
    text = copy.read_text()
    for wrong in ("/nowhere", ready.elsewhere):
        copy.write_text(text.replace("\nrepo=", f"\nrepo='{wrong}'", 1))
        # Not even where another could be found: what is written there is what is wanted.
        assert f"no repository at '{wrong}'" in sentence(ready.run("sh", copy, cwd=ready.root))
    copy.write_text(text.replace("\nrepo=", f"\nrepo='{ready.root}'", 1))
    assert arguments(ready.run("sh", copy, "--flag")) == expected
    copy.write_text(text.replace("\nrepo=", "\nrepo='../a clone of mine'", 1))
    assert len(arguments(ready.run("sh", copy, "--flag"))) == len(expected)


def test_paths_in_a_copy_are_relative_to_the_repository_too(ready):
    ready.edit("run_bone.sh", data_file="mine.jsonl")
    copy = ready.elsewhere / "run.sh"
    shutil.copy(ready.scripts / "run_bone.sh", copy)
    (ready.elsewhere / "mine.jsonl").touch()
    config = parse_train(arguments(ready.run("sh", copy, "--eval_data", "mine.jsonl", cwd=ready.root)))
    assert (config.data.data_file, config.data.eval_data) == ((f"{ready.root}/mine.jsonl",), ("mine.jsonl",))


def test_a_setup_or_test_script_that_is_linked_works_and_a_copy_says_so(clone):
    for name in ("setup.sh", "test.sh"):
        (clone.elsewhere / name).symlink_to(clone.scripts / name)
    result = clone.run("sh", clone.elsewhere / "setup.sh")
    assert result.stdout == f"{clone.bin}/python3\n"
    clone.python('case $* in *requirements_met*) ;; *rwkv_bone.devices*) echo ok ;; *) echo "$@" ;; esac')
    assert "-m pytest -n 2 --dist loadfile here" in clone.run("sh", "test.sh", "here").stdout
    (clone.elsewhere / "setup.sh").unlink()
    shutil.copy(clone.scripts / "setup.sh", clone.elsewhere)
    assert "run scripts/setup.sh in the repository" in sentence(clone.run("sh", "setup.sh"))


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name not in ("lib.sh", "gpu_check.sh")])
@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_with_line_ends_of_windows_says_how_to_mend_it(script, shell, ready):
    path = ready.scripts / script
    unix = path.read_bytes()
    mixed = unix.replace(b"\n\n", b"\n\r\n", 1)
    for text in (unix.replace(b"\n", b"\r\n"), mixed):
        path.write_bytes(text)
        result = ready.run(shell, path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"error: Windows line ends; fix: sed -i 's/\\r$//' '{path}'\n"
        ready.run("sh", "-c", result.stderr.partition("fix: ")[2])
        assert path.read_bytes() == unix


@pytest.mark.parametrize("shared", ["lib.sh", "setup.sh"])
@pytest.mark.parametrize("shell", SHELLS)
def test_line_ends_of_windows_in_what_scripts_share_are_named_too(shared, shell, clone):
    path = clone.scripts / shared
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    result = clone.run(shell, clone.scripts / "run_bone.sh")
    assert sentence(result) == f"error: Windows line ends; fix: sed -i 's/\\r$//' '{path}'"
    assert len(result.stderr.splitlines()) == 1


def test_git_gives_text_unix_line_ends_on_every_system_and_leaves_other_files_alone(tmp_path):
    git = shutil.which("git")
    if not git:
        pytest.skip("git is not installed")

    def run(*words: str) -> str:
        settings = ["-c", "core.autocrlf=true", "-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run([git, *settings, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    run("init", "--quiet")
    shutil.copy(REPOSITORY / ".gitattributes", tmp_path)
    contents = {
        "scripts/run_bone.sh": (REPOSITORY / "scripts" / "run_bone.sh").read_bytes(),
        "src/a.py": b"a = 1\n",
        "data.jsonl": b'{"text": "a"}\n',
        "model.pth": b"a\r\nb\n",
        "pairs.bin": b"a\r\nb\n",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "windows.txt").write_bytes(b"a\r\n")
    run("add", ".")
    run("commit", "--quiet", "-m", "x")
    for name in (*contents, "windows.txt"):
        (tmp_path / name).unlink()
    run("checkout", "--quiet", ".")
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    assert (tmp_path / "windows.txt").read_bytes() == b"a\n"


def test_test_script_passes_its_arguments_to_pytest(clone):
    clone.python('case $* in *requirements_met*) ;; *rwkv_bone.devices*) echo ok ;; *) echo "$@" ;; esac')
    result = clone.sh("test.sh", "-m", "gpu")
    assert result.stdout.splitlines() == ["-m ruff check .", "-m mypy", "-m pytest -n 2 --dist loadfile -m gpu"]


def test_setup_takes_an_active_environment_that_has_everything_and_is_quick(clone):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = clone.sh("setup.sh")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, so that other work on the machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert result.stdout == f"{clone.bin}/python3\n"
    assert "using" in result.stderr and "the active environment" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_setup_says_when_there_is_no_compiler_and_goes_on(clone):
    result = clone.sh("setup.sh")
    assert result.returncode == 0 and "no C++ compiler: on the CPU" in result.stderr
    assert "A GPU needs none" in result.stderr


TOO_OLD = "case $2 in *sys.exit*) exit 1 ;; *platform*) echo Python 3.8.1 ;; *) exit 1 ;; esac"


def test_setup_refuses_a_python_that_is_too_old(clone, monkeypatch):
    clone.python(TOO_OLD)
    line = sentence(clone.sh("setup.sh"))
    assert "no Python 3.10 or newer on PATH; found Python 3.8.1. Install one (Debian: apt install python3" in line
    monkeypatch.setenv("CONDA_PREFIX", "/opt/conda/envs/mine")
    result = clone.run("sh", clone.scripts / "setup.sh", CONDA_PREFIX="/opt/conda/envs/mine")
    reason = "it has Python 3.8.1, and 3.10 or newer is needed"
    assert f"setup: not using the active environment /opt/conda/envs/mine: {reason}\n" in result.stderr
    assert sentence(result) == line


def test_setup_takes_a_newer_python_than_that_of_the_active_environment(maker):
    (maker.bin / "python3").rename(maker.bin / "python3.12")
    write_program(maker.bin / "python", TOO_OLD)
    result = maker.run("sh", maker.scripts / "setup.sh", VIRTUAL_ENV="/mine")
    assert result.stdout == f"{maker.root}/.venv/bin/python\n", result.stderr
    assert "not using the active environment /mine: it has Python 3.8.1" in result.stderr


def test_setup_says_what_the_active_environment_lacks_and_leaves_it_alone(maker):
    result = maker.run("sh", maker.scripts / "setup.sh", CONDA_PREFIX="/mine")
    remedy = f"(to use it: {maker.bin}/python3 -m pip install -r '{maker.root}/requirements.txt')"
    assert f"setup: not using the active environment /mine: torch is not installed {remedy}\n" in result.stderr
    assert result.stdout == f"{maker.root}/.venv/bin/python\n"


def test_setup_refuses_to_go_on_without_python_or_venv_or_with_unknown_options(clone):
    assert "expected --dev" in clone.sh("setup.sh", "--gpu").stderr
    clone.python("case $* in *requirements_met*|*ensurepip*) exit 1 ;; esac")
    line = sentence(clone.sh("setup.sh"))
    assert "python3 has no venv module. Install it (Debian: apt install python3-venv), or activate an env" in line
    assert not (clone.root / ".venv").exists()
    (clone.bin / "python3").unlink()
    assert "no Python 3.10 or newer on PATH; found no Python" in sentence(clone.sh("setup.sh"))


def test_no_script_runs_where_setup_cannot_go_on(clone):
    clone.python(TOO_OLD)
    for script in ("run_bone.sh", "preview_data.sh", "plan.sh", "test.sh"):
        assert sentence(clone.sh(script)).startswith("setup: no Python 3.10")
    result = clone.sh("merge_bone.sh", "--peft_checkpoint", "x")
    assert sentence(result).startswith("setup: no Python 3.10")


MAKES_ENVIRONMENTS = """
case $* in
    *requirements_met*torch) [ -n "${BASE_TORCH:-}" ] ;;
    *requirements_met*) [ -e "$0.complete" ] || { echo torch is not installed; exit 1; } ;;
    *'-m venv '*)
        [ -z "${VENV_FAILS:-}" ] || exit 1
        echo "$@"
        for folder; do :; done
        mkdir -p "$folder/bin" "$folder/lib/python3.11/site-packages"
        while read -r line; do echo "$line"; done < "$0" > "$folder/bin/python"
        chmod +x "$folder/bin/python" ;;
    *'-m pip '*torch==*) echo "torch first: $*" ;;
    *'-m pip '*)
        if [ -e "$PIP_FAILS" ]; then
            until [ "$1" = --log ]; do shift; done
            while read -r line; do echo "$line"; done < "$PIP_FAILS" > "$2"
            exit 1
        fi
        if [ -n "${PIP_WAITS:-}" ]; then : > "$PIP_WAITS"; while [ -e "$PIP_WAITS" ]; do sleep 0.1; done; fi
        : > "$0.complete" ;;
    *'import deepspeed'*) [ -z "${IMPORT_FAILS:-}" ] ;;
    *rwkv_bone.devices*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def maker(clone, monkeypatch):
    """A clone whose `python3` makes environments and installs into them, both only in appearance.

    pip fails with the words in the file `pip fails` beside the clone, while that is there.
    """
    (clone.bin / "chmod").symlink_to(shutil.which("chmod"))
    clone.python(MAKES_ENVIRONMENTS)
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("PIP_FAILS", f"{clone.elsewhere}/pip fails")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return clone


def asked_of_pip(result) -> str:
    """What pip was asked for first."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("torch first")]
    return line.partition("--disable-pip-version-check ")[2]


def begins_anew(clone) -> None:
    """The next call removes what is half made, makes it, and leaves nothing for the one after it to do."""
    environment = clone.root / ".venv"
    (environment / "left over").touch()
    result = clone.sh("setup.sh")
    assert result.returncode == 0, result.stderr
    assert f"removing {environment}, whose installation was interrupted" in result.stderr
    assert result.stdout == f"{environment}/bin/python\n"
    assert not (environment / "left over").exists() and not (environment / ".unfinished").exists()
    again = clone.sh("setup.sh")
    assert again.stdout == result.stdout and "installing" not in again.stderr


@pytest.mark.parametrize(
    "words, reason",
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "the disk is full. Make",
        ),
        (
            "Retrying (Retry(total=4)) after connection broken by 'NameResolutionError'",
            "it cannot reach the package index",
        ),
        (
            "Could not fetch URL https://pypi.org/: connection error: Max retries exceeded",
            "it cannot reach the package",
        ),
        ("ERROR: Hash mismatch", "for the reason above. Fix that, or activate an environment"),
    ],
)
def test_setup_says_why_an_installation_failed_and_the_next_call_begins_anew(words, reason, maker):
    (maker.elsewhere / "pip fails").write_text(f"Looking\n{words}\nBye\n")
    line = sentence(maker.sh("setup.sh"))
    assert line.startswith(f"setup: pip could not install what is missing: {reason}".replace(": for", ", for"))
    assert line.endswith("then run the same command again")
    (maker.elsewhere / "pip fails").unlink()
    begins_anew(maker)


def test_setup_says_that_a_disk_is_full_where_pip_could_not_even_write_its_log(maker):
    (maker.elsewhere / "pip fails").touch()
    write_program(maker.bin / "df", "echo Filesystem blocks Used Available; echo disk 100 90 10240")
    assert "the disk is full. Make room (10 MB are free at" in sentence(maker.sh("setup.sh"))


def test_an_environment_that_cannot_be_made_ends_in_a_sentence(maker):
    environment = maker.root / ".venv"
    result = maker.run("sh", maker.scripts / "setup.sh", VENV_FAILS="1")
    assert sentence(result).startswith(f"setup: python3 could not make {environment}, for the reason above")
    begins_anew(maker)
    shutil.rmtree(environment)
    environment.write_text("not a folder")
    assert sentence(maker.sh("setup.sh")).startswith(f"setup: {environment} cannot be made, for the reason above")
    environment.unlink()
    environment.symlink_to("/proc")  # where nobody can write
    assert sentence(maker.sh("setup.sh")).startswith(f"setup: {environment} cannot be written, for the reason above")


def test_what_is_installed_and_cannot_be_imported_is_installed_anew(maker):
    result = maker.run("sh", maker.scripts / "setup.sh", IMPORT_FAILS="1")
    assert sentence(result).startswith("setup: what pip installed cannot be imported, for the reason above")
    (maker.root / ".venv" / "bin" / "python.complete").unlink()
    begins_anew(maker)


def test_an_environment_of_an_old_python_is_named(maker):
    assert maker.sh("setup.sh").returncode == 0
    write_program(maker.root / ".venv" / "bin" / "python", TOO_OLD)
    assert f"{maker.root}/.venv has Python 3.8.1: remove that folder" in sentence(maker.sh("setup.sh"))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_installation_that_is_interrupted_says_so_and_begins_anew(shell, number, maker):
    waits = maker.elsewhere / "pip waits"
    process = subprocess.Popen(
        [shell, maker.scripts / "setup.sh"],
        env=maker.environment() | {"PIP_WAITS": str(waits)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not waits.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    assert (process.returncode, out) == (128 + number, "")
    assert err.splitlines()[-1] == "setup: interrupted. Run the same command again: it begins anew"
    begins_anew(maker)


def test_an_installation_that_was_killed_begins_anew(maker):
    (maker.elsewhere / "pip fails").touch()
    assert maker.sh("setup.sh").returncode == 2
    (maker.elsewhere / "pip fails").unlink()
    ended = subprocess.Popen(["true"])
    ended.wait()
    for owner in (f"{ended.pid}@{os.uname().nodename}\n", ""):
        (maker.root / ".venv" / ".unfinished").touch()
        (maker.root / ".venv.lock").write_text(owner)
        begins_anew(maker)
        assert not (maker.root / ".venv.lock").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_of_calls_at_once_on_two_machines_one_makes_the_environment_and_the_others_wait(shell, maker):
    waits, other = maker.elsewhere / "pip waits", maker.elsewhere / "other machine"
    other.mkdir()
    write_program(other / "uname", "echo node2")
    write_program(other / "sleep", f': > "$WAITED"; exec {shutil.which("sleep")} 0.1')
    here = maker.environment() | {"PIP_WAITS": str(waits), "WAITED": str(maker.elsewhere / "waited")}
    there = here | {"PATH": f"{other}:{here['PATH']}"}

    def start(environment):
        command = [shell, maker.scripts / "setup.sh"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    first = start(here)
    while not waits.exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = start(there)
    while not (maker.elsewhere / "waited").exists():
        assert second.poll() is None
        time.sleep(0.01)
    assert first.poll() is None
    waits.unlink()
    (out, err), (out2, err2) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (0, 0), err + err2
    assert out == out2 == f"{maker.root}/.venv/bin/python\n"
    owner = f"process {first.pid} on {os.uname().nodename}"
    assert f"setup: waiting for {owner}, which is making {maker.root}/.venv (0 seconds; if it is not at" in err2
    assert "installing" in err and "installing" not in err2 and "making" not in err2.replace("which is making", "")
    assert not (maker.root / ".venv.lock").exists()


def test_the_lock_of_another_machine_is_left_alone_and_what_to_do_is_said(maker):
    lock = maker.root / ".venv.lock"
    lock.write_text("1@node7\n")
    write_program(maker.bin / "sleep", "exit 1")  # the script ends where it would wait, by set -e
    result = maker.sh("setup.sh")
    assert result.returncode == 1
    assert "waiting for process 1 on node7" in result.stderr and f"there any more, remove {lock})" in result.stderr
    assert lock.read_text() == "1@node7\n"


def test_an_environment_whose_update_fails_is_kept(maker):
    assert maker.sh("setup.sh").returncode == 0
    environment = maker.root / ".venv"
    (environment / "bin" / "python.complete").unlink()  # as if a requirement had changed
    (environment / "mine").touch()
    (maker.elsewhere / "pip fails").touch()
    assert "torch is not installed: installing" in maker.sh("setup.sh").stderr
    assert "torch is not installed: installing" in maker.sh("setup.sh").stderr
    (maker.elsewhere / "pip fails").unlink()
    assert maker.sh("setup.sh").returncode == 0 and (environment / "mine").exists()


@pytest.mark.slow
def test_setup_without_a_network_ends_in_a_sentence_and_begins_anew(clone):
    """The real venv and pip, and a package index that nobody serves."""
    packages = clone.elsewhere / "packages"  # all that the Python of these tests lacks, is what it has
    clone.python(f'exec "{Path(sys.base_prefix) / "bin" / "python3"}" "$@"')
    if (
        clone.run(
            clone.bin / "python3", clone.scripts / "requirements_met.py", clone.root / "requirements.txt"
        ).returncode
        == 0
    ):
        pytest.skip("the Python below that of these tests has everything")
    variables = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple/cpu", "PIP_RETRIES": "0", "PIP_CACHE_DIR": str(packages)}
    for _ in range(2):
        line = sentence(clone.run("sh", clone.scripts / "setup.sh", **variables))
        assert line.startswith("setup: pip could not install what is missing: it cannot reach the package index. Check")
        assert (clone.root / ".venv" / ".unfinished").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_setup_builds_on_a_torch_that_is_installed_already(maker, monkeypatch, installed):
    monkeypatch.setenv("BASE_TORCH", "1" if installed else "")
    result = maker.sh("setup.sh")
    assert result.returncode == 0, result.stderr
    final = [line for line in result.stderr.splitlines() if line.startswith("-m venv")][-1]
    assert ("--system-site-packages" in final) is installed
    assert ("torch first" in result.stderr) is not installed


def test_an_environment_of_the_repository_can_import_the_package(maker):
    assert maker.sh("setup.sh").returncode == 0
    folder = maker.root / ".venv" / "lib" / "python3.11" / "site-packages"
    line = (folder / "rwkv_bone.pth").read_text().strip()
    assert (folder / line).resolve() == maker.root / "src"


@pytest.mark.parametrize(
    "driver, capability, wanted",
    [
        ("580.65.06", "8.6", "torch==2.13.0"),
        ("610.43.02", "12.0", "torch==2.13.0"),
        ("525.60.13", "8.6", "torch==2.10.0"),
        ("580.65.06", "6.1", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"),
    ],
)
def test_setup_asks_pip_for_a_torch_that_the_driver_runs(driver, capability, wanted, maker):
    write_smi(maker.bin, driver, [("NVIDIA Card", capability)])
    result = maker.sh("setup.sh")
    assert result.returncode == 0, result.stderr
    assert asked_of_pip(result) == wanted
    assert f"NVIDIA Card (sm_{capability.replace('.', '')}) with driver {driver}" in result.stderr


def test_setup_refuses_a_driver_that_no_torch_runs_on_and_says_what_to_do(maker):
    write_smi(maker.bin, "470.256.02")
    result = maker.sh("setup.sh")
    assert result.returncode == 2 and result.stdout == "" and "torch first" not in result.stderr
    for part in ("470.256.02", "update it to 580.65.06", "525.60.13", "PIP_EXTRA_INDEX_URL="):
        assert part in result.stderr


@pytest.mark.parametrize("build", ["cpu", "cu126"])
def test_setup_leaves_the_choice_of_an_index_to_the_user(build, maker, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"https://download.pytorch.org/whl/{build}")
    write_smi(maker.bin, "470.256.02")
    result = maker.sh("setup.sh")
    assert result.returncode == 0, result.stderr
    assert asked_of_pip(result) == "torch==2.13.0"


def test_setup_says_that_the_driver_is_broken_and_goes_on(maker):
    write_failing_smi(maker.bin)
    result = maker.sh("setup.sh")
    assert result.returncode == 0, result.stderr
    assert asked_of_pip(result) == "torch==2.13.0"
    assert NOT_LOADED in result.stderr


def test_setup_says_that_what_it_installed_uses_the_card(maker, monkeypatch):
    write_smi(maker.bin, "580.65.06")
    write_torch(maker.elsewhere / "packages", "2.13.0+cu130", "13.0", sees=True)
    monkeypatch.setenv("PYTHONPATH", str(maker.elsewhere / "packages"))
    line = "torch 2.13.0+cu130, built for CUDA 13.0, sees NVIDIA GeForce RTX 3090 (sm_86))"
    assert line in maker.sh("setup.sh").stderr
    # A second call is quick: it imports nothing.
    (maker.elsewhere / "packages" / "torch" / "__init__.py").write_text("raise SystemExit(1)")
    again = maker.sh("setup.sh")
    assert again.returncode == 0 and "torch 2.13.0+cu130, built for CUDA 13.0)" in again.stderr


def test_setup_says_that_what_it_installed_does_not_use_the_card(maker, monkeypatch):
    write_smi(maker.bin, "580.65.06")
    words = "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
    write_torch(maker.elsewhere / "packages", "2.13.0+cu130", "13.0", sees=False, says=words)
    monkeypatch.setenv("PYTHONPATH", str(maker.elsewhere / "packages"))
    result = maker.sh("setup.sh")
    assert result.returncode == 0 and " sees NVIDIA" not in result.stderr
    assert "setup: PyTorch sees no CUDA device that it can use" in result.stderr
    assert "setup:   - restart the machine" in result.stderr


def test_setup_says_that_an_active_environment_is_for_the_cpu_and_changes_nothing(clone, monkeypatch):
    write_torch(clone.elsewhere / "packages", "2.13.0+cpu", None, sees=False)
    monkeypatch.setenv("PYTHONPATH", str(clone.elsewhere / "packages"))
    assert "cannot use" not in clone.sh("setup.sh").stderr
    write_smi(clone.bin, "525.60.13")
    result = clone.sh("setup.sh")
    assert result.stdout == f"{clone.bin}/python3\n" and not (clone.root / ".venv").exists()
    line = "torch 2.13.0+cpu, built for the CPU alone, cannot use NVIDIA GeForce RTX 3090 (sm_86): install a PyTorch"
    assert line in result.stderr and "-m pip install --force-reinstall torch==2.10.0" in result.stderr


@pytest.mark.parametrize(
    "line, missing",
    [
        ("pytest>=1", ""),
        ("pytest>=1000", "pytest>=1000 is needed"),
        ("no-such-package==1", "no-such-package==1 is not installed"),
        ("# a comment\n\npytest  # another", ""),
        ("-r more.txt", "no-such-package is not installed"),
    ],
)
def test_requirements_are_checked_without_importing_anything(line, missing, tmp_path):
    (tmp_path / "requirements.txt").write_text(line)
    (tmp_path / "more.txt").write_text("no-such-package")
    program = [sys.executable, REPOSITORY / "scripts" / "requirements_met.py", tmp_path / "requirements.txt"]
    result = subprocess.run(program, capture_output=True, text=True)
    assert (result.returncode == 0) == (missing == "") and missing in result.stderr
