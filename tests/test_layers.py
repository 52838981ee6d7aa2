"""Who may import whom (CONTRIBUTING.md): each module is imported alone in a fresh interpreter."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "rwkv_bone"
HEAVY = {"torch", "lightning", "deepspeed", "numpy", "matplotlib", "tokenizers"}
# For each part: what importing it may not bring along.
FORBIDDEN = {
    "rwkv_bone.config": HEAVY,
    "rwkv_bone.cli": HEAVY,
    "rwkv_bone.devices": HEAVY,
    "rwkv_bone.ops.wkv7": {"lightning", "deepspeed", "rwkv_bone.models", "rwkv_bone.adapters", "rwkv_bone.data"},
    "rwkv_bone.adapters": {"lightning", "deepspeed", "rwkv_bone.models", "rwkv_bone.ops", "rwkv_bone.data"},
    "rwkv_bone.data": {"lightning", "deepspeed", "rwkv_bone.models", "rwkv_bone.ops", "rwkv_bone.adapters"},
    "rwkv_bone.quantization": {"lightning", "deepspeed", "bitsandbytes", "rwkv_bone.models", "rwkv_bone.adapters"},
    "rwkv_bone.checkpoint": {"lightning", "deepspeed", "rwkv_bone.models", "rwkv_bone.ops"},
    "rwkv_bone.models": {"lightning", "deepspeed", "rwkv_bone.adapters", "rwkv_bone.training", "rwkv_bone.data"},
    "rwkv_bone.merging": {"lightning", "deepspeed", "bitsandbytes", "rwkv_bone.training", "rwkv_bone.data"},
    "rwkv_bone.formats": {"lightning", "deepspeed", "rwkv_bone.models", "rwkv_bone.training", "rwkv_bone.data"},
    "rwkv_bone.convert": {"lightning", "deepspeed", "bitsandbytes", "rwkv_bone.training", "rwkv_bone.data"},
    "rwkv_bone.hf": {"lightning", "deepspeed", "transformers", "peft", "rwkv_bone.models", "rwkv_bone.training"},
    "rwkv_bone.hf_flags": HEAVY,
    "rwkv_bone.loading": {"lightning", "deepspeed", "rwkv_bone.training", "rwkv_bone.data"},
}


def loaded_after_importing(module: str) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {module}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", FORBIDDEN)
def test_a_module_brings_along_only_what_it_may(module):
    assert loaded_after_importing(module) & FORBIDDEN[module] == set()


@pytest.mark.parametrize("module", ["rwkv_bone.config", "rwkv_bone.cli", "rwkv_bone.devices", "rwkv_bone.errors"])
def test_settings_need_the_standard_library_alone(module):
    names = {name.split(".")[0] for name in loaded_after_importing(module)}
    outside = {name for name in names if not name.startswith("_") and name not in sys.stdlib_module_names}
    # A .pth file of the environment may import things at every start, before any module of ours.
    outside -= {name.split(".")[0] for name in loaded_after_importing("sys")}
    assert outside <= {"rwkv_bone"}


def test_help_is_instant():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, REPOSITORY / "train.py", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and "--bone_r" in done.stdout
    assert seconds < 1.5  # importing torch alone takes longer than this


def test_no_file_reads_the_environment_for_a_setting():
    allowed = {"XDG_CACHE_HOME", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "PIP_", "LOCAL_RANK", "CXX"}
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
