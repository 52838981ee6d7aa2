"""Mistakes by which a plan would write something or say what is not so, and a run be refused or cut wrongly."""

from tests.planted.bug import Bug

TIMING, LINES, HELD = (f"src/rwkv_bone/planning/{name}.py" for name in ("timing", "lines", "heldout"))
GUARD, ROWS = "src/rwkv_bone/training/guard.py", "src/rwkv_bone/training/batch_size.py"
CACHE, SAMPLER = "src/rwkv_bone/data/cache.py", "src/rwkv_bone/data/sampler.py"
BATCHES = "tests/data/test_sampler.py"
TIMED, PLAN = "tests/planning/test_timing.py", "tests/planning/test_plan.py"
GUARDS, CUT = "tests/training/test_guard.py", "tests/training/test_batch_size.py"

BUGS = (
    Bug(
        "src/rwkv_bone/data/cache.py", "return in_memory(build)\n        with", "pass\n        with", f"{PLAN} -k as_it"
    ),
    Bug("src/rwkv_bone/data/cache.py", "        if not keep:\n", "        if False:\n", f"{PLAN} -k as_it_was"),
    Bug("src/rwkv_bone/training/heldout_sets.py", "one.path, keep=keep)", "one.path)", f"{PLAN} -k as_it_was"),
    Bug(TIMING, "used = steps[1:] or", "used = steps or", f"{TIMED} -k left_out"),
    Bug(TIMING, "enough(self.marks) and module.plan.world_size == 1", "enough(self.marks)", f"{TIMED} -k know_of"),
    Bug(TIMING, "/ plan.world_size", "", f"{TIMED} -k average"),
    Bug(TIMING, "mark.seconds / max(mark.positions, 1)", "mark.seconds", f"{TIMED} -k proportion"),
    Bug(HELD, "rate * (parts + more)", "rate * parts", f"{PLAN} tests/planning/test_heldout_times.py -k loss_takes"),
    Bug(HELD, "(longest - 1)) * len", "longest) * len", "tests/planning/test_heldout_times.py -k longest"),
    Bug(HELD, "stop_id=None", "stop_id=tokenizer.eod", "tests/planning/test_heldout_times.py -k longest"),
    Bug(HELD, "2 * self.at_the_ends", "self.at_the_ends", "tests/planning/test_heldout_times.py -k both_ends"),
    Bug(LINES, "return self.start + self", "return self", f"{PLAN} -k adds_up"),
    Bug(LINES, "if (holder := run_lock.holder(folder)) is not None:", "if (holder := None):", f"{PLAN} -k would_find"),
    Bug(GUARD, "* (1 - ERROR)", "", f"{GUARDS} -k certain"),
    Bug(GUARD, "(plan.parts.weights if mapped else 0)", "0", f"{GUARDS} -k mapped"),
    Bug(GUARD, "run.stage < 3 and", "", f"{GUARDS} -k mapped"),
    Bug(GUARD, "    check(Plan(config, outline", "    (Plan(config, outline", f"{GUARDS} -k from_scratch"),
    Bug("src/rwkv_bone/devices.py", "* 1024 + swap]", "* 1024]", "tests/test_devices.py -k in_all"),
    Bug(ROWS, "for found in ways(config):\n", "for found in list(ways(config))[::-1]:\n", f"{CUT} -k largest"),
    Bug(ROWS, "        if needed(arch, count", "        if 2 * needed(arch, count", f"{CUT} -k largest"),
    Bug("src/rwkv_bone/cluster/world.py", "return min(int(self.get", "return max(int(self.get", f"{CUT} -k processes"),
    Bug(SAMPLER, "// (self._joined * self._per_window))", "// self._per_window)", f"{BATCHES} -k equal_work"),
    Bug(SAMPLER, "[samples], self._row)", "[samples], self.budget)", f"{CUT} -k every_step"),
    Bug(SAMPLER, "range(micro * self._joined, (micro + 1) * self._joined)", "[micro]", f"{CUT} -k every_step"),
    Bug(
        "src/rwkv_bone/training/resume.py",
        "run.accumulate_grad_batches * (1 if rows else DataConfig.micro_bsz)",
        "run.accumulate_grad_batches",
        f"{CUT} -k learn_the_same",
    ),
)
