"""Mistakes by which the comparison of methods would be unfair, stop too early, or measure what was trained."""

from tests.planted.bug import Bug

GRID, SERIES, TASKS, PROBLEMS, STYLE, TRAINING, ALONE = (
    f"benchmarks/convergence/{name}.py"
    for name in ("grid", "series", "tasks", "problems", "style", "training", "alone")
)
SEARCH, ROWS, RUNS = (f"tests/benchmarks/test_convergence_{name}.py" for name in ("search", "tasks", "runs"))

BUGS = (
    # Searches that end with the best at an edge, or beside the wrong one.
    Bug(GRID, "[best - step, best + step]", "[best + step]", f"{SEARCH} -k 'rate_is_inside or valley'"),
    Bug(GRID, "math.inf if loss is None or loss != loss else loss for rate", "loss or 0.0 for rate",
        f"{SEARCH} -k inside"),
    Bug(GRID, "(best / 2, best * 2)", "(best * 2,)", f"{SEARCH} -k alphas"),
    Bug(GRID, "LOWEST <= at(place) <= HIGHEST\n            and ", "", f"{SEARCH} -k bound"),
    Bug(SERIES, "for seeds in selection:", "for seeds in selection[::-1]:", f"{SEARCH} -k both_seeds"),
    Bug(SERIES, "for selection in (SELECTIONS[1:], SELECTIONS):", "for selection in (SELECTIONS,):",
        f"{SEARCH} -k both_seeds"),
    Bug(SERIES, "for near in (alpha / 2, alpha * 2) if", "for near in () if", f"{SEARCH} -k own_best"),
    # Rows that are trained and reported, or wrong.
    Bug(TASKS, "(rows[:-heldout], rows[-heldout:])", "(rows, rows[-heldout:])", f"{ROWS} -k no_held_out"),
    Bug(TASKS, "rows.setdefault(row[\"prompt\"], row)", "rows[len(rows)] = row", f"{ROWS} -k different"),
    Bug(TASKS, "number[::-1]", "number", f"{ROWS} -k digits"),
    Bug(PROBLEMS, 'to {other}.", "-{n}"', 'to {other}.", "+{n}"', f"{ROWS} -k equation"),
    Bug(PROBLEMS, "draw.randint(1, min(value - 1, 60))", "draw.randint(1, 60)", f"{ROWS} -k equation"),
    Bug(STYLE, "word.lower() not in ARTICLES", "word not in ARTICLES", f"{ROWS} -k headline"),
    # Runs that are not what their rows say.
    Bug(TRAINING, "order[: -task.development]", "order", f"{RUNS} -k chosen_by_are_not_trained"),
    Bug(TRAINING, "task.samples - mixed, seed=job.seed,", "task.samples - mixed, seed=0,", f"{RUNS} -k goes_on"),
    Bug(TRAINING, "rank = equal_rank(model, r)", "rank = r", f"{RUNS} -k about_as_many"),
    Bug(TRAINING, "task.samples - mixed,", "task.samples,", f"{RUNS} -k takes_the_place"),
    Bug(TRAINING, "        self._put(trained, kept)\n", "", f"{RUNS} -k by_hand"),
    Bug(TRAINING, "parameter.data.copy_(value)", "pass", f"{RUNS} -k between_the_base"),
    Bug(ALONE, "torch.set_num_threads(threads)", "torch.set_num_threads(2)", f"{RUNS} -k this_one"),
)  # fmt: skip
