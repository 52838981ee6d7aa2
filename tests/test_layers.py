"""Who may import whom (CONTRIBUTING.md): each module is imported alone in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "rwkv_bone"
HEAVY = {"torch", "lightning", "deepspeed", "numpy", "matplotlib", "tokenizers"}
TRAINERS = {"lightning", "deepspeed", "bitsandbytes", "transformers", "peft"}
ROOMS = {"adapters", "checkpoints", "cluster", "config", "conversion", "data", "hf", "inference", "models", "ops"}
ROOMS |= {"chat", "doctor", "evaluation", "planning", "preferences", "report", "training"}
# Rooms that hold programs: none of the others imports them.
PROGRAMS = {"chat", "conversion", "doctor", "evaluation", "hf", "planning"}
# For each room, the rooms that importing any of its modules may bring along.
MAY_IMPORT = {
    "config": set(),
    "checkpoints": {"config"},
    "ops": {"config"},
    "data": {"config"},
    "adapters": {"config", "checkpoints"},
    "models": {"config", "checkpoints", "ops"},
    "inference": {"config", "checkpoints", "ops", "models", "adapters", "data"},
    "conversion": {"config", "checkpoints", "ops", "models", "adapters", "inference"},
    "chat": {"config", "checkpoints", "ops", "models", "adapters", "data", "inference"},
    "evaluation": {"config", "checkpoints", "ops", "models", "adapters", "data", "inference"},
    "hf": {"config", "checkpoints", "adapters", "data"},
    "cluster": {"config"},
    "report": {"config"},
    "doctor": {"config", "ops"},
    "preferences": {"config", "data"},
    "training": ROOMS - PROGRAMS,
    "planning": ROOMS - PROGRAMS,
}
# Imported where peft, transformers or lm_eval are in use: modules that are made of classes of theirs.
OPTIONAL = {"rwkv_bone.hf.peft_config", "rwkv_bone.hf.callbacks", "rwkv_bone.evaluation.harness"}
# The modules beside the rooms.
MODULES = {
    "allocator": set(),
    "cards": set(),
    "errors": set(),
    "imports": set(),
    "locks": set(),
    "launched": set(),
    "run_lock": {"config", "checkpoints"},
    "signals": set(),
    "console": set(),
    "commands": set(),
    "devices": {"config"},
    "quantization": {"config", "checkpoints", "ops"},
}


def modules(room: str) -> list[str]:
    paths = sorted(path.relative_to(PACKAGE).with_suffix("") for path in (PACKAGE / room).rglob("*.py"))
    found = [".".join(("rwkv_bone", *path.parts)) for path in paths if path.name != "__init__"]
    return [module for module in found if module not in OPTIONAL]


def loaded_after_importing(*modules: str) -> set[str]:
    source = str(PACKAGE.parent)
    code = f"import sys; sys.path.insert(0, {source!r}); import {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def rooms_of(loaded: set[str]) -> set[str]:
    return {name.split(".")[1] for name in loaded if name.startswith("rwkv_bone.")} & ROOMS


def test_every_folder_of_the_package_is_a_room_with_rules():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == ROOMS == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *MODULES}


@pytest.mark.parametrize("room", [*MAY_IMPORT, *MODULES])
def test_a_room_brings_along_only_what_it_may(room):
    names, allowed = (modules(room), MAY_IMPORT[room]) if room in ROOMS else ([f"rwkv_bone.{room}"], MODULES[room])
    loaded = loaded_after_importing(*names)
    assert rooms_of(loaded) <= allowed | {room}
    if room not in ("training", "planning"):
        assert loaded & TRAINERS == set()


def test_data_and_the_parts_that_hf_uses_know_no_model():
    assert rooms_of(loaded_after_importing(*modules("data"))) == {"config", "data"}
    assert "models" not in rooms_of(loaded_after_importing("rwkv_bone.hf", *modules("hf")))


def test_loading_a_model_reads_no_data_modules():
    assert "data" not in rooms_of(loaded_after_importing("rwkv_bone.inference.load", "rwkv_bone.conversion.merge"))


@pytest.mark.parametrize(
    "module",
    [
        "rwkv_bone",
        *modules("config"),
        "rwkv_bone.allocator",
        "rwkv_bone.cards",
        "rwkv_bone.commands",
        "rwkv_bone.console",
        "rwkv_bone.devices",
        "rwkv_bone.errors",
        "rwkv_bone.imports",
        "rwkv_bone.launched",
        *modules("cluster"),
        *(module for module in modules("doctor") if not module.endswith("kernels")),
        "rwkv_bone.signals",
        "rwkv_bone.chat.flags",
        "rwkv_bone.chat.main",
        "rwkv_bone.conversion.flags",
        "rwkv_bone.evaluation.harness_main",
        "rwkv_bone.evaluation.flags",
        "rwkv_bone.evaluation.main",
        "rwkv_bone.hf.flags",
    ],
)
def test_settings_need_the_standard_library_alone(module):
    names = {name.split(".")[0] for name in loaded_after_importing(module)}
    outside = {name for name in names if not name.startswith("_") and name not in sys.stdlib_module_names}
    # A .pth file of the environment may import things at every start, before any module of ours.
    outside -= {name.split(".")[0] for name in loaded_after_importing("sys")}
    assert outside <= {"rwkv_bone"}


@pytest.mark.parametrize("program", ["train.py", "merge.py", "train_hf.py"])
def test_help_is_instant_because_it_imports_nothing_heavy(program):
    code = (
        "import runpy, sys; program = sys.argv[1]; sys.argv[:] = [program, '--help']\n"
        "try: runpy.run_path(program, run_name='__main__')\n"
        "except SystemExit as stop: print('exit', stop.code)\n"
        "print('modules', *sys.modules)"
    )
    command = [sys.executable, "-c", code, str(REPOSITORY / program)]
    text, _, loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("modules ")
    assert "--bone_r" in text and text.endswith("exit 0\n")
    assert set(loaded.split()) & HEAVY == set()


def test_no_file_reads_the_environment_for_a_setting():
    allowed = {"XDG_CACHE_HOME", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "PIP_", "LOCAL_RANK", "CXX"}
    allowed |= {"WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "TORCHELASTIC_", "RANK", "TORCH_CPP"}  # of launchers
    allowed |= {"MALLOC_"}  # of the C library
    allowed |= {"CUDA_DEVICE_ORDER", "RWKV_BONE_CARDS"}  # which cards were chosen, for the processes that are started
    allowed |= {"XDG_STATE_HOME", "NO_COLOR"}
    allowed |= {"LD_LIBRARY_PATH"}  # what a program that a model wrote is started with
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                line = path.read_text(encoding="utf-8").splitlines()[node.lineno - 1]
                if not any(name in line for name in allowed):
                    found.add(f"{path.name}:{node.lineno}: {line.strip()}")
    assert found == set()


def test_entry_points_stay_short():
    for name in ("train.py", "merge.py", "train_hf.py"):
        assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) < 40
