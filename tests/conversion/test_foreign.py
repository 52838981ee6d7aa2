"""What is written, read by the programs that it is for: their logits are those of base + adapter.

Each runs in a process of its own with a time limit. All of them compute in fp32, on a model none of whose tensors is
zero and no two of whose sizes are the same.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.convert import convert
from rwkv_bone.conversion.flags import ConvertConfig
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.data.tokenizer import WorldTokenizer
from tests import foreign, llama_cpp, rwkv_oracle
from tests.conversion.cases import IDS, logits, write_adapter, write_base

TOLERANCE = 1e-3
TEXTS = ["2577 in words: two\n\n", "naïve 你好 \U0001f600 \t end  "]


class Merged:
    """A base and an adapter, and what they compute; outputs are made when they are asked for."""

    def __init__(self, folder: Path, version: int = 7, kind: str = "bone", dtype=torch.float32, **sizes):
        self.folder, self.version = folder, version
        self.base = write_base(folder / "base.pth", version=version, dtype=dtype, **sizes)
        self.adapter = write_adapter(folder / "adapter.pth", self.base, kind)
        self.expected = logits(self.base, self.adapter).numpy()
        before = logits(self.base).numpy()
        assert np.abs(self.expected - before).max() > 0.5 and np.abs(self.expected).max() > 3

    def output(self, name: str, **options) -> Path:
        if not (self.folder / name).exists():
            merge_files(MergeConfig(str(self.base), str(self.adapter), f"{self.folder}/{name}", **options))
        return self.folder / name

    def computed_by(self, program: str) -> np.ndarray:
        if program == "rwkv":
            return rwkv_oracle.logits(self.output("x.pth"), IDS, version=self.version)
        if program == "llama.cpp":
            return llama_cpp.ask(self.output("x.gguf", outtype="f32"), IDS).logits
        if program == "mlx-lm" and not find_spec("mlx_lm"):
            pytest.skip("mlx-lm wants Python 3.11")
        # Several shards, as of a large model.
        return foreign.ask(program, self.output("fla/", shard_size="200KB"), IDS).logits


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """RWKV-7 whose layer 0 also holds v0 v1 v2, as many published files do."""
    return Merged(tmp_path_factory.mktemp("merged"), v_in_layer0=True)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("program", ["rwkv", "rwkv7-hf", "mlx-lm", "llama.cpp"])
def test_a_foreign_program_computes_base_and_adapter_from_what_merge_writes(merged, program):
    close(merged.computed_by(program), merged.expected)


@pytest.mark.slow
@pytest.mark.parametrize("version, program", [(5, "rwkv"), (6, "rwkv"), (6, "llama.cpp")])
def test_older_generations_run_elsewhere_too(tmp_path, version, program):
    older = Merged(tmp_path, version)
    close(older.computed_by(program), older.expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bat", "bat-col", "lora", "pissa"])
@pytest.mark.parametrize("program", ["rwkv7-hf", "llama.cpp"])
def test_every_adapter_runs_elsewhere(tmp_path, kind, program):
    other = Merged(tmp_path, kind=kind)
    close(other.computed_by(program), other.expected)


@pytest.mark.slow
def test_an_official_folder_becomes_one_that_foreign_programs_read(tmp_path):
    source = Merged(tmp_path)
    official = source.output("official/", layout="official", shard_size="200KB")
    convert(ConvertConfig(base_model=str(official), output=f"{tmp_path}/fla/", layout="fla"))
    for program in ("rwkv7-hf", "mlx-lm"):
        close(source.computed_by(program), source.expected)


def test_transformers_cuts_text_by_the_folder_of_a_byte_model_as_we_do(merged):
    found = foreign.ask("tokenizer", merged.output("fla/", shard_size="200KB"), [], TEXTS)
    assert found.ids == [list(text.encode()) for text in TEXTS]


@pytest.mark.slow
def test_transformers_cuts_text_by_the_folder_of_a_world_model_as_we_do(tmp_path):
    base = write_base(tmp_path / "base.pth", vocab_size=65536, n_layer=1, n_embd=64)
    convert(ConvertConfig(base_model=str(base), output=f"{tmp_path}/out/"))
    found = foreign.ask("tokenizer", tmp_path / "out", [], TEXTS)
    assert found.ids == [WorldTokenizer().encode(text) for text in TEXTS]
    assert found.chat == "User: Hi\n\nAssistant:"
