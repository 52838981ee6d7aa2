"""Readers of checkpoints, adapters, indexes and settings."""

from tests.planted.bug import Bug

ODD = "tests/checkpoints/test_odd_files.py"
NO_FILE = "tests/fuzz/test_no_file.py"
CHECKPOINTS = "src/rwkv_bone/checkpoints"

BUGS: tuple[Bug, ...] = (
    Bug(f"{CHECKPOINTS}/keys.py", "flat[:: max(1, flat.numel() // 256)][:256]", "flat[:256]", f"{ODD} -k fingerprint"),
    Bug(
        f"{CHECKPOINTS}/keys.py", "{list(tensor.shape)} {tensor.dtype}", "{list(tensor.shape)}", f"{ODD} -k fingerprint"
    ),
    Bug(f"{CHECKPOINTS}/keys.py", "{key} {list(tensor.shape)}", "{list(tensor.shape)}", f"{ODD} -k fingerprint"),
    Bug(f"{CHECKPOINTS}/keys.py", "{key} {list(tensor.shape)}", "{key}", f"{ODD} -k fingerprint"),
    Bug(f"{CHECKPOINTS}/keys.py", "(0|[1-9][0-9]{0,5})", r"(\d+)", f"{ODD} -k no_program_writes_is_an"),
    Bug(
        f"{CHECKPOINTS}/architecture.py",
        "if missing < len(layers):",
        "if missing > len(layers):",
        f"{ODD} -k missing_in",
    ),
    Bug(f"{CHECKPOINTS}/base.py", "if verify and finite:", "if not verify and finite:", f"{ODD} -k base_with_nan"),
    Bug(f"{CHECKPOINTS}/numbers.py", "tensor.aminmax()", "tensor.aminmax()[:1]", f"{ODD} -k nan"),
    Bug(
        f"{CHECKPOINTS}/integrity.py",
        "if info.compress_type or info.compress_size != info.file_size or info.flag_bits & 1:",
        "if False:",
        f"{ODD} -k inflates",
    ),
    Bug(f"{CHECKPOINTS}/model_files.py", "Path(name).name == name", "True", f"{ODD} -k beside_it_only"),
    Bug("src/rwkv_bone/adapters/files.py", 'check_dtypes(state, f"adapter {path}")', "", f"{ODD} -k odd_dtype"),
    Bug("src/rwkv_bone/adapters/files.py", "is_number(value) and value >= 0", "value > -1", f"{ODD} -k metadata_with"),
    Bug("src/rwkv_bone/config/fields.py", "abs(value) <= sys.float_info.max", "True", f"{ODD} -k lora_alpha"),
    Bug(
        f"{CHECKPOINTS}/model_files.py", "not os.path.isfile(index.parent / name)", "False", f"{ODD} -k beside_it_only"
    ),
    Bug(
        f"{CHECKPOINTS}/integrity.py",
        "if _are_checksums(value, len(header)):",
        "if False:",
        "tests/checkpoints/test_integrity.py -k name_is_damaged",
    ),
    Bug("src/rwkv_bone/errors.py", "and error.errno in OF_THE_MACHINE", "and False", "tests/test_errors.py -k machine"),
    Bug("src/rwkv_bone/errors.py", "and error.errno in OF_THE_MACHINE", "", "tests/test_errors.py -k machine"),
    Bug(
        "src/rwkv_bone/conversion/gguf_file.py",
        "int(count) > len(self.data)",
        "0 > len(self.data)",
        "tests/conversion/test_gguf.py -k damaged",
    ),
    Bug(
        "src/rwkv_bone/data/conversations/turns.py",
        "check_whole(more, ",
        "(lambda *_: None)(more, ",
        "tests/data/test_turns.py -k surrogate",
    ),
    Bug(
        "src/rwkv_bone/data/conversations/values.py",
        "default=str).encode()",
        "default=str)",
        "tests/data/test_turns.py",
    ),
    Bug("src/rwkv_bone/adapters/peft_format.py", 'method == "LORA" and not alpha', "False", f"{ODD} -k lora_alpha"),
    Bug("src/rwkv_bone/adapters/peft_format.py", '8 if method == "LORA"', '0 if method == "LORA"', f"{ODD} -k absent"),
    Bug(
        "src/rwkv_bone/training/resume_file.py",
        'endswith(f".{MOMENTS[1]}")',
        'endswith(".exp_avg")',
        f"{ODD} -k resume",
    ),
    Bug(
        "src/rwkv_bone/config/saved.py",
        "if path.exists() and not path.is_file():",
        "if path.exists() and path.is_dir():",
        f"{NO_FILE} -k config-pipe",
    ),
)
