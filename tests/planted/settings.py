"""Mistakes in what says which setting acts, and in what reads and checks settings."""

from tests.planted.bug import Bug

ACTS, LAYERS, FIELDS = (f"src/rwkv_bone/config/{name}.py" for name in ("acts", "layers", "fields"))
TESTS = "tests/config/test_acts.py"
MEMORY, RECOMPUTE = (f"src/rwkv_bone/training/{name}.py" for name in ("memory", "recompute"))
DEVICES, RECOMPUTE_TESTS = "src/rwkv_bone/devices.py", "tests/training/test_recompute.py -k 'not writes and not bits'"
PARTS = "tests/training/test_memory.py"
OTHERS, CHANGES = (f"src/rwkv_bone/config/{name}.py" for name in ("other_names", "changes"))
OTHER_TESTS, CHANGE_TESTS = "tests/config/test_other_names.py", "tests/config/test_changes.py"

WRITTEN, FLAGS = (f"src/rwkv_bone/config/{name}.py" for name in ("written", "flags"))
CARDS, FILE_TESTS, CARD_TESTS = "src/rwkv_bone/cards.py", "tests/config/test_written.py", "tests/test_cards.py"

BUGS = (
    Bug(
        ACTS,
        '"lr_final": but("lr_schedule", "constant")',
        '"lr_final": but("lr_schedule", "linear")',
        "tests/training/test_settings_act.py -m slow -k lr_final",
    ),
    Bug(
        ACTS,
        '"targets": only("peft", *ADAPTERS)',
        '"targets": but("peft", "none")',
        "tests/training/test_settings_act.py -m slow -k targets",
    ),
    Bug(
        ACTS,
        'lambda count: count > 1, "with --epoch',
        'lambda count: count > 0, "with --epoch',
        f"{TESTS} -k leaves_without_effect",
    ),
    Bug(ACTS, '"eval_data": "data_file", ', "", f"{TESTS} -k held_out"),
    Bug(
        ACTS,
        'return value != default or bool(default and default != "auto")',
        "return value != default",
        f"{TESTS} -k typed_value",
    ),
    Bug(LAYERS, "elif value != default:", "elif not default:", f"{TESTS} -k edited_variable"),
    Bug(LAYERS, 'self.typed.get("resume") in (True, "1") and owner', "False and owner", f"{TESTS} -k saved_run"),
    Bug(
        LAYERS,
        "if name in self.saved and (self.by_hand or when.met(saved)):",
        "if name in self.saved:",
        f"{TESTS} -k saved_run",
    ),
    Bug(
        LAYERS,
        "**(saved if self.config_in_script else self.defaults), **self.overridden, **self.script",
        "**saved, **self.script, **self.typed",
        f"{TESTS} -k leaves_without_effect",
    ),
    Bug(LAYERS, " and layer[owner] != self.typed[owner]:", ":", f"{TESTS} -k held_out"),
    Bug(
        LAYERS,
        "if name in self.typed and asks(name, now[name]",
        "if asks(name, now[name]",
        f"{TESTS} tests/config/test_flags.py",
    ),
    Bug(FIELDS, "value >= self.below", "value > self.below", f"{TESTS} -k cannot_be_meant"),
    Bug(FIELDS, "and not math.isfinite(value):", "and math.isnan(value):", f"{TESTS} -k cannot_be_meant"),
    Bug(FIELDS, "value.count(word) > 1", "value.count(word) > 2", f"{TESTS} -k list"),
    Bug("src/rwkv_bone/config/flags.py", "re.fullmatch(NUMBERS", "re.match(NUMBERS", f"{TESTS} -k cannot_be_meant"),
    Bug(
        "src/rwkv_bone/config/flags.py", "if name in typed or name not in script}", "if name in typed}", "tests/config"
    ),
    Bug(
        "src/rwkv_bone/config/flags.py",
        "script={name: value if name in typed else given[name]",
        "script={name: given[name]",
        "tests/test_scripts.py -k another_kind",
    ),
    Bug(
        "src/rwkv_bone/config/rates.py",
        "optim.lr_final > optim.lr_init != AUTO",
        "optim.lr_final < optim.lr_init != AUTO",
        f"{TESTS} -k hardly_meant",
    ),
    Bug("src/rwkv_bone/config/rates.py", '"state": 10.0', '"state": 0.1', f"{TESTS} -k hardly_meant"),
    Bug("src/rwkv_bone/config/sections.py", "at_most=2**32 - 1", "at_most=2**32", f"{TESTS} -k cannot_be_meant"),
    Bug("scripts/lib.sh", 'set -- "$@" --typed', 'set -- "$@"', "tests/test_scripts.py -k every_variable_of"),
    Bug(
        "src/rwkv_bone/ops/build.py",
        'os.environ.get("CXX", "").split()',
        '[]  # "CXX"',
        "tests/ops/test_build.py -k cxx",
    ),
    Bug(
        "src/rwkv_bone/cluster/meeting.py",
        "devices != found.devices",
        "devices > found.devices",
        "tests/test_meeting.py -k another_number",
    ),
    Bug(
        "src/rwkv_bone/conversion/merge.py",
        'if config.merge_base == "original" and trained_on == "none":',
        "if False:",
        "tests/conversion/test_without_effect.py",
    ),
    Bug(
        "src/rwkv_bone/adapters/files.py",
        "if alpha and metadata is None and kind not in",
        "if False and kind not in",
        "tests/conversion/test_without_effect.py",
    ),
    # What is computed again in backward.
    Bug("src/rwkv_bone/config/saved.py", "value = str(int(value))", "value = str(value)", "tests/config/test_flags.py"),
    Bug("src/rwkv_bone/config/flags.py", '"const": "1", "type": _switch', '"const": "1"', "tests/config/test_flags.py"),
    Bug(RECOMPUTE, "yield Recompute()\n", "pass\n", RECOMPUTE_TESTS),
    Bug(RECOMPUTE, "for blocks in range(layers + 1)", "for blocks in range(layers, -1, -1)", RECOMPUTE_TESTS),
    Bug(RECOMPUTE, "free // processes", "free", RECOMPUTE_TESTS),
    Bug(RECOMPUTE, "dist.ReduceOp.MAX", "dist.ReduceOp.MIN", RECOMPUTE_TESTS),
    Bug(RECOMPUTE, "config.data.ctx_len if plan.pack else", "config.data.ctx_len if True else", RECOMPUTE_TESTS),
    Bug(RECOMPUTE, "if bytes_for(changed) <= there]", "]", RECOMPUTE_TESTS),
    Bug(MEMORY, "return 1 if self.document else self.micro_bsz", "return self.micro_bsz", RECOMPUTE_TESTS),
    Bug(MEMORY, "made_at_once or run.accumulate > 1", "made_at_once or run.accumulate > 9", RECOMPUTE_TESTS),
    Bug(MEMORY, "max(blocks - again, 0) * stays", "blocks * stays", "tests/test_memory_page.py -k keep_their_input"),
    Bug(RECOMPUTE, " - sum(map(resident_bytes, tensors))", "", f"{PARTS} -k does_not_count_twice"),
    Bug(MEMORY, "adapter=found.values", "adapter=found.trained", f"{PARTS} -k 4_bytes"),
    Bug(MEMORY, '(0.5 + 4 / BLOCK),\n        "fp4"', '0.5,\n        "fp4"', f"{PARTS} -k codes_and_scales"),
    Bug(MEMORY, "REPEATS if run.keeps else 0", "REPEATS", f"{PARTS} -k counts_whole"),
    Bug(
        MEMORY,
        "CHECKPOINT if (run.recompute.blocks or run.chunk_ctx) and not run.compiler else 0",
        "0",
        f"{PARTS} -k counts_whole",
    ),
    Bug(MEMORY, "moment.size + times * moment.renewed", "moment.size", f"{PARTS} -k gaps_it_leaves"),
    Bug(MEMORY, "slack = times * most.renewed", "slack = 0", f"{PARTS} -k counts_whole"),
    Bug(MEMORY, "CUDA_BYTES, found.total * GAPS", "CUDA_BYTES, 0", f"{PARTS} -k on_a_gpu"),
    Bug(MEMORY, "run.resident + STARTED +", "run.resident +", f"{PARTS} -k counts_whole"),
    Bug(DEVICES, "sum(map(int, files))", "0", "tests/test_devices.py -k free_memory"),
    Bug(DEVICES, "group = group.parent", "break", "tests/test_devices.py -k free_memory"),
    Bug(
        DEVICES,
        '"memory.usage_in_bytes", "total_"',
        '"memory.usage_in_bytes", ""',
        "tests/test_devices.py -k free_memory",
    ),
    # Settings in a file, and which GPUs.
    Bug(WRITTEN, "yaml.compose(text, yaml.BaseLoader)", "yaml.compose(text, yaml.SafeLoader)", FILE_TESTS),
    Bug(WRITTEN, "if name in seen:", "if not name:", f"{FILE_TESTS} -k refused"),
    Bug(WRITTEN, "if node.style is None and node.value in NULLS:", "if False:", f"{FILE_TESTS} -k refused"),
    Bug(WRITTEN, 'node.value.removesuffix("\\n") if', "node.value if", f"{FILE_TESTS} -k whatever"),
    Bug(WRITTEN, "object_pairs_hook=once", "object_pairs_hook=dict", f"{FILE_TESTS} -k flat_json"),
    Bug(LAYERS, "(self.by_hand or when.met(saved))", "when.met(saved)", f"{FILE_TESTS} -k refused"),
    Bug(LAYERS, "**self.overridden, **self.script}", "**self.script}", f"{FILE_TESTS} -k typed_over"),
    Bug(FLAGS, "        layers.put_file_over_script()", "        pass", f"{FILE_TESTS} -k typed_over"),
    Bug(FLAGS, "        if name in found:", "        if False:", f"{FILE_TESTS} -k refused"),
    Bug(FLAGS, "or (auto is not None and kind(text) == auto):", ":", f"{FILE_TESTS} -k refused"),
    Bug(CARDS, "chosen = [shown[int(number)] for number in wanted]", "chosen = wanted", f"{CARD_TESTS} -k shell"),
    Bug(
        CARDS, 'if os.environ.get("RWKV_BONE_CARDS") == f"{cards} as {before}":', "if False:", f"{CARD_TESTS} -k starts"
    ),
    Bug(CARDS, "numbers.count(number) > 1", "numbers.count(number) > 2", f"{CARD_TESTS} -k refused"),
    Bug(CARDS, "devices not in (AUTO, len(numbers))", "False", f"{CARD_TESTS} -k refused"),
    Bug(CARDS, "(there := torch.cuda.device_count()) < len(wanted)", "not (there := 1)", f"{CARD_TESTS} -k refused"),
    Bug(CARDS, '        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")', "        pass", CARD_TESTS),
    Bug(CARDS, "given = found.devices or", "given =", f"{CARD_TESTS} -k launcher"),
    Bug(ACTS, ', "cards": "devices"}', "}", f"{CARD_TESTS} -k 'script or elsewhere'"),
    Bug(ACTS, "devices != 1 or nodes > 1", "devices * nodes > 1", f"{CARD_TESTS} -k several"),
    Bug(FLAGS, "        split_devices(values)\n        return", "        return", CARD_TESTS),
    # Preferences.
    Bug(ACTS, '"beta": "task", "sft_weight": "task"', '"sft_weight": "task"', f"{TESTS} -k strengths"),
    Bug(ACTS, '({"data_file": "task"} if table is EVALUATE else {})', '{"data_file": "task"}', f"{TESTS} -k strengths"),
    Bug(LAYERS, "name in layer and layer[name] != self.defaults[name]", "layer.get(name)", f"{TESTS} -k strengths"),
    Bug(ACTS, 'if not part.met(values)), "")', '), "")', f"{TESTS} -k another_task"),
    Bug(ACTS, '"gamma", "sft_weight"), (AUTO, 0.0)', '"gamma", "sft_weight"), (AUTO,)', f"{TESTS} -k may_be_said"),
    Bug(ACTS, '"gamma": only("task", "simpo")', '"gamma": but("task", "sft")', f"{TESTS} -k another_task"),
    Bug(OTHERS, 'if f"--{name}" in flags and (reason', "if (reason", f"{OTHER_TESTS} -k so_instead"),
    Bug(CHANGES, "{spec.name for spec in fields(PreferenceConfig)} - ", "set() - ", f"{CHANGE_TESTS} -k may_change"),
)
