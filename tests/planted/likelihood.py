"""Mistakes in log-likelihoods, and in what lm_eval is told of a model."""

from tests.planted.bug import Bug

LIKELIHOOD, PACKED = "src/rwkv_bone/inference/likelihood.py", "src/rwkv_bone/inference/packed.py"
HARNESS = "src/rwkv_bone/evaluation/harness.py"
COMMAND = "src/rwkv_bone/evaluation/harness_main.py"
PAIRS, TASKS = "tests/inference/test_likelihood.py", "tests/evaluation/test_harness.py"
CUT, ONCE = f"{PAIRS} -k 'however_it_is_cut and how1-7'", f"{PAIRS} -k 'once or share'"

BUGS = (
    # Texts in pieces, from states.
    Bug(LIKELIHOOD, "trunk.context[:-1] for trunk", "trunk.context for trunk", CUT),
    Bug(LIKELIHOOD, "        branches.sort(key=lambda branch: branch[1] is None)\n", "", f"{PAIRS} -k how0-7"),
    Bug(PACKED, "if start <= begin < stop]", "if start < begin < stop]", CUT),
    Bug(PACKED, "if start < end <= stop]", "if start < end < stop]", CUT),
    Bug(PACKED, "carried = [] if stop in ends else [rows(after, slice(len(inside), None))]", "carried = []", CUT),
    Bug(PACKED, "before = [*carried, *(", "before = [*(", CUT),
    Bug(LIKELIHOOD, "        states[number] = state\n", "        states[number] = root\n", CUT),
    Bug(LIKELIHOOD, "[root] * len(longer)", "[None] * len(longer)", CUT),
    Bug(LIKELIHOOD, "shared = beginning(texts) if len(texts) > 1 else []", "shared: list[int] = []", ONCE),
    Bug(LIKELIHOOD, "if trunks and sum(len(t.pairs) for t in trunks)", "if trunks and sum(1 for t in trunks)", ONCE),
    # What is made of the logits.
    Bug(LIKELIHOOD, "bool(right.all())", "bool(right.any())", CUT),
    Bug(LIKELIHOOD, "argmax(dim=1) == label", "argmin(dim=1) == label", CUT),
    Bug(LIKELIHOOD, "Likelihood(0.0, 0, True)", "Likelihood(0.0, 0, False)", CUT),
    Bug(LIKELIHOOD, "yield Likelihood(-loss.sum().item()", "yield Likelihood(loss.sum().item()", CUT),
    Bug(PACKED, "        del logits  # before the next ones are made\n", "", f"{PAIRS} -k memory"),
    Bug(
        LIKELIHOOD,
        "piece = min(piece, rows_at_a_time(",
        "piece = max(1, piece, 0 * rows_at_a_time(",
        f"{PAIRS} -k large",
    ),
    Bug(LIKELIHOOD, "if not math.isfinite(total := found[number].total):", "if False:", f"{PAIRS} -k finite"),
    Bug(LIKELIHOOD, "if not 0 <= token < vocabulary:", "if not token < vocabulary:", f"{PAIRS} -k refused"),
    Bug(LIKELIHOOD, "[((eod,), text) for text in texts]", "[((0,), text) for text in texts]", f"{PAIRS} -k whole_text"),
    # What lm_eval asks.
    Bug(HARNESS, "border = len(context.rstrip())", "border = len(context)", f"{TASKS} -k cut_it"),
    Bug(HARNESS, "whole[:same] or start", "whole[:same]", f"{TASKS} -k tokens_in_the_whole"),
    Bug(
        HARNESS,
        "return (whole[:same] or start, whole[same:])",
        "return (before or start, whole[len(before) :])",
        f"{TASKS} -k reaches_over",
    ),
    Bug(HARNESS, "        if not continuation:\n", "        if False:\n", f"{TASKS} -k empty_choice"),
    Bug(
        HARNESS,
        "[(one.total, one.greedy) for one",
        "[(one.total / one.tokens, one.greedy) for one",
        f"{TASKS} -k whole_text",
    ),
    Bug(HARNESS, "return text.removeprefix(prompt.after)", "return text", f"{TASKS} -k space"),
    Bug(HARNESS, "context = context.removesuffix(self._begins)", "pass", f"{TASKS} -k space"),
    Bug(HARNESS, "*(self.voice.wording.stops if chat else ())", "*()", f"{TASKS} -k space"),
    Bug(HARNESS, "*(self.voice.wording.stops if chat else ())", "*self.voice.wording.stops", f"{TASKS} -k space"),
    Bug(HARNESS, "text.partition(thinking.END)[2].lstrip()", "text", f"{TASKS} -k think"),
    Bug(HARNESS, 'thinking.BEGIN if opened else ""', '""', f"{TASKS} -k think"),
    Bug(HARNESS, 'Turn("assistant", begun + LATER)', 'Turn("assistant", LATER)', f"{TASKS} -k chat_template_writes"),
    Bug(HARNESS, "            asked[name] += 1\n", "", f"{TASKS} -k draws"),
    Bug(HARNESS, "{torch.initial_seed()} {request.task_name}", "{request.task_name}", f"{TASKS} -k draws"),
    Bug(
        HARNESS,
        "key = json.dumps([request.args[1], prompt.chat",
        "key = json.dumps([prompt.chat",
        f"{TASKS} -k whichever",
    ),
    Bug(HARNESS, "        and value != NEUTRAL.get(name)\n", "", f"{TASKS} -k argument_of_generation"),
    Bug(HARNESS, "    if other:\n", "    if False:\n", f"{TASKS} -k argument_of_generation"),
    Bug(HARNESS, "self.cache_hook.add_partial(kind, request.args, result)", "pass", f"{TASKS} -k cache"),
    Bug(HARNESS, "min(BATCH, largest or BATCH)", "BATCH", f"{TASKS} -k batch_size"),
    Bug(COMMAND, "        rest += others\n", "        rest = others[:2]\n", f"{TASKS} -k passes"),
    Bug(
        COMMAND, "if getattr(args, name) is not None or file.get(name):", "if False:", f"{TASKS} -k 'wrong or another'"
    ),
    Bug(COMMAND, "    if unknown:\n", "    if False:\n", f"{TASKS} -k wrong"),
    Bug(COMMAND, "if not _raised_by_lm_eval(error):", "if True:", f"{TASKS} -k wrong"),
    Bug(COMMAND, "if device and cfg.accelerator", "if False and cfg.accelerator", f"{TASKS} -k wrong"),
)
