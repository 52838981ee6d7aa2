"""Fixtures that every test may use: third-party assets, and tiny random checkpoints."""

from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoint
from rwkv_bone.config import ModelConfig
from rwkv_bone.models import architecture_from_scratch, build, init_from_scratch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party checkpoints and data kept beside the repository."""
    folder = REPOSITORY.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"third-party assets are not at {folder}")
    return folder


def random_model(seed: int = 0, dtype=torch.float32, **sizes):
    """A tiny RWKV-7 in which no weight is zero, so that every path carries signal."""
    config = ModelConfig(**{"n_layer": 2, "n_embd": 32, "vocab_size": 61, "head_size": 16, **sizes})
    model = build(architecture_from_scratch(config), op="torch")
    init_from_scratch(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Factory: `tiny_checkpoint(dtype=torch.bfloat16, n_embd=64)` writes a random RWKV-7 and returns its path."""

    def make(name: str = "base.pth", seed: int = 0, dtype=torch.float32, **sizes) -> Path:
        path = tmp_path / name
        checkpoint.write_state(path, random_model(seed, dtype, **sizes).state_dict(), overwrite=True)
        return path

    return make


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
