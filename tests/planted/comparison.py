"""Mistakes in learning rates by rule, and in what is said of a comparison of methods."""

from tests.planted.bug import Bug

RATES, RESUME, PREPARE = (
    f"src/rwkv_bone/{name}.py" for name in ("config/rates", "training/resume", "training/prepare")
)
STATISTICS, TABLES, STEPS = (f"benchmarks/convergence/{name}.py" for name in ("statistics", "tables", "step_size"))
RULE, RUNS = "tests/config/test_rates.py", "tests/training/test_rates.py"
COUNTS, SHOWN = (f"tests/benchmarks/test_convergence_{name}.py" for name in ("statistics", "tables"))

BUGS = (
    Bug(RATES, "(width / WIDTH) ** rule.by_width", "(WIDTH / width) ** rule.by_width", RULE),
    Bug(RATES, "Rule(3e-3, -1.28, -0.5)", "Rule(3e-3, -0.78, -0.5)", f"{RULE} -k twenty_times"),
    Bug(RATES, '"lora": Rule(3e-3, -0.78, -0.7)', '"lora": Rule(3e-3, -1.28, -0.7)', f"{RULE} -k twenty_times"),
    Bug(RATES, "        return adapter.bone_r\n", "        return SIZE\n", RULE),
    Bug(RATES, 'in ("lora", "pissa"):\n        rate', 'in ("lora",):\n        rate', f"{RUNS} -k rule"),
    Bug(RATES, "began.lr_final if optim.lr_final == AUTO else", "began.lr_final if False else", f"{RULE} -k began"),
    Bug(RATES, "alpha * adapter.lora_r**0.5 if adapter.lora_rs", "alpha if adapter.lora_rs", RULE),
    Bug(RATES, "adapter.lora_plus**0.5", "adapter.lora_plus", RULE),
    Bug(RATES, "adapter.lora_alpha or adapter.lora_r", "adapter.lora_alpha or SIZE", RULE),
    Bug(RATES, "min(rate, MOST)", "rate", f"{RULE} -k toy"),
    Bug(RATES, "first * share", "RULES[adapter.peft].rate * share", RULE),
    Bug(RATES, 'optim.lr_schedule == "constant" and "lr_final" in names', "False", f"{RULE} -k said"),
    Bug(RATES, "optim.lr_final > optim.lr_init != AUTO", "optim.lr_final > optim.lr_init", f"{RULE} -k word"),
    Bug(RESUME, 'is not None and worded(spec, new) == "auto"', "is None", f"{RUNS} -k goes_on"),
    Bug(PREPARE, "    config = replace(config, optim=optim)\n", "", f"{RUNS} -k rule"),
    Bug(PREPARE, "config.adapter, arch.n_embd, not path", "config.adapter, arch.n_embd", f"{RUNS} -k rule"),
    Bug(PREPARE, "config.adapter, arch.n_embd, not path", "config.adapter, arch.n_layer, not path", f"{RUNS} -k rule"),
    Bug(
        "src/rwkv_bone/training/fit.py",
        "config = replace(config, optim=rates.continued(asked, earlier.config.optim))",
        "pass",
        f"{RUNS} -k goes_on",
    ),
    Bug("src/rwkv_bone/training/fit.py", "    config = replace(config, optim=prepared.optim)\n", "", f"{RUNS} -k rule"),
    Bug("src/rwkv_bone/planning/plan.py", "    config = replace(config, optim=outline.optim)\n", "", f"{RUNS} -k plan"),
    Bug("src/rwkv_bone/config/sections.py", "0 in (self.lr_init, self.lr_final)", "False", f"{RULE} -k word"),
    Bug("src/rwkv_bone/config/acts.py", '"lr_final": (AUTO,)', '"lr_final": (2e-5,)', f"{RULE} -k word"),
    Bug(STATISTICS, "if set(seeds) <= set(of)", "if set(seeds) & set(of)", COUNTS),
    Bug(STATISTICS, 'if row["seed"] not in SELECTION}\n\n\ndef paired', "}\n\n\ndef paired", f"{COUNTS} -k tested"),
    Bug(STATISTICS, "ddof=1) / math.sqrt(len(differences))", "ddof=0) / math.sqrt(len(differences))", COUNTS),
    Bug(STATISTICS, "abs(values.sum()) * (1 - 1e-12)", "abs(values.sum()) * (1 + 1e-9)", COUNTS),
    Bug(STATISTICS, "(len(values) - rank)", "len(values)", f"{COUNTS} -k holm"),
    Bug(STATISTICS, "largest = max(largest, min(", "largest = max(0, min(", f"{COUNTS} -k holm"),
    Bug(STATISTICS, "math.log(before[0] / level) / math.log", "(before[0] - level) / math.log", f"{COUNTS} -k falls"),
    Bug(STATISTICS, "place in (0, len(rates) - 1)", "place == 0", f"{COUNTS} -k best_rate"),
    Bug(TABLES, 's.last(pair[side], "heldout")', 's.last(pair[0], "heldout")', f"{SHOWN} -k same_loss"),
    Bug(TABLES, 'if row["seed"] not in s.SELECTION] for arm', "] for arm", f"{SHOWN} -k one_loss"),
    Bug(STEPS, "scale * math.sqrt(out * r / 3)", "scale * math.sqrt(out * r)", "tests/benchmarks/test_step_size.py"),
    Bug(STEPS, "math.sqrt(into * r)", "into", "tests/benchmarks/test_step_size.py"),
)
