"""Mistakes in a run of --task dpo, orpo, simpo or kto: its loss, its window, what it is compared with."""

from tests.planted.bug import Bug

OBJECTIVE, TRAINING = "src/rwkv_bone/preferences/objective.py", "src/rwkv_bone/training"
MODULE, REFERENCE = f"{TRAINING}/module.py", f"{TRAINING}/reference.py"
SUMS = "tests/preferences/test_objective.py"
RUNS, KEPT = "tests/training/test_preferences.py", "tests/training/test_reference.py"
PLAIN = f"{RUNS} -k plain_pytorch"

BUGS = (
    # From tokens to the loss and its figures.
    Bug(OBJECTIVE, "-nll.double()", "-nll", SUMS),
    Bug(OBJECTIVE, "mean = logp / tokens.clamp(min=1)", "mean = logp / tokens.mean()", SUMS),
    Bug(OBJECTIVE, "config.sft_weight * mean[:, 0]", "config.sft_weight * mean[:, 1]", SUMS),
    Bug(OBJECTIVE, "config.sft_weight * mean[:, 0]", "config.sft_weight * logp[:, 0]", SUMS),
    Bug(OBJECTIVE, "rewards = config.beta * (logp - reference)", "rewards = config.beta * logp", SUMS),
    Bug(OBJECTIVE, "torch.stack([good, ~good])", "torch.stack([~good, good])", SUMS),
    Bug(OBJECTIVE, "kl * units, units)", "kl, units)", SUMS),
    Bug(OBJECTIVE, "if math.isfinite(value) else None", "", SUMS),
    Bug(OBJECTIVE, "not for_good or not for_bad or ", "", SUMS),
    # A step: what its loss is a mean over, and the estimate of KL.
    Bug(MODULE, "batch.answers.window_units if self.objective", "len(batch.answers.units) if self.objective", RUNS),
    Bug(MODULE, "if objective.needs_mismatched and self._micro == 0:", "if objective.needs_mismatched:", RUNS),
    Bug(MODULE, "(logp[:, 0] - self.reference(batch.answers.units)[:, -1])", "logp[:, 0]", PLAIN),
    Bug(MODULE, "batch.answers.units)[:, -1]", "batch.answers.units)[:, 0]", PLAIN),
    Bug(MODULE, "dist.all_reduce(total)", "pass", f"{RUNS} -k two_processes"),
    Bug(MODULE, 'with evaluating(self, "the estimate of KL was made"):', "if True:", f"{RUNS} -k dropout"),
    Bug(MODULE, "self._sums] += sums", "self._sums] = sums", f"{RUNS} -k accumulation"),
    Bug(MODULE, "clamp(min=0)", "clamp(max=0)", PLAIN),
    # The reference: whose log-probabilities these are, and in which order.
    Bug(REFERENCE, "part.repeats = None", "pass", f"{KEPT} -k weights"),
    Bug(REFERENCE, 'with evaluating(module, "the reference was computed"):', "if True:", f"{KEPT} -k dropout"),
    Bug(REFERENCE, "dist.all_reduce(rows)", "pass", f"{RUNS} -k two_processes"),
    Bug(REFERENCE, "with self.model(trainer, module):", "if True:", f"{KEPT} -k longer"),
    Bug(REFERENCE, "exchange(parameters[key], before[key])", "pass", f"{KEPT} -k longer"),
    Bug(REFERENCE, "elif origins.get(name) != made_from:", "elif False:", f"{KEPT} -k one_by_one"),
    Bug(REFERENCE, "unknown = units[", "unknown = np.arange(len(dataset))[", f"{KEPT} -k longer"),
    Bug(REFERENCE, "self._made_from | {", "{", f"{KEPT} -k in_vain"),
    Bug(REFERENCE, "        if obstacle:\n", "        if False:\n", f"{KEPT} -k does_not_go_on"),
    Bug(
        f"{TRAINING}/prepare.py",
        "if _start_name(config, prepared) != recorded:",
        "if False:",
        f"{KEPT} -k does_not_go_on",
    ),
    Bug(
        f"{TRAINING}/prepare.py",
        'return Start("base", prepared.base_values)',
        'return Start("base")',
        f"{KEPT} -k another_reference",
    ),
    Bug(f"{TRAINING}/project.py", "set() if config.run.overwrite else ", "", f"{KEPT} -k in_vain"),
    Bug(f"{TRAINING}/resume.py", "decided(earlier, now.data.task)", "earlier", f"{KEPT} -k was_auto"),
    Bug(
        f"{TRAINING}/fit.py",
        "preferences.continued(config.preference, earlier.config.preference)",
        "config.preference",
        f"{KEPT} -k was_auto",
    ),
)
