"""The doctor: what is wrong comes first with its remedy, and nobody is given away."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rwkv_bone import devices
from rwkv_bone.doctor import examine, finding, machine, packages, trials
from rwkv_bone.doctor.finding import FINE, PROBLEM, WARNING, Finding
from tests.conftest import clean_environment
from tests.nvidia import RTX_3090, write_failing_smi, write_program, write_smi

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = str(REPOSITORY / "src")
GB = 2**30


def levels(findings) -> list[str]:
    return [one.level for one in findings]


# --- packages ---


def test_bounds_hold_for_the_versions_for_which_they_do_in_packaging():
    draw = random.Random(0)
    bounds = [
        *("", "==2.6.6", ">=1.11", ">=2.8,<2.15", ">1,<=3.0", "==2.0"),
        *(one.bounds for one in packages.wanted()),
    ]
    for bound in bounds:
        for _ in range(200):
            version = ".".join(str(draw.choice((0, 1, 2, 3, 6, 8, 14, 15))) for _ in range(draw.randint(1, 3)))
            assert packages.within(version, bound) == SpecifierSet(bound).contains(version), (version, bound)
    assert packages.within("2.13.0+cpu", ">=2.8,<2.15") and not packages.within("2.15.1+cu130", ">=2.8,<2.15")


def test_what_is_wanted_is_what_the_requirements_files_name():
    for extra in ("", "hf", "gguf"):
        path = REPOSITORY / (f"requirements/{extra}.txt" if extra else "requirements.txt")
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        expected = {(one.name, one.specifier) for line in lines if line for one in [Requirement(line)]}
        assert {(w.name, SpecifierSet(w.bounds)) for w in packages.wanted() if w.extra == extra} == expected


def test_an_installed_package_names_its_requirements_itself(tmp_path, monkeypatch):
    names = ["torch<2.15,>=2.8", 'gguf<1,>=0.19; extra == "gguf"']
    monkeypatch.setattr(packages.metadata, "requires", lambda name: names)
    assert packages.wanted(tmp_path) == [("torch", "<2.15,>=2.8", ""), ("gguf", "<1,>=0.19", "gguf")]


def test_missing_packages_are_a_problem_others_than_tested_a_warning_and_optional_ones_neither(monkeypatch):
    versions = {one.name: one.bounds.strip("=><").partition(",")[0] for one in packages.wanted() if not one.extra}
    monkeypatch.setattr(packages, "installed", versions.get)
    found = list(packages.look())
    assert set(levels(found)) == {FINE}
    assert "gguf not installed (GGUF files" in found[-1].text
    versions |= {"torch": "2.7.1", "ninja": None, "lightning": None}
    found = list(packages.look())
    assert [one.text for one in found if one.level == PROBLEM] == ["not installed: lightning==2.6.6"]
    assert "sh scripts/setup.sh" in next(one.remedy for one in found if one.level == PROBLEM)
    told = [one.text for one in found if one.level == WARNING]
    assert told == [
        "ninja is not installed: DeepSpeed compiles nothing here",
        "torch 2.7.1 is installed; tested is >=2.8,<2.15",
    ]


# --- the machine ---


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The folder of an nvidia-smi, on a machine that says nothing else about a driver; what PyTorch is built for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(devices, "DRIVER_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(cuda: str | None):
        monkeypatch.setattr(devices, "installed_torch", lambda: devices.Torch("2.13.0", cuda))
        return tmp_path

    return make


def test_a_driver_that_this_torch_cannot_use_is_a_problem_with_every_way_out(driver):
    folder = driver("13.0")
    assert levels(machine.driver("auto")) == [FINE] and levels(machine.driver("gpu")) == [PROBLEM]
    write_smi(folder, "525.60.13", [RTX_3090])
    (one,) = machine.driver("auto")
    assert one.level == PROBLEM and "RTX 3090" in one.text and "needs driver 580.65.06" in one.text
    assert "update the driver to 580.65.06" in one.remedy and "--accelerator cpu" in one.remedy
    assert levels(machine.driver("cpu")) == [FINE]
    write_smi(folder, "580.65.06", [RTX_3090])
    assert levels(machine.driver("auto")) == [FINE]
    driver(None)
    (one,) = machine.driver("auto")
    assert one.level == PROBLEM and "pip install --force-reinstall torch==2.13.0" in one.remedy
    write_failing_smi(folder)
    assert "repair the driver" in next(machine.driver("auto")).remedy


def test_hidden_cards_are_no_problem_and_that_is_said(driver, monkeypatch):
    write_smi(driver("13.0"), "525.60.13", [RTX_3090])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (one,) = machine.driver("auto")
    assert one.level == FINE and "CUDA_VISIBLE_DEVICES hides every card" in one.text


def test_the_compiler_is_the_one_that_builds_kernels_and_its_lack_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (one,) = machine.compiler()
    assert one.level == WARNING and "apt install g++" in one.remedy
    write_program(tmp_path / "clang++", "echo clang version 99")
    assert next(machine.compiler())[:3] == (FINE, "compiler", "clang version 99")
    monkeypatch.setenv("CXX", "my-secret-cxx")
    (one,) = machine.compiler()
    assert (
        one.level == WARNING
        and "my-secret-cxx" in one.text
        and "secret" not in one.public
        and one.remedy == "unset CXX"
    )


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000", "cpu.max": "800000 100000"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("", {}, None),
    ],
)
def test_cores_are_those_whose_time_the_control_groups_give(groups, files, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert machine.cgroup_cores(tmp_path) == expected
    (one,) = machine.cores(tmp_path)
    less = expected is not None and expected < devices.usable_cores()
    assert one.level == (WARNING if less else FINE)
    assert not less or "OMP_NUM_THREADS=1" in one.remedy


@pytest.mark.parametrize("free, level", [(1 << 20, WARNING), (64 << 20, FINE)])
def test_little_memory_is_a_warning(free, level, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:  {64 << 20} kB\nMemAvailable:    {free} kB\n")
    (one,) = machine.memory(tmp_path)
    assert one.level == level and one.text.startswith("64.0 GB in all, ")


def test_full_disks_are_a_warning_and_folders_that_cannot_be_written_to_a_problem(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9 * GB, GB, 8 * GB))
    found = list(machine.disks())
    assert levels(found) == [FINE] * 3
    assert all(str(tmp_path) not in one.public and "/" not in one.public for one in found)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9 * GB, 8 * GB, GB))
    assert levels(machine.disks()) == [WARNING] * 3 and levels(machine.shared_memory(tmp_path)) == [FINE]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = list(machine.disks())
    assert levels(found) == [PROBLEM, WARNING, PROBLEM]
    assert [next(w for w in one.remedy.split() if w.isupper() or w == "--proj_dir") for one in found] == [
        "--proj_dir",
        "XDG_CACHE_HOME",
        "TMPDIR",
    ]


def test_dockers_64_mb_of_shared_memory_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=64 << 20, free=64 << 20))
    (one,) = machine.shared_memory(tmp_path)
    assert one.level == WARNING and "--shm-size" in one.remedy


# --- what is tried ---


def test_every_operator_agrees_with_its_definition_and_a_wrong_one_does_not(monkeypatch):
    from rwkv_bone.doctor import kernels

    cpu = torch.device("cpu")
    assert max(kernels.error_of(name, cpu) for name in kernels.GENERATIONS) < 1e-5
    right = kernels.run

    def wrong(*words, **more):
        y, last = right(*words, **more)
        return y, last * 1.001

    monkeypatch.setattr(kernels, "run", wrong)
    told = []
    monkeypatch.setattr(kernels, "tell", lambda *words: told.append(words))
    kernels.check(cpu, "the CPU")
    assert [(level, what) for level, what, *_ in told] == [("problem", "kernels")] * 3
    assert "RWKV-5 on the CPU" in told[2][2] and "the numbers are wrong" in told[2][2]


def test_a_torch_that_cannot_be_imported_is_a_problem_with_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    run = trials.run
    code = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); sys.argv[:] = sys.argv[1:]; "
    code += "runpy.run_module(sys.argv[0], run_name='__main__')"
    monkeypatch.setattr(
        trials, "run", lambda command, folder=None: run(["-c", code, str(tmp_path), *command[1:]], folder)
    )
    (one,) = trials.kernels("auto")
    assert one.level == PROBLEM and "libcudart.so.13" in one.text and one.remedy


def test_a_training_that_fails_is_told_in_the_programs_words(monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "TINY", tmp_path / "nowhere.pth")
    monkeypatch.setattr(trials, "SIZES", {"n_layer": -1})
    (one,) = trials.training("cpu")
    assert (one.level, one.what) == (PROBLEM, "training")
    assert one.text.endswith("error: --n_layer -1: expected at least 0") and one.remedy


def test_what_is_tried_is_no_part_of_a_run_that_a_launcher_has_begun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR", "NODE_RANK"):
        monkeypatch.setenv(name, "3")
    code = "from rwkv_bone.launched import Launched, find; assert find() == Launched()"
    assert trials.run(["-c", code]) == (0, "", "")


def test_the_last_words_of_a_program_begin_at_its_error():
    assert trials.last_words("note: a\nerror: --x: b\n  - do this\n", 2) == "error: --x: b\n  - do this"
    assert trials.last_words("Traceback\na\nb\nValueError: c\n", 1) == "a\nb\nValueError: c"
    assert trials.last_words("", -9) == "exit status -9, without a word"


# --- the report ---


def test_problems_come_first_each_with_its_remedy_then_what_is_fine_then_the_block():
    found = [
        Finding(FINE, "cores", "2 of CXX=secret", "", "2"),
        Finding(WARNING, "memory", "little", "close programs"),
        Finding(PROBLEM, "packages", "none", "sh scripts/setup.sh\nor pip"),
    ]
    lines = list(finding.report(found, "9"))
    text = "\n".join(lines)
    at = [text.index(word) for word in ("none", "do: sh scripts/setup.sh", "    or pip", "little", "cores ", "```text")]
    assert at == sorted(at)
    assert lines[-1] == "not fit   1 problem (1 warning): what to do stands with each, above"
    assert "secret" in text.split("```text")[0] and "secret" not in text.split("```text")[1]
    assert "PROBLEM packages: none" in text and "WARNING memory: little" in text
    assert list(finding.report(found[:2], "9"))[-1] == "fit       this machine can train (1 warning)"


def test_the_block_gives_neither_user_nor_host_nor_folders_away(monkeypatch, tmp_path):
    home = tmp_path / "Ada Lovelace"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine7.example.org")
    monkeypatch.setattr(finding.sys, "prefix", "/opt/py thon")
    monkeypatch.chdir(home)
    text = (
        f"error: {home}/secret project/x.pth: on engine7 (engine7.example.org) ada said "
        "/srv/customers/acme/data.jsonl, "
        "'/mnt/nas 1/b' /opt/py thon/bin/python /dev/shm https://pytorch.org/get torch 2.13.0+cu130, adapter 3/4"
    )
    told = finding.anonymous(text)
    for word in ("Lovelace", "engine7", "example.org", "customers", "acme", "py thon", str(tmp_path)):
        assert word not in told
    assert "ada " not in told.replace("adapter ", "")
    for word in ("x.pth", "data.jsonl", "https://pytorch.org/get", "torch 2.13.0+cu130", "adapter 3/4"):
        assert word in told


def run_doctor(*words: str, python=(sys.executable,), **variables: str) -> subprocess.CompletedProcess:
    environment = clean_environment() | {"PYTHONPATH": SOURCE} | variables
    command = [*python, "-m", "rwkv_bone.doctor", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_any_package_the_doctor_says_so_and_ends_with_1(tmp_path):
    done = run_doctor(python=(sys.executable, "-S"), HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    problems, _, rest = done.stdout.partition("Warnings:")
    assert "not installed: torch>=2.8" in problems and "do: sh scripts/setup.sh" in problems
    assert "kernels, training and merging: packages are missing" in rest
    assert done.stdout.rstrip().splitlines()[-1].startswith("not fit   1 problem")


def test_a_quick_look_at_this_machine_finds_it_fit_and_keeps_its_secrets(tmp_path):
    home = tmp_path / "home of zaphod"
    home.mkdir()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    secrets = {"HOME": str(home), "LOGNAME": "zaphod", "XDG_CACHE_HOME": cache, "WANDB_API_KEY": "beeblebrox"}
    done = run_doctor("--quick", "1", "--accelerator", "cpu", **secrets)
    assert done.returncode == 0, done.stdout + done.stderr
    block = done.stdout.split("```text\n")[1].split("```")[0]
    for word in ("zaphod", "beeblebrox", str(home), cache, socket.gethostname(), str(Path.cwd()), sys.prefix):
        assert word not in block
    for word in ("RWKV-7 on the CPU", "RWKV-6 on the CPU", "RWKV-5 on the CPU", f"torch {torch.__version__}"):
        assert word in block
    assert "two steps" not in block and "Problems" not in done.stdout


@pytest.mark.slow
def test_two_steps_and_a_merge_are_made_by_the_real_programs(monkeypatch):
    found = list(trials.training("cpu"))
    assert [(one.level, one.what) for one in found] == [(FINE, "training"), (FINE, "merging")]
    monkeypatch.setattr(trials, "TINY", Path("nowhere"))  # as in an installed package
    assert levels(trials.training("cpu")) == [FINE, FINE]


def test_flags_that_are_none_are_refused_and_problems_alone_change_the_status(monkeypatch, capsys):
    done = run_doctor("--fast", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --fast is not a flag of sh scripts/doctor.sh")
    for level, status in ((WARNING, 0), (PROBLEM, 1)):
        monkeypatch.setattr(examine, "examine", lambda config, level=level: [Finding(level, "x", "y", "z")])
        assert examine.main([], "doctor") == status


# --- scripts/doctor.sh ---


@pytest.fixture
def script(tmp_path):
    """Factory: run doctor.sh of a copy of the repository, with these programs as the only Pythons of PATH."""
    root, programs = tmp_path / "a clone", tmp_path / "bin"
    shutil.copytree(REPOSITORY / "scripts", root / "scripts")
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "requirements.txt", root)
    write_program(root / "scripts" / "setup.sh", "touch installed; echo no; exit 9")
    programs.mkdir()
    for tool in ("dirname", "grep", "readlink", "sed", "sh", "tr"):
        (programs / tool).symlink_to(shutil.which(tool))

    def run(**pythons: str) -> subprocess.CompletedProcess:
        for name, body in pythons.items():
            path = root / ".venv/bin/python" if name == "venv" else programs / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_program(path, body)
        environment = {"PATH": str(programs), "HOME": str(tmp_path)}
        done = subprocess.run(
            ["sh", root / "scripts/doctor.sh", "--quick", "1"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert not list(tmp_path.rglob("installed"))
        return done

    return run


HAS_ALL = 'case "$*" in *requirements_met*) exit 0 ;; *-m*) echo "{name} $@" ;; esac'
LACKS = 'case "$*" in *requirements_met*) exit 1 ;; *-m*) echo "{name} $@" ;; esac'
FLAGS = "-m rwkv_bone.doctor --quick=0 --accelerator=auto --typed --quick 1"


def test_the_script_installs_nothing_and_takes_the_python_of_the_run_scripts(script):
    done = script()
    assert done.returncode == 1 and "there is no python3 on PATH" in done.stdout and "do: apt install" in done.stdout
    done = script(python3='case "$*" in --version) echo Python 3.8.2 ;; *) exit 1 ;; esac')
    assert done.returncode == 1 and "is Python 3.8.2, and 3.10 or newer is needed" in done.stdout
    assert script(python3=LACKS.format(name="active")).stdout == f"active {FLAGS}\n"
    assert script(venv=HAS_ALL.format(name="venv")).stdout == f"venv {FLAGS}\n"
    assert script(python3=HAS_ALL.format(name="active")).stdout == f"active {FLAGS}\n"


def test_the_settings_of_the_script_are_the_doctors():
    path = REPOSITORY / "scripts" / "doctor.sh"
    text = path.read_text()
    assert "sh scripts/doctor.sh [--flag value ...]" in text and os.access(path, os.X_OK)
    names = re.findall(r"^([a-z]\w*)=", text.split("\nrepo=")[0], re.MULTILINE)
    assert names == list(examine.DoctorConfig.__dataclass_fields__)
