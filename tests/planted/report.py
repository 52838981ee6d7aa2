"""Mistakes in the page of a run, and of several."""

from tests.planted.bug import Bug

REPORT, PAGE = "src/rwkv_bone/report", "src/rwkv_bone/training/page.py"
RUN, SHOWN, COMPARED = "tests/report/test_run.py", "tests/report/test_page.py", "tests/report/test_compare.py"
PREFERRED = "tests/report/test_preferences.py"
CURVE, CURVES = "src/rwkv_bone/training/curve.py", "tests/training/test_curve.py"
LOGGERS, SENT = "src/rwkv_bone/training/loggers.py", "tests/training/test_loggers.py"
SERIES, RENEWED = "tests/report/test_series.py", "tests/training/test_page.py"

BUGS = (
    # What stands in the page.
    Bug(
        f"{REPORT}/html.py",
        "return Html(escape(UNSHOWABLE",
        "return Html((lambda words: words)(UNSHOWABLE",
        f"{SHOWN} -k anybody",
    ),
    Bug(f"{REPORT}/html.py", '.replace("<", "\\\\u003c")', "", f"{SHOWN} -k anybody"),
    Bug(f"{REPORT}/page.py", "policy = f\"default-src 'none'; ", 'policy = f"', f"{SHOWN} -k nothing_outside"),
    Bug(f"{REPORT}/page.py", "script-src '{hashed(script)}'", "script-src 'unsafe-inline'", f"{SHOWN} -k policy"),
    Bug(
        f"{REPORT}/charts.py",
        "math.isfinite(value) else None for value in y",
        "value else None for value in y",
        f"{SHOWN} -k gap",
    ),
    Bug(f"{REPORT}/charts.py", "span(len(table), most)", "1", f"{SHOWN} -k long_run"),
    Bug(f"{REPORT}/html.py", "return words if len(words) <= most", "return words if most", f"{SHOWN} -k long_run"),
    Bug(f"{REPORT}/sections.py", "if value == default:", "if value != default:", f"{SHOWN} -k differ_come_first"),
    Bug(
        f"{REPORT}/sections.py",
        'right", class_="right") if first.right else',
        'right", class_="right") if first.expected else',
        f"{SHOWN} -k through_time",
    ),
    # Thinning.
    Bug(f"{REPORT}/series.py", "(np.nanargmin, np.nanargmax)", "(np.nanargmin, np.nanargmin)", f"{SERIES} -k spike"),
    Bug(f"{REPORT}/series.py", "np.where(np.isfinite(values), values, np.nan)", "values", f"{SERIES} -k hide_none"),
    # What is read.
    Bug(
        f"{REPORT}/run.py",
        " and not is_intact(record, ()):\n            raise",
        " and False:\n            raise",
        f"{RUN} -k changed_bit",
    ),
    Bug(f"{REPORT}/run.py", "if step > 0]", "if step >= 0]", f"{RUN} -k lowest_after"),
    Bug(f"{REPORT}/run.py", "damaged += number < len(lines)", "damaged += 1", f"{RUN} -k being_written"),
    Bug(f"{REPORT}/run.py", "content = content if by_hand else {}", "pass", f"{SHOWN} -k other_types"),
    Bug(
        f"{REPORT}/run.py",
        "for step, loss in losses if math.isfinite(loss)]",
        "for step, loss in losses]",
        f"{RUN} -k never_the_best",
    ),
    Bug(f"{REPORT}/run.py", 'return self._whole("before") or (', "return (", f"{RUN} -k whole_set"),
    # Several runs.
    Bug(f"{REPORT}/compare.py", "(comparable or not measure.heldout)", "True", f"{COMPARED} -k not_judged"),
    Bug(
        f"{REPORT}/compare.py",
        'Measure("forgetting", lambda run: run.forgotten(), change, min)',
        'Measure("forgetting", lambda run: run.forgotten(), change, max)',
        f"{COMPARED} -k best_of_each",
    ),
    Bug(
        f"{REPORT}/compare.py",
        "if output.exists() and not is_page(output):",
        "if False:",
        f"{COMPARED} -k page_of_ours",
    ),
    Bug(f"{REPORT}/compare.py", "if len({*words}) > 1]", "]", f"{COMPARED} -k no_others"),
    # While a run trains.
    Bug(PAGE, "self._renewed = step\n            self._renew()", "self._renew()", f"{RENEWED} -k tenth"),
    Bug(
        PAGE,
        'with spared(f"{self.folder / PAGE} is not renewed; the run goes on", self._report_once):',
        "if True:",
        f"{RENEWED} -k costs_the_run",
    ),
    Bug(
        PAGE,
        'with spared(f"{self.folder / PAGE} shows no sample of the data", self.report):',
        "if True:",
        f"{RENEWED} -k costs_the_run",
    ),
    Bug(PAGE, "        if not trainer.is_global_zero:\n            return\n", "", f"{RENEWED} -k main_process"),
    Bug(PAGE, "and trainer.is_global_zero and module.window", "and module.window", f"{RENEWED} -k main_process"),
    Bug(PAGE, "(Interrupted, KeyboardInterrupt)", "KeyboardInterrupt", f"{RENEWED} -k ends_early"),
    Bug(
        PAGE,
        "if trainer.is_global_zero:\n            stopped",
        "if True:\n            stopped",
        f"{RENEWED} -k main_process",
    ),
    # Answers that are compared.
    Bug(f"{REPORT}/charts.py", "or (run.compares and name == run.general):", ":", f"{PREFERRED} -k general_text"),
    Bug(
        f"{REPORT}/charts.py",
        "_points(run.figures(column),",
        '_points(run.figures("reward_margin"),',
        f"{PREFERRED} -k beside",
    ),
    Bug(
        f"{REPORT}/charts.py",
        'chart | {"id": f"loss-{task}"',
        'chart | {"id": "loss"',
        f"{PREFERRED} -k different_tasks",
    ),
    Bug(
        f"{REPORT}/run.py",
        "return [point for point in dict.fromkeys((first, last))",
        "return [point for point in (last, first)",
        f"{PREFERRED} -k same_numbers",
    ),
    Bug(
        f"{REPORT}/run.py",
        'known["logp_chosen"] - known["logp_rejected"]',
        'known["logp_rejected"]',
        f"{PREFERRED} -k different_tasks",
    ),
    Bug(
        f"{REPORT}/preferences.py",
        "*(said(measured.get(step)) for step in when)",
        "*(said(one) for one in measured.values())",
        f"{PREFERRED} -k no_number",
    ),
    Bug(
        f"{REPORT}/preferences.py",
        '"sft_weight": SFT_WEIGHT.get(run.task, 0.0)',
        '"sft_weight": 0.0',
        f"{PREFERRED} -k numbers_for_auto",
    ),
    Bug(f"{REPORT}/preferences.py", "or not when.met(acting)", "", f"{PREFERRED} -k numbers_for_auto"),
    Bug(f"{REPORT}/compare.py", "and len(kinds) == 1 and", "and", f"{PREFERRED} -k judged"),
    Bug(
        f"{REPORT}/compare.py",
        'Measure("divergence", _figure(DIVERGENCE), loss, min',
        'Measure("divergence", _figure(DIVERGENCE), loss, max',
        f"{PREFERRED} -k different_tasks",
    ),
    Bug(
        f"{REPORT}/sections.py",
        'look = "worse" if one.get("answer") in worse else None',
        "look = None",
        f"{PREFERRED} -k both_answers",
    ),
    Bug(
        PAGE,
        "for sample, answer in zip(dataset.sequences(index)",
        "for sample, answer in zip(dataset.sequences(index)[::-1]",
        f"{RENEWED} -k both_answers",
    ),
    Bug(CURVE, 'if compares and line["label"].endswith(FORGOTTEN)', "if False", f"{CURVES} -k panel"),
    Bug(CURVE, "if value is not None]\n    return", "]\n    return", f"{CURVES} -k panel"),
    Bug(LOGGERS, '| one.get("preference", {})', "", f"{SENT} -k figure"),
)
