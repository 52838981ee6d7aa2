"""Fixtures that every test may use: files by others, and tiny random checkpoints."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import adapter_keys
from rwkv_bone.config import ModelConfig
from rwkv_bone.models import architecture_from_scratch, build, init_from_scratch

REPOSITORY = Path(__file__).resolve().parents[1]
RENDEZVOUS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
)


def python_path() -> str:
    """PYTHONPATH for a process of its own: ours first, then what this process was given, where packages may be."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY), *([given] if given else [])])


def clean_environment() -> dict[str, str]:
    """The environment without the variables that a run in this process leaves: a new process would join that run."""
    return {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}


@pytest.fixture(autouse=True)
def no_run_to_join():
    """Each test begins as if no launcher had started it, whatever runs in this process have left."""
    for name in RENDEZVOUS:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party checkpoints and data; tests/assets/README.md says where they come from."""
    return REPOSITORY / "tests" / "assets"


def random_model(seed: int = 0, dtype=torch.float32, version: int = 7, low_rank: dict | None = None, **sizes):
    """A tiny model of any generation in which no weight is zero, so that every path carries signal.

    low_rank: ranks other than those of released models of this width.
    """
    sizes = {"n_layer": 2, "n_embd": 32, "vocab_size": 61, "head_size": 16, **sizes}
    arch = architecture_from_scratch(ModelConfig(**sizes))
    if version != 7:
        ranks = {"mix": 8, "decay": 8} if version == 6 else {}
        arch = replace(arch, version=version, dim_ffn=sizes.get("dim_ffn", 96), low_rank=ranks)
    if low_rank:
        arch = replace(arch, low_rank=low_rank)
    model = build(arch, op="torch")
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        if version == 7:
            init_from_scratch(model, seed)
            for parameter in model.parameters():
                parameter.add_(0.05 * noise(parameter))
        else:
            for key, parameter in model.named_parameters():
                if ".ln" in f".{key}":
                    parameter.copy_(("weight" in key) + 0.1 * noise(parameter))
                else:
                    parameter.copy_(noise(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5))
    return model.to(dtype)


def adapter_state(model) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file of this model: fp32 copies on the CPU."""
    return {key: model.get_parameter(key).detach().to("cpu", torch.float32, copy=True) for key in adapter_keys(model)}


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Factory: `tiny_checkpoint(dtype=torch.bfloat16, n_embd=64)` writes a random model and returns its path."""

    def make(name: str = "base.pth", seed: int = 0, dtype=torch.float32, **sizes) -> Path:
        path = tmp_path / name
        checkpoints.write_state(path, random_model(seed, dtype, **sizes).state_dict(), overwrite=True)
        return path

    return make


def pytest_configure():
    gc.disable()  # collecting thousands of tests makes nothing but what stays


def pytest_collection_finish():
    gc.freeze()  # nor is it looked at again whenever a test or a library collects garbage
    gc.enable()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
