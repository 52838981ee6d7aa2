"""The shell scripts: safe shell, real flags, the right Python, and nothing taken for good that is half made.

They run in a copy of the repository whose path has spaces, with a `python3` on PATH that is the Python of these tests
(which has everything), or a stand-in for one that has not.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_bone.config import MergeConfig
from rwkv_bone.config.flags import SECTIONS, parse_merge, parse_train
from tests.nvidia import NOT_LOADED, write_failing_smi, write_program, write_smi, write_torch

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))
RUN_SCRIPTS = ("run_bone.sh", "run_bat.sh", "run_lora.sh", "run_pissa.sh")
MERGE_SCRIPTS = ("merge_bone.sh", "merge_bat.sh", "merge_lora.sh", "merge_pissa.sh")
TRAIN_FLAGS = {spec.name for section in SECTIONS.values() for spec in fields(section)}
MERGE_FLAGS = {spec.name for spec in fields(MergeConfig)} | {"proj_dir"}  # proj_dir: where the adapter is looked for
NOT_PASSED_ON = ("VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_VISIBLE_DEVICES", "PIP_INDEX_URL")
ECHO = "import json, sys; print(json.dumps(sys.argv[1:]))\n"


class Clone:
    """A copy of what the scripts need, and the PATH they run with."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone of mine"
        self.bin = folder / "the bin"
        self.elsewhere = folder / "else where"
        self.bin.mkdir()
        self.elsewhere.mkdir()
        for name in ("scripts", "src", "requirements"):
            shutil.copytree(REPOSITORY / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(REPOSITORY / name, self.root)
        for name in ("train.py", "merge.py"):
            (self.root / name).write_text(ECHO)
        for tool in ("sh", "dirname", "mkdir", "rm"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python(f'exec "{sys.executable}" "$@"')

    def python(self, body: str) -> None:
        """Makes `python3` a shell script with this body."""
        write_program(self.bin / "python3", body)

    def sh(self, script: str, *words: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON}
        return subprocess.run(
            ["sh", self.root / "scripts" / script, *words],
            cwd=self.elsewhere,
            env=environment | {"PATH": str(self.bin)},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def arguments(result) -> list[str]:
    """What the stand-in for train.py or merge.py was called with."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[0])


def variables(script: str) -> dict[str, str]:
    """name -> the rest of its line, of the variables at the top of a script."""
    head = (REPOSITORY / "scripts" / script).read_text().split("lib.sh")[0]
    return dict(re.findall(r"^([a-z]\w*)=(.*)$", head, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_scripts_are_valid_in_every_shell(script, shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], check=True)


def test_shellcheck_has_no_complaint():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed")
    subprocess.run([program, "-x", *SCRIPTS, REPOSITORY / ".ci" / "run"], check=True, cwd=REPOSITORY)


def test_continuous_integration_runs_the_test_script_and_then_the_slow_tests():
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == ["sh scripts/test.sh", "exec sh scripts/test.sh -m slow"]


@pytest.mark.parametrize("script", [*RUN_SCRIPTS, *MERGE_SCRIPTS])
def test_every_variable_is_a_flag_with_a_line_of_meaning(script):
    text = (REPOSITORY / "scripts" / script).read_text()
    for name, rest in variables(script).items():
        assert name in (MERGE_FLAGS if script in MERGE_SCRIPTS else TRAIN_FLAGS)
        assert re.search(r" # \w.+", rest), f"{name} has no comment"
        assert name == "proj_dir" or re.search(rf'--{name} "[^"]*"?\${name}"', text), f"{name} is not passed on"


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_run_scripts_need_no_edits_and_pass_a_valid_command_line(script, clone):
    config = parse_train(arguments(clone.sh(script)))
    assert config.run.strategy == "deepspeed_stage_1"
    assert config.adapter.kind == script.removeprefix("run_").removesuffix(".sh")
    assert config.run.proj_dir == f"{clone.root}/out/{config.adapter.kind}"
    for name, path in (("load_model", config.model.load_model), ("data_file", *config.data.data_file)):
        relative = Path(path).relative_to(clone.root)
        assert str(relative) == variables(script)[name].split()[0]
        assert (REPOSITORY / relative).is_file()


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_any_variable_can_be_overridden_and_paths_stay_the_callers(script, clone):
    words = ["--bone_r", "32", "--data_file", "my rows.jsonl", "--targets", "att.key", "ffn"]
    config = parse_train(arguments(clone.sh(script, *words)))
    assert (config.adapter.bone_r, config.adapter.targets) == (32, ("att.key", "ffn"))
    assert config.data.data_file == ("my rows.jsonl",)


def test_a_python_that_the_caller_names_is_taken_as_it_is(clone, monkeypatch):
    monkeypatch.setenv("RWKV_PYTHON", f"{clone.bin}/my python")
    (clone.bin / "python3").rename(clone.bin / "my python")
    result = clone.sh("run_bone.sh")
    assert arguments(result) and "setup:" not in result.stderr


def test_an_edited_variable_may_hold_any_path(clone):
    script = clone.root / "scripts" / "run_bone.sh"
    text = re.sub(r"(?m)^load_model=\S*", "load_model='/data/my model.pth'", script.read_text())
    script.write_text(re.sub(r"(?m)^eval_data=\S*", "eval_data=''", text))
    config = parse_train(arguments(clone.sh("run_bone.sh")))
    assert (config.model.load_model, config.data.eval_data) == ("/data/my model.pth", "")


@pytest.mark.parametrize("script", MERGE_SCRIPTS)
def test_merge_scripts_take_the_newest_adapter_by_number(script, clone):
    kind = script.removeprefix("merge_").removesuffix(".sh")
    folder = clone.root / "out" / kind
    folder.mkdir(parents=True)
    for name in ("rwkv-2.pth", "rwkv-10.pth", "rwkv-9.pth", "rwkv-init.pth", "rwkv-3-step-50.pth", "rwkv-11.json"):
        (folder / name).touch()
    config = parse_merge(arguments(clone.sh(script)))
    assert config.peft_checkpoint == str(folder / "rwkv-10.pth")
    assert config.output == f"{clone.root}/out/rwkv7-tiny-{kind}.pth"
    config = parse_merge(arguments(clone.sh(script, "--lora_checkpoint", "mine.pth", "--overwrite")))
    assert config.peft_checkpoint == "mine.pth" and config.overwrite


def test_merge_script_without_an_adapter_says_how_to_make_one(clone):
    result = clone.sh("merge_bone.sh")
    assert result.returncode == 2 and "run_bone.sh" in result.stderr


def test_test_script_passes_its_arguments_to_pytest(clone):
    clone.python('case $* in *requirements_met*) ;; *rwkv_bone.devices*) echo ok ;; *) echo "$@" ;; esac')
    result = clone.sh("test.sh", "-m", "gpu")
    assert result.stdout.splitlines() == ["-m ruff check .", "-m pytest -m gpu"]


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


def test_setup_refuses_a_python_that_is_too_old(clone):
    clone.python('[ "$1" = --version ] && echo Python 3.8.1; exit 1')
    result = clone.sh("setup.sh")
    assert result.returncode == 2 and result.stdout == ""
    assert "no Python 3.10 or newer on PATH; found Python 3.8.1" in result.stderr


def test_setup_refuses_to_go_on_without_python_or_venv_or_with_unknown_options(clone):
    assert "expected --dev" in clone.sh("setup.sh", "--gpu").stderr
    clone.python("case $* in *requirements_met*|*ensurepip*) exit 1 ;; esac")
    assert "python3-venv" in clone.sh("setup.sh").stderr
    (clone.bin / "python3").unlink()
    result = clone.sh("setup.sh")
    assert result.returncode == 2 and "no Python 3.10 or newer on PATH" in result.stderr


MAKES_ENVIRONMENTS = """
case $* in
    *requirements_met*torch) [ -n "${BASE_TORCH:-}" ] ;;
    *requirements_met*) [ -e "$0.complete" ] || { echo torch is not installed; exit 1; } ;;
    *'-m venv '*)
        echo "$@"
        for folder; do :; done
        mkdir -p "$folder/bin" "$folder/lib/python3.11/site-packages"
        while read -r line; do echo "$line"; done < "$0" > "$folder/bin/python"
        chmod +x "$folder/bin/python" ;;
    *'-m pip '*torch==*) echo "torch first: $*" ;;
    *'-m pip '*) [ -e "$PIP_FAILS" ] && exit 1; : > "$0.complete" ;;
    *rwkv_bone.devices*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def maker(clone, monkeypatch):
    """A clone whose `python3` makes environments and installs into them, both only in appearance."""
    (clone.bin / "chmod").symlink_to(shutil.which("chmod"))
    clone.python(MAKES_ENVIRONMENTS)
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("PIP_FAILS", "")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return clone


def asked_of_pip(result) -> str:
    """What pip was asked for first."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("torch first")]
    return line.partition("--disable-pip-version-check ")[2]


def test_setup_starts_again_after_an_interrupted_installation(maker, monkeypatch):
    clone = maker
    failing = clone.elsewhere / "pip fails"
    failing.touch()
    monkeypatch.setenv("PIP_FAILS", str(failing))
    environment = clone.root / ".venv"

    assert clone.sh("setup.sh").returncode == 1
    assert (environment / ".unfinished").exists()
    left_over = environment / "left over"
    left_over.touch()
    failing.unlink()

    result = clone.sh("setup.sh")
    assert result.returncode == 0, result.stderr
    assert "interrupted" in result.stderr and "torch first" in result.stderr
    assert result.stdout == f"{environment}/bin/python\n"
    assert not left_over.exists() and not (environment / ".unfinished").exists()

    again = clone.sh("setup.sh")
    assert again.stdout == result.stdout and "installing" not in again.stderr


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
