"""Answers that are compared, on their way to batches: cut, parted, counted, paired or remembered wrongly."""

from tests.planted.bug import Bug

DATA, TRAINING, PLANNING = (f"src/rwkv_bone/{room}/" for room in ("data", "training", "planning"))
UNITS, FINGERPRINT = "tests/data/test_units.py", "tests/data/test_fingerprint.py -k compared"
PREVIEW, TIMES = "tests/data/test_preview.py", "tests/planning/test_reference_times.py"
PAIR = "tests/training/test_recompute.py -k a_pair"

BUGS = (
    # What becomes of long ones.
    Bug(DATA + "units.py", "too_long & (excess >= prompts)", "too_long & (excess > prompts)", f"{UNITS} -k alike"),
    Bug(DATA + "units.py", "(starts + off)[kept]", "starts[kept]", f"{UNITS} -k alike"),  # cuts answers
    Bug(DATA + "units.py", "full.max(axis=1)", "full[:, 0]", f"{UNITS} -k alike"),
    Bug(DATA + "units.py", "(ctx_len + 1), 0)", "ctx_len, 0)", f"{UNITS} -k alike"),
    Bug(DATA + "units.py", "(targets == 0).any(axis=1)", "(targets == 0).all(axis=1)", f"{UNITS} -k without"),
    Bug(DATA + "units.py", "share(gone, prompts.sum())", "0.0", f"{UNITS} -k stops"),
    Bug(DATA + "units.py", 'if long_samples == "drop" else', "if False else", f"{UNITS} -k dropped"),
    # Batches.
    Bug(
        DATA + "sampler.py",
        "samples = [sample for unit in units for sample in unit]",
        "samples = [sample for member in zip(*units) for sample in member]",  # all chosen ones, then all rejected ones
        f"{UNITS} -k halves",
    ),
    Bug(DATA + "sampler.py", "batch.label_rows, right=True) - 1", "batch.label_rows) - 1", f"{UNITS} -k halves"),
    Bug(
        DATA + "sampler.py",
        "self._answers(batch, units, len(window))\n            if",
        "self._answers(batch, units, len(units))\n            if",
        f"{UNITS} -k halves",
    ),
    Bug(DATA + "sampler.py", "unit * dataset.members * dataset.ctx_len", "unit * dataset.ctx_len", f"{UNITS} -k room"),
    Bug(
        DATA + "sampler.py",
        "widths * self.micro_bsz * self.dataset.members",
        "widths * self.micro_bsz",
        f"{UNITS} -k room",
    ),
    Bug(
        DATA + "sampler.py", "rows = self.micro_bsz * self.dataset.members", "rows = self.micro_bsz", f"{UNITS} -k room"
    ),
    Bug(DATA + "sampler.py", "mismatched=tuple(map(of_batch, self.mismatched)),", "", f"{UNITS} -k device"),
    Bug(DATA + "dataset.py", "return self.lengths - self.members", "return self.lengths - 1", f"{UNITS} -k by_units"),
    # KTO's other answers.
    Bug(
        DATA + "dataset.py",
        "return changes[place % len(changes)]",
        "return np.roll(np.arange(len(self)), -1)",  # often of the same prompt
        f"{UNITS} -k first_micro",
    ),
    Bug(
        DATA + "dataset.py",
        "np.where(self._prompt_lengths > 1, self.groups",
        "np.where(True, self.groups",
        f"{UNITS} -k single",
    ),
    Bug(DATA + "dataset.py", "        if not len(changes):\n", "        if False:\n", f"{UNITS} -k single"),
    Bug(DATA + "dataset.py", "part._all = self._all or self", "part._all = self", f"{UNITS} -k keeps_the_other"),
    Bug(
        DATA + "dataset.py",
        "+ len(answer) - self.ctx_len - 1, 0)",
        "+ len(answer) - self.ctx_len, 0)",
        f"{UNITS} -k another",
    ),
    Bug(
        DATA + "dataset.py",
        "np.maximum(self.positions, self.mismatched_widths)",
        "self.positions",
        f"{UNITS} -k first_micro",
    ),
    Bug(
        DATA + "sampler.py",
        "order.bounds[begin + rank : begin + rank + 2]",
        "order.bounds[begin : begin + 2]",
        f"{UNITS} -k first_micro",
    ),
    Bug(DATA + "sampler.py", "begin, self.dataset.mismatched_widths)", "begin)", f"{UNITS} -k first_micro"),
    Bug(DATA + "dataset.py", "if self.good is not None and not self.good[index]:", "if False:", f"{UNITS} -k expected"),
    # What a continued run compares.
    Bug(DATA + "fingerprint.py", "dataset.preference_columns().items()", "{}.items()", FINGERPRINT),
    Bug(DATA + "dataset.py", 'columns |= {"good": self.good, ', "columns |= {", FINGERPRINT),
    Bug(DATA + "dataset.py", "every._start[self._other]]", "every._start[:len(self)]]", FINGERPRINT),
    # What is said, and what a run takes.
    Bug(
        DATA + "preview.py",
        "marks = [GREEN if good else RED, *(RED for _ in others)]",
        "marks = [GREEN, *(GREEN for _ in others)]",
        f"{PREVIEW} -k 'pairs or good'",
    ),
    Bug(TRAINING + "recompute.py", "members=dataset.members,", "", PAIR),
    Bug(TRAINING + "recompute.py", "dataset.lengths.mean() / dataset.members", "dataset.lengths.mean()", PAIR),
    Bug(
        PLANNING + "lines.py",
        "self.start + self.timed.reference + ",
        "self.start + ",
        "tests/planning/test_plan.py -k adds_up",
    ),
    Bug(PLANNING + "reference.py", "        take(few[: -(-count // PASSES)])\n", "", TIMES),
    Bug(PLANNING + "reference.py", "dataset.subset(units), *self", "dataset, *self", TIMES),
    Bug(PLANNING + "heldout.py", "dataset.positions.sum()) + others", "dataset.positions.sum())", TIMES),
)
