"""Mistakes by which a measurement would change a run, mislead its user, or lose the best adapter."""

from tests.planted.bug import Bug

TRAINING = "src/rwkv_bone/training/"
HELDOUT, SETS, WHEN = TRAINING + "heldout.py", TRAINING + "heldout_sets.py", TRAINING + "measuring.py"
MODULE = TRAINING + "module.py"
BEST, LINES, SAVING = TRAINING + "best.py", TRAINING + "measurements.py", TRAINING + "saving.py"
MODULE = TRAINING + "module.py"
NAMES = "src/rwkv_bone/config/heldout.py"
TESTS = "tests/training/test_"

BUGS = (
    Bug(MODULE, "    module.eval()\n    yield\n", "    yield\n", f"{TESTS}heldout.py -k dropout"),
    Bug(MODULE, "    yield\n    module.train()\n", "    yield\n", f"{TESTS}measurements.py -k dropout"),
    Bug(HELDOUT, "broadcast(bool(step) and is_best", "broadcast(is_best", f"{TESTS}best.py -k lowest"),
    Bug(BEST, " or Best(step, loss) == best", "", f"{TESTS}best.py -k 'only_a_lower or beside'"),
    Bug(BEST, "loss < best.loss", "loss <= best.loss", f"{TESTS}best.py -k lowest"),
    Bug(BEST, 'for record in records if record["step"]]', "for record in records]", f"{TESTS}best.py -k since"),
    Bug(BEST, "    if loss is None:\n        return False\n", "", f"{TESTS}best.py -k lowest"),
    Bug(BEST, 'if metadata["heldout"]["data"] != data:', "if False:", f"{TESTS}best.py -k other_data"),
    Bug(BEST, "        verify_file(path)\n", "", f"{TESTS}best.py -k damaged"),
    Bug(SAVING, "path, overwrite=True)", "path, overwrite=self._overwrite)", f"{TESTS}best.py -k lowest"),
    Bug(SAVING, 'path = self.folder / project.BEST', 'path = self.folder / "rwkv-0-s0.pth"', f"{TESTS}best.py -k keep"),
    Bug(TRAINING + "project.py", 'BEST, "rwkv-best.json"', '"x", "y"', f"{TESTS}best.py -k keep"),
    Bug(WHEN, "SHARE * total * step", "2 * SHARE * total * step", f"{TESTS}measurements.py -k twentieth"),
    Bug(WHEN, "(total - 1) // (fit + 1) + 1", "total // (fit + 1)", f"{TESTS}measurements.py -k twentieth"),
    Bug(WHEN, "trainer.should_stop = True", "pass", f"{TESTS}early_stop.py -k done"),
    Bug(WHEN, "            self.save.save_step(trainer, module)\n", "", f"{TESTS}early_stop.py -k done"),
    Bug(TRAINING + "fit.py", "        module.steps_left = 0\n", "", f"{TESTS}early_stop.py -k done"),
    Bug(HELDOUT, "if not module.steps_left:", "if module.first_step >= module.total_steps:",
        f"{TESTS}early_stop.py -k kill"),
    Bug(HELDOUT, "self.every and step % self.every == 0 and step > last", "False", f"{TESTS}measurements.py -k kill"),
    Bug(SETS, "part = cut(one.dataset, earlier) if earlier else one.dataset", "part = one.dataset",
        f"{TESTS}measurements.py -k large"),
    Bug(SETS, "np.arange(count) * len(dataset) // count", "np.arange(count)", f"{TESTS}measurements.py -k evenly"),
    Bug(SETS, 'record["data"].get(main) != data[main] for', "False for", f"{TESTS}measurements.py -k other_held_out"),
    Bug(LINES, "if not is_intact(record, ()) or", "if", f"{TESTS}measurements.py -k continued"),
    Bug(LINES, '0 <= record["step"] <= last_step', '0 <= record["step"]', f"{TESTS}measurements.py -k continued"),
    Bug(LINES, "        self._write(() if replaces else records)\n", "        self._write(records)\n",
        f"{TESTS}measurements.py -k spares"),
    Bug(TRAINING + "signals.py", "            raise Unmeasured\n", "            pass\n",
        f"{TESTS}measurements.py -k signal"),
    Bug(NAMES, " and not Path(word).exists()", "", "tests/config/test_heldout.py"),
    Bug(NAMES, 'MAIN if unnamed == [0] else stem', "stem", "tests/config/test_heldout.py"),
    Bug(NAMES, "eval_field=fields_of(cfg, one.name)", "eval_field=cfg.eval_field", "tests/config/test_heldout.py"),
)  # fmt: skip
