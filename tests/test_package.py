"""The package: versions written once, console scripts, and a wheel that needs nothing of the checkout."""

import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from rwkv_bone import __version__
from rwkv_bone.ops import build
from tests.conftest import clean_environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
CONSOLE_SCRIPTS = PYPROJECT["project"]["scripts"]
SOURCE = "src/rwkv_bone/"


def requirements() -> list[Requirement]:
    """Every line that names a package: of the requirements files, and what builds the wheel."""
    files = [*REPOSITORY.glob("requirements*.txt"), *REPOSITORY.glob("requirements/*.txt")]
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line and not line.startswith("-r ")]
    return [Requirement(line) for line in [*names, *PYPROJECT["build-system"]["requires"]]]


def test_no_package_has_two_different_bounds():
    named = requirements()
    bounds: dict[str, list[str]] = {}
    for requirement in named:
        bounds.setdefault(requirement.name.lower().replace("_", "-"), []).append(str(requirement.specifier))
    # setuptools has to be named where wheels are built, and where the tests build one.
    assert {name for name, found in bounds.items() if len(found) > 1} == {"setuptools"}
    assert len(set(bounds["setuptools"])) == 1
    assert len(named) > 20


def test_extras_are_files_that_the_tests_install_too():
    extras = PYPROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    files = {file for extra in extras.values() for file in extra["file"]}
    development = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert files == {f"requirements/{path.name}" for path in REPOSITORY.glob("requirements/*.txt")}
    assert files | {"requirements.txt"} == {line.removeprefix("-r ") for line in development if line.startswith("-r ")}


def test_every_folder_of_the_package_is_listed():
    folders = {path.parent.relative_to(REPOSITORY / "src") for path in (REPOSITORY / SOURCE).rglob("__init__.py")}
    names = {str(folder).replace("/", ".") for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"rwkv_bone.cuda", "rwkv_bone.cuda.cpu"}


@pytest.fixture(params=CONSOLE_SCRIPTS)
def console_script(request, monkeypatch):
    """(its name, a function that runs it with these arguments)."""
    module, function = CONSOLE_SCRIPTS[request.param].split(":")

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"/some where/bin/{request.param}", *words])
        return getattr(import_module(module), function)()

    return request.param, run


def test_a_console_script_names_itself_in_usage_and_in_errors(console_script, capsys):
    name, run = console_script
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {name} [--flag value ...]\n")
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert [line.startswith(f"  {name} --") for line in examples if line.startswith("  ")] == [False, True] * 3
    assert run("--no_such_flag", "1") == 2
    assert capsys.readouterr().err == f"error: --no_such_flag is not a flag of {name} (--help lists them)\n"


def hooks() -> list[list[str]]:
    """The command of each pre-commit hook, with the files of the repository that pre-commit would name."""
    (repository,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    files = {"ruff": ["train.py", "src/rwkv_bone/commands.py"], "shellcheck": ["scripts/test.sh", ".ci/tool"]}
    assert [hook["language"] for hook in repository["hooks"]] == ["system"] * len(files)
    return [[*shlex.split(hook["entry"]), *files[hook["id"]]] for hook in repository["hooks"]]


@pytest.mark.parametrize("command", hooks(), ids=lambda command: command[2])
def test_pre_commit_runs_the_pinned_tools_and_fails_where_they_complain(command, tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        environment = {**clean_environment(), "RWKV_PYTHON": sys.executable}
        return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = tmp_path / "bad"
    bad.with_suffix(".py").write_text("import os\n")
    bad.with_suffix(".sh").write_text("#!/bin/sh\nrm $1\n")
    done = run(*command, str(bad.with_suffix(Path(command[-2]).suffix)))
    assert done.returncode == 1 and ("F401" in done.stdout or "SC2086" in done.stdout)


def names_in(wheel: Path) -> set[str]:
    """The files of a wheel, those about it without the version in their folder's name."""
    about = f"rwkv_bone-{__version__}.dist-info/"
    return {name.replace(about, "about/") for name in zipfile.ZipFile(wheel).namelist()}


def backend(function: str, source: Path, output: Path) -> Path:
    """build_wheel or build_sdist of setuptools, with what is installed and no network: the path of what it made."""
    code = f"import json, setuptools.build_meta as b; print(json.dumps(b.{function}({str(output)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build may read, so that it leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("package") / "a checkout"
    ignored = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__", "assets", "lightning_logs")
    return Path(shutil.copytree(REPOSITORY, copy, ignore=ignored))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "."], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"rwkv_bone-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a Python or console script in a folder far from the checkout, with the installed wheel alone."""
    folder = tmp_path_factory.mktemp("installed") / "site packages"
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*words: str, **environment: str) -> str:
        if words[0] in CONSOLE_SCRIPTS:
            words = (str(folder / "bin" / words[0]), *words[1:])
        done = subprocess.run(
            [sys.executable, *words],
            cwd=elsewhere,
            env={**clean_environment(), "PYTHONPATH": str(folder), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder, run.elsewhere = folder, elsewhere
    return run


@pytest.mark.slow
def test_the_wheel_holds_the_modules_and_the_kernels_and_nothing_else(wheel):
    modules = {str(path.relative_to(REPOSITORY / "src")) for path in (REPOSITORY / "src").rglob("*.py")}
    kernels = [*build.SOURCES.glob("*.cuh"), *build.SOURCES.glob("cpu/*.cpp"), *build.SOURCES.glob("cpu/*.h")]
    expected = modules | {f"rwkv_bone/cuda/{path.relative_to(build.SOURCES)}" for path in kernels}
    about = {"METADATA", "WHEEL", "entry_points.txt", "top_level.txt", "RECORD", "licenses/LICENSE"}
    data = {"rwkv_bone/py.typed", "rwkv_bone/data/general.jsonl", "rwkv_bone/ops/choice.json"}
    page = [path for path in (REPOSITORY / SOURCE / "report").rglob("*") if path.suffix in (".css", ".js", ".md", "")]
    data |= {str(path.relative_to(REPOSITORY / "src")) for path in page if path.is_file()}
    assert names_in(wheel) == expected | data | {f"about/{name}" for name in about}
    assert len(kernels) > 10


@pytest.mark.slow
def test_a_source_distribution_makes_the_same_wheel(checkout, wheel, tmp_path):
    with tarfile.open(backend("build_sdist", checkout, tmp_path)) as archive:
        # Python learnt the filter in its releases of June 2023, and asks for it from 3.14 on.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    again = backend("build_wheel", tmp_path / f"rwkv_bone-{__version__}", tmp_path)
    assert names_in(again) == names_in(wheel)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSOLE_SCRIPTS)
def test_an_installed_console_script_shows_its_help(installed, name):
    assert installed(name, "--help").startswith(f"usage: {name} [--flag value ...]\n")


@pytest.mark.slow
def test_installed_sources_make_the_kernel_that_a_checkout_has_in_its_cache(installed, tmp_path):
    code = "from rwkv_bone.ops import build; print(build.SOURCES, build.cpu_library('wkv7'), sep='\\n')"
    sources, library = installed("-c", code, XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert Path(sources) == installed.folder / "rwkv_bone" / "cuda" != build.SOURCES
    assert Path(library).parent == tmp_path / "rwkv_bone" and Path(library).is_file()
    assert Path(library).name == build.cpu_library("wkv7").name


@pytest.mark.slow
def test_installed_scripts_train_on_two_devices_merge_convert_and_load(installed):
    for name in ("rwkv7-tiny.pth", "numbers_train.jsonl"):
        shutil.copy(REPOSITORY / "assets" / name, installed.elsewhere)
    base, rows = ["--load_model", "rwkv7-tiny.pth"], ["--data_file", "numbers_train.jsonl", "--ctx_len", "64"]
    assert "3,000 samples" in installed("rwkv-bone-preview", *base, *rows)
    assert "s a step" in installed("rwkv-bone-plan", *base, *rows)
    # Lightning starts the second process itself, by the path of the console script.
    short = ["--micro_bsz", "2", "--epoch_steps", "3", "--epoch_count", "1", "--peft", "bone", "--bone_r", "8"]
    place = ["--devices", "2", "--accelerator", "cpu", "--proj_dir", "out"]
    said = installed("rwkv-bone-train", *base, *rows, *short, *place, OMP_NUM_THREADS="1")
    assert "x 2 devices" in said
    (following,) = [shlex.split(line) for line in said.splitlines() if line.startswith("next ")]
    assert Path(following[1]).name == "rwkv-bone-merge"
    installed(*following[1:])
    installed("rwkv-bone-convert", "--base_model", "rwkv7-tiny.pth", "--adapter", "out/rwkv-0.pth", "--output", "peft")
    assert (installed.elsewhere / "peft" / "adapter_model.safetensors").is_file()
    code = "from rwkv_bone import load_model; print(load_model('out/merged.pth').arch.n_layer)"
    assert installed("-c", code).splitlines()[-1] == "6"
