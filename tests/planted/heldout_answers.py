"""Mistakes by which held-out answers would be measured wrongly, or a run of preference tuning warned of for nothing."""

from tests.planted.bug import Bug

TRAINING = "src/rwkv_bone/training/"
MEASURE, HELDOUT, SETS = TRAINING + "heldout_answers.py", TRAINING + "heldout.py", TRAINING + "heldout_sets.py"
RULES, KL = TRAINING + "preference_diagnosis.py", "src/rwkv_bone/preferences/divergence.py"
LINES, BAR, TABLE = TRAINING + "measurements.py", TRAINING + "progress.py", TRAINING + "summary.py"
WARN = TRAINING + "warn.py"
RUNS, RULED = "tests/training/test_heldout_answers.py", "tests/training/test_preference_diagnosis.py"
MOVED = "tests/preferences/test_divergence.py"

BUGS = (
    Bug(KL, "(p.exp() * (p - q))", "(q.exp() * (q - p))", f"{MOVED} -k two_distributions"),
    Bug(KL, "max(1, LOGITS // vocabulary)", "LOGITS", f"{MOVED} -k two_distributions"),
    Bug(KL, "logits.to(torch.promote_types(logits.dtype, torch.float32))", "logits", f"{MOVED} -k fewer_bits"),
    Bug(KL, ".trained[1:])", ".trained)", f"{MOVED} -k predict"),
    Bug(KL, "good = np.flatnonzero(dataset.good)", "pass", f"{MOVED} -k labels"),
    Bug(KL, " and dataset.good.any()", "", f"{MOVED} -k labels"),
    Bug(KL, "values[np.arange(count) * len(values) // count]", "values[:count]", f"{MOVED} -k evenly"),
    Bug(KL, "bounds[:: answers.members]", "bounds", f"{MOVED} -k pieces"),
    Bug(KL, "            done += output.shape[1]\n", "", f"{MOVED} -k pieces"),
    Bug(KL, "            hook.remove()\n", "            pass\n", f"{MOVED} -k pieces"),
    Bug(KL, "return torch.cat(self._taken)[torch.from_numpy(order).to(self._taken[0].device)]",
        "return torch.cat(self._taken)", f"{MOVED} -k pieces"),
    Bug(MEASURE, "loss.item() / len(dataset)", "loss.item() / tokens", f"{RUNS} -k 'saved and orpo'"),
    Bug(MEASURE, "kl = kl_estimate(*map(torch.cat, zip(*gains, strict=True))) if gains else None",
        "kl = gains[0][0].new_zeros(()) if gains else None", f"{RUNS} -k 'saved and kto'"),
    Bug(MEASURE, "reference[other.answers.units, -1]", "reference[other.answers.units, 0]",
        f"{RUNS} -k 'saved and kto'"),
    Bug(MEASURE, "if module.first_step or module.window:", "if module.window:", f"{RUNS} -k goes_on"),
    Bug(MEASURE, "        elif module.first_step:\n", "        elif False:\n", f"{RUNS} -k goes_on"),
    Bug(MEASURE, "data_fingerprint(dataset))\n        model", "\"\")\n        model", f"{RUNS} -k goes_on"),
    Bug(MEASURE, "            self._silent = True\n", "", f"{RUNS} -k head"),
    Bug(HELDOUT, 'return name if dataset is self.dataset else f"{name}, part"', "return name", f"{RUNS} -k large"),
    Bug(SETS, 'data = replace(config.data, task="sft", ', "data = replace(config.data, ", f"{RUNS} -k general"),
    Bug(SETS, "        if data.task == \"sft\":\n            raise\n", "        raise\n", f"{RUNS} -k prompts"),
    Bug(LINES, ' and is_preference(one.get("preference"))', "", f"{RUNS} -k missing"),
    Bug(BAR, 'if record.get(figure) is not None]', "]", "tests/training/test_progress.py -k preference"),
    Bug(TABLE, 'yield "" if first is None else', 'yield "0" if first is None else', "tests/training/test_summary.py"),
    Bug(WARN, 'per_token=task == "sft"', "per_token=True", "tests/training/test_warn.py -k preference"),
    Bug(WARN, '    if config.data.task != "sft":\n        return', "    if False:\n        return",
        "tests/training/test_warn.py -k preference"),
    Bug(RULES, "max(FALL, FALL * abs(before))", "FALL", f"{RULED} -k become_less"),
    Bug(RULES, " or rank_z(last.tolist(), first.tolist()) < SURE", "", f"{RULED} -k become_less"),
    Bug(RULES, "for value in values[-2:])", "for value in values[-1:])", f"{RULED} -k twice_in_a_row"),
    Bug(RULES, 'sum(line["units"] for line in last) < 100', "False", f"{RULED} -k saturated"),
    Bug(RULES, "left < max(total_steps / 4, WINDOW)", "left < WINDOW", f"{RULED} -k saturated"),
    Bug(RULES, "settings.sft_weight or ", "", f"{RULED} -k another_loss"),
    Bug(RULES, "losses.mean() > GONE * most", "losses.mean() > GONE", f"{RULED} -k beside_its_weights"),
    Bug(RULES, "last + LIKELY * error >= 0.55", "last >= 0.55", f"{RULED} -k at_chance"),
    Bug(RULES, " or last - first >= LIKELY * math.hypot(error, first_error)", "", f"{RULED} -k at_chance"),
    Bug(RULES, "3 * math.sqrt(2 * mean * (1 - mean) / pairs)", "0.0", f"{RULED} -k accuracy_that_falls"),
    Bug(RULES, "    nearer = max(value for _, value in points[-2:])\n", "    nearer = now\n",
        f"{RULED} -k accuracy_that_falls"),
    Bug(RULES, "and now.mean() >= at.mean()", "", f"{RULED} -k accuracy_that_falls"),
    Bug(RULES, "or after < before:", "or False:", f"{RULED} -k margin_that_falls"),
    Bug(TRAINING + "diagnosis.py", 'lowest / math.sqrt(main["samples"]) if main.get("preference") else 0.0', "0.0",
        f"{RULED} -k few_pairs"),
    Bug(RULES, "older > old > now and ", "", f"{RULED} -k margin_that_falls"),
    Bug(RULES, " - max(0.0, now - chosen[0][1]) < FAR", " < FAR", f"{RULED} -k moves_far"),
    Bug(RULES, " or abs(means[0] - means[1]) >= shared", "", f"{RULED} -k one_way"),
    Bug(RULES, "shared < PUSHED", "False", f"{RULED} -k one_way"),
    Bug(RULES, "float(np.median(values)) < 3", "float(values.mean()) < 3", f"{RULED} -k explodes"),
)  # fmt: skip
