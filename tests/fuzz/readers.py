"""Every reader of files that a user gives: how a good input is made, how it is read, and which of its files is damaged.

`read` returns all that came out of the file, in a form that can be compared; a UserError is a good answer, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterSettings, inject, read_adapter
from rwkv_bone.adapters.foreign import ALIC_LI
from rwkv_bone.adapters.peft_format import lora_config, miss_config, write_peft
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config import DataConfig, TrainConfig
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import build as build_config
from rwkv_bone.config.saved import read_config, shaping, to_json
from rwkv_bone.conversion.gguf_file import read_gguf
from rwkv_bone.data import load_dataset, load_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.models import build, load_base_into
from tests.checkpoints.layout_files import (
    FLA_CONFIG,
    OFFICIAL_CONFIG,
    fla_tensors,
    official_tensors,
    state_of,
    web_rwkv_tensors,
    write_folder,
    write_st,
)
from tests.fuzz.reader import Reader

MODULES = tuple(f"blocks.{layer}.att.{name}" for layer in (0, 1) for name in ("key", "value"))
R = 4


# --- what was read, so that it can be compared ---


def values(tensor: torch.Tensor) -> tuple:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(),
    )


def tensors(state) -> list:
    return [(key, *values(tensor)) for key, tensor in state.items()]


# --- base models ---


def base_state(version: int = 7) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in state_of(version).items()}


def ours(name: str, version: int = 7) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        checkpoints.save_tensors(folder / name, base_state(version))
        return folder / name

    return make


def by_torch(zipped: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(base_state(), folder / "base.pth", _use_new_zipfile_serialization=zipped)
        return folder / "base.pth"

    return make


def web_rwkv(folder: Path) -> Path:
    return write_st(folder / "base.st", web_rwkv_tensors(base_state()))


def hf_folder(layout: str, shards: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        change, config = (official_tensors, OFFICIAL_CONFIG) if layout == "official" else (fla_tensors, FLA_CONFIG)
        return write_folder(folder / "model", change(base_state()), config, shards)

    return make


def read_base(path: Path) -> Any:
    base = checkpoints.load_base(path)
    base.label(path)
    return base.arch.describe(), checkpoints.fingerprint(base.state), tensors(base.state)


# --- adapters ---


def bones() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {f"{module}.bone": torch.randn(R, 32, generator=draw) for module in MODULES}


def loras(prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        f"{module}.{prefix}lora_{part}": torch.randn(*shape, generator=draw)
        for module in MODULES
        for prefix in prefixes
        for part, shape in (("A", (R, 32)), ("B", (32, R)))
    }


def our_adapter(name: str, kind: str = "bone") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = bones() if kind == "bone" else loras()
        settings = AdapterSettings(kind, R, alpha=8.0 if kind == "lora" else 0.0)
        base = checkpoints.load_base(ours("base.pth")(folder))
        metadata = {
            "format": 1,
            **settings.to_metadata(),
            "quant": "none",
            "base": checkpoints.fingerprint(base.state),
            "architecture": base.arch.to_dict(),
            "step": 3,
        }
        checkpoints.write_state(folder / name, state, metadata)
        (folder / name).with_suffix(".json").unlink()
        return folder / name

    return make


def saved_adapter(state: Callable[[], dict], name: str = "adapter.pth") -> Callable[[Path], Path]:
    """An adapter by torch.save, as RWKV-PEFT writes them."""

    def make(folder: Path) -> Path:
        ours("base.pth")(folder)
        torch.save(state(), folder / name)
        return folder / name

    return make


def states() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {f"blocks.{layer}.att.time_state": torch.randn(2, 16, 16, generator=draw) for layer in (0, 1)}


def web_rwkv_adapter(folder: Path) -> Path:
    ours("base.pth")(folder)
    return write_st(folder / "state.st", {key: tensor.half() for key, tensor in states().items()})


def alic_li(folder: Path) -> Path:
    ours("base.pth")(folder)
    bone = {
        f"{module}{ALIC_LI}": tensor.t().contiguous() for module, tensor in zip(MODULES, bones().values(), strict=True)
    }
    torch.save(bone, folder / "miss.pth")
    targets = [{"name": name, "in_features": 32, "shape": [32, R]} for name in bone]
    manifest = {"format_version": 1, "method": "miss", "dtype": "float32", "layout": "modulo_rank_zero_pad", "rank": R}
    manifest |= {"alpha": 8.0, "scale": 2.0, "base_fingerprint": "0" * 64, "targets": targets}
    (folder / "miss.json").write_text(json.dumps(manifest))
    return folder / "miss.pth"


def peft(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        ours("base.pth")(folder)
        config = lora_config(R, 8.0, ["key", "value"]) if kind == "lora" else miss_config("bone", R, ["key", "value"])
        write_peft(folder / "peft", config, loras() if kind == "lora" else bones())
        return folder / "peft"

    return make


def pissa_init(folder: Path) -> Path:
    ours("base.pth")(folder)
    torch.save(loras(), folder / "adapter.pth")
    torch.save(loras(("init_",)), folder / "init.pth")
    return folder / "init.pth"


def read_adapter_file(path: Path, **options) -> Any:
    folder = path.parent
    base = checkpoints.load_base(folder / "base.pth")
    adapter = read_adapter(path, base.state, base_file=folder / "base.pth", **options)
    return adapter.settings, adapter.targets, adapter.extra, adapter.metadata, tensors(adapter.state)


def read_pissa_init(path: Path) -> Any:
    return read_adapter_file(path.with_name("adapter.pth"), pissa_init=path, alpha=4.0)


# --- runs ---


def run_config(folder: Path) -> TrainConfig:
    base = ["--load_model", "base.pth", "--data_file", "data.jsonl"]
    return parse_train([*base, "--bone_r", str(R), "--proj_dir", str(folder)])


def _model() -> torch.nn.Module:
    state = base_state()
    model = build(checkpoints.architecture_of(state), op="torch")
    load_base_into(model, state)
    return model


def resume_file(folder: Path) -> Path:
    from rwkv_bone.training.resume_file import layout

    config, model = run_config(folder), _model()
    injection = inject(model, settings=AdapterSettings("bone", R), targets=["att.key"])
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    state = {key: torch.randn(tensor.shape) for key, tensor in layout(trained).items()}
    metadata = {"format": 1, "config": shaping(config), "step": 3, "trained": "rwkv-0.pth", "base": "b", "data": "d"}
    metadata |= {"architecture": model.arch.to_dict(), **injection.metadata()}
    write_tensors(folder / "resume.pth", state, state.items(), metadata)
    return folder / "resume.pth"


def read_resume(path: Path) -> Any:
    from rwkv_bone.training.resume import Saved

    saved, model = Saved.find(run_config(path.parent)), _model()
    if saved is None:  # an empty file, as a power cut leaves it, is no state
        raise UserError("nothing to continue")
    saved.check({"architecture": model.arch.to_dict(), "base": "b", "data": "d"}, run_config(path.parent))
    inject(model, settings=AdapterSettings("bone", R), targets=["att.key"])
    keys = tuple(key for key, parameter in model.named_parameters() if parameter.requires_grad)
    saved.load_parameters(model, keys)
    return saved.step, saved.trained, saved.config, tensors(dict(model.named_parameters()))


def config_json(folder: Path) -> Path:
    (folder / "config.json").write_text(to_json(run_config(folder)))
    return folder / "config.json"


def settings_yaml(folder: Path) -> Path:
    lines = [
        "# a run",
        "load_model: m.pth",
        "optim: {lr_init: 1e-4, lr_final: 1e-5}",
        "data:",
        "  data_file:",
        "    - a",
    ]
    lines += [
        "  ctx_len: &n 64",
        "  micro_bsz: auto",
        "run:",
        "  devices: 2,3",
        "  overwrite: no",
        "  wandb: |",
        "    w",
    ]
    lines += ["  keep: *n", "  report_to: ['csv', \"wandb\"]"]
    (folder / "run.yaml").write_text("\n".join(lines) + "\n")
    return folder / "run.yaml"


def evaluation(folder: Path) -> Path:
    one = {"step": 0, "loss": 1.5, "tokens": 9, "exact_match": 0.5}
    one["answers"] = [{"prompt": "a", "expected": "b", "got": "c"}]
    (folder / "evaluation.json").write_text(json.dumps({"data": "d", "before": one, "after": {**one, "step": 3}}))
    return folder / "evaluation.json"


def read_evaluation(path: Path) -> Any:
    from rwkv_bone.training.heldout import read_measured, text_of

    before, after = read_measured(text_of(path) or "", path, "d")
    return [one.line() for one in (before, after) if one]


def train_log(folder: Path) -> Path:
    numbers = {"epoch": 0, "loss": 1.5, "lr": 1e-3, "tokens": 9, "trained_tokens": 5, "grad_norm": 0.5, "seconds": 0.1}
    numbers |= {"tokens_per_s": 90.0, "data_wait_ms": 0.1, "peak_memory_mb": 9.5, "peak_reserved_mb": None}
    lines = [{"step": step, **numbers} for step in range(1, 5)]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train_log.jsonl"


def read_train_log(path: Path) -> Any:
    from rwkv_bone.training.log import read_log

    return read_log(path, 4)


# --- data ---

ROWS = [{"prompt": f"question {n} é", "response": f"answer {n} 世界"} for n in range(12)]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": f"u{n}"},
            {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": f"a{n}", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    for n in range(4)
]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def text_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def npy(folder: Path) -> Path:
    np.save(folder / "data.npy", np.arange(1, 200, dtype=np.uint16))
    return folder / "data.npy"


def pair(folder: Path) -> Path:
    from rwkv_bone.data.sources.binidx import PairWriter

    with PairWriter(folder / "pair", np.dtype(np.uint16)) as writer:
        writer.write(np.arange(1, 100, dtype=np.uint16), np.array([40, 9, 50]))
    return folder / "pair"


def table(form: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import pyarrow
        from pyarrow import feather, ipc, parquet

        found, path = pyarrow.Table.from_pylist(ROWS), folder / f"data.{form.removesuffix('-stream')}"
        if form == "parquet":
            parquet.write_table(found, path)
        elif form == "arrow":
            feather.write_feather(found, path, compression="uncompressed")
        else:
            with ipc.new_stream(path, found.schema) as writer:
                writer.write_table(found)
        return path

    return make


def saved_dataset(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def read_data(path: Path, **options) -> Any:
    dataset = load_dataset(DataConfig(data_file=(str(path),), **options), 256)
    dataset.summary_lines()
    return [(sample.ids.tolist(), sample.trained.tolist()) for sample in (dataset[i] for i in range(len(dataset)))]


def data_with(**options) -> Callable[[Path], Any]:
    return lambda path: read_data(path, **options)


def cache_entry(folder: Path) -> Path:
    path = text_file("data.jsonl", lines(ROWS))(folder)
    read_cached(path)
    return path


def read_cached(path: Path) -> Any:
    return read_data(path, cache_dir=str(path.parent / "cache"))


# --- tokenizers and templates ---


def tokenizer_json(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "#": 2}, unk_token="#"))
    made.add_special_tokens(["#"])
    (folder / "tokenizer.json").write_text(made.to_str())
    config = {"eos_token": {"content": "#"}, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def read_tokenizer(path: Path) -> Any:
    from rwkv_bone.data.tokenizer import folder_text

    config, _ = folder_text(path.parent, DataConfig(data_file=("data.jsonl",)))
    tokenizer = load_tokenizer(str(path), 3)
    return tokenizer.identity(), tokenizer.decode(tokenizer.encode("a b")), config.template


TEMPLATE = """{{ bos_token }}\
{% for message in messages %}{% if message['role'] == 'user' %}User: {{ message['content'] }}
{% else %}Assistant: {{ message['content'] }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""


def template(folder: Path) -> Path:
    text_file("data.jsonl", lines([{"messages": talk["messages"][1:2] + talk["messages"][4:]} for talk in TALKS]))(
        folder
    )
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder / "template.jinja"


def read_template(path: Path) -> Any:
    return read_data(path.with_name("data.jsonl"), template=str(path))


# --- GGUF ---


def gguf(outtype: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from rwkv_bone.conversion.gguf_file import write_gguf
        from tests.conversion.cases import random_state

        state = random_state(n_layer=1, n_embd=64)
        tokens = [b"", *(bytes([value]) for value in range(1, 256))]
        arch = checkpoints.architecture_of(state)
        write_gguf(folder / "model.gguf", arch, state, iter(state.items()), outtype, tokens)
        return folder / "model.gguf"

    return make


def read_gguf_file(path: Path) -> Any:
    return tensors(read_gguf(path))


READERS: tuple[Reader, ...] = (
    Reader("base .pth, ours", ours("base.pth"), read_base, checksums=True),
    Reader("base .pth, torch.save", by_torch(True), read_base, checksums=True),
    Reader("base .pth, torch's old format", by_torch(False), read_base),
    Reader("base .safetensors, ours", ours("base.safetensors"), read_base, checksums=True),
    Reader("base RWKV-5 .pth", ours("base.pth", 5), read_base, checksums=True),
    Reader("base RWKV-6 .safetensors", ours("base.safetensors", 6), read_base, checksums=True),
    Reader("base .st", web_rwkv, read_base),
    Reader("folder, official", hf_folder("official", 1), read_base, ("*/*",)),
    Reader("folder, fla, shards", hf_folder("fla", 2), read_base, ("*/*.json",)),
    Reader("adapter .pth, ours", our_adapter("a.pth"), read_adapter_file, checksums=True),
    Reader("adapter .safetensors, ours", our_adapter("a.safetensors", "lora"), read_adapter_file, checksums=True),
    Reader("adapter .pth, RWKV-PEFT", saved_adapter(bones), read_adapter_file, checksums=True),
    Reader("adapter .pth, LoRA", saved_adapter(loras), lambda path: read_adapter_file(path, alpha=8.0), checksums=True),
    Reader("init_pissa.pth", pissa_init, read_pissa_init, checksums=True),
    Reader("adapter, Alic-Li", alic_li, read_adapter_file, ("miss.*",)),
    Reader("adapter, PEFT MiSS", peft("miss"), read_adapter_file, ("peft/*",)),
    Reader("adapter, PEFT LoRA", peft("lora"), read_adapter_file, ("peft/*",)),
    Reader("state .pth", saved_adapter(states, "state.pth"), read_adapter_file, checksums=True),
    Reader("state .st", web_rwkv_adapter, read_adapter_file),
    Reader("resume.pth", resume_file, read_resume, checksums=True),
    Reader("config.json of a run", config_json, lambda path: build_config(read_config(path))),
    Reader("settings in YAML", settings_yaml, lambda path: parse_train(["--config", str(path)])),
    Reader("evaluation.json", evaluation, read_evaluation),
    Reader("train_log.jsonl", train_log, read_train_log),
    Reader("JSON lines", text_file("data.jsonl", lines(ROWS)), read_data),
    Reader("JSON lines, conversations", text_file("data.jsonl", lines(TALKS)), data_with(template="world")),
    Reader("JSON list", text_file("data.json", json.dumps(ROWS).encode()), read_data),
    Reader("CSV", text_file("data.csv", b'prompt,response\na,b\n"c ""d""\n",e\n'), read_data),
    Reader("TSV", text_file("data.tsv", b"prompt\tresponse\na\tb\nc\td\n"), read_data),
    Reader("text", text_file("data.txt", "a text, Æ\n世界\n\nand more\n".encode()), read_data),
    Reader("token array .npy", npy, data_with(data_type="tokens")),
    Reader("binidx", pair, read_data, ("pair.*",)),
    Reader("Parquet", table("parquet"), read_data),
    Reader("Arrow file", table("arrow"), read_data),
    Reader("Arrow stream", table("arrow-stream"), read_data),
    Reader("folder of datasets", saved_dataset, read_data, ("saved/*",)),
    Reader("cache entry", cache_entry, read_cached, ("cache/*/*",), checksums=True),
    Reader("tokenizer", tokenizer_json, read_tokenizer, ("tokenizer*.json",)),
    Reader("chat template", template, read_template),
    Reader("GGUF f32", gguf("f32"), read_gguf_file),
    Reader("GGUF q8_0", gguf("q8_0"), read_gguf_file),
)
