"""Mistakes in an evaluation: what is asked, drawn, kept, judged, counted and compared."""

from tests.planted.bug import Bug

ROOM = "src/rwkv_bone/evaluation"
TEST = "tests/evaluation/test_evaluate.py -k"
COMPARE = "tests/evaluation/test_compare.py -k"

BUGS = (
    Bug(f"{ROOM}/tasks.py", "published.get(name, same)", "same", f"{TEST} judges_as_those"),
    Bug(f"{ROOM}/items.py", "if body and not values", "if body or not values", f"{TEST} svamp"),
    Bug(
        f"{ROOM}/judge.py",
        "[taken_apart(text, wording.opening, wording.several)[1] for text in texts]",
        "list(texts)",
        f"{TEST} cut_while_it_thinks",
    ),
    Bug(f"{ROOM}/answers.py", "if not isinstance(found.get(name), kind):", "if False:", f"{COMPARE} damaged_or"),
    Bug(f"{ROOM}/compare.py", "if missing := sorted(needed - record.keys()):", "if []:", f"{COMPARE} damaged_or"),
    Bug(f"{ROOM}/compare.py", "    if not items:\n", "    if False:\n", f"{COMPARE} damaged_or"),
    Bug(f"{ROOM}/compare.py", "folder in folders}) == 1:", "folder in folders}) == 0:", f"{COMPARE} be_compared"),
    Bug(f"{ROOM}/answers.py", 'if not line.endswith(b"\\n"):', "if False:", f"{TEST} kill_at_any_byte"),
    Bug(f"{ROOM}/answers.py", "            file.truncate(size)\n", "            pass\n", f"{TEST} kill_at_any_byte"),
    Bug(f"{ROOM}/answers.py", "            elif torn:\n", "            elif False:\n", f"{TEST} damage_are_refused"),
    Bug(f"{ROOM}/answers.py", "or not is_intact(record, ()):", "or False:", f"{TEST} damage_are_refused"),
    Bug(f"{ROOM}/answers.py", "    if other:\n", "    if False:\n", f"{TEST} refused_by_name"),
    Bug(
        f"{ROOM}/answers.py", '"shots": ("shots_file",)}', '"shots": ("shots_file", "seed")}', f"{TEST} refused_by_name"
    ),
    Bug(f"{ROOM}/answers.py", 'if saved["content"].get(name) != digest:', "if False:", f"{TEST} damage_are_refused"),
    Bug(f"{ROOM}/evaluate.py", "[max(0, done - start) :]", "", f"{TEST} kill_at_any_byte"),
    Bug(f"{ROOM}/evaluate.py", " if done < len(places) else done\n", "\n", f"{TEST} code_is_written_down"),
    Bug(
        f"{ROOM}/evaluate.py",
        'seeds = [f"{cfg.seed} {place.asked.item.hash} {place.sample}" for place in places]',
        'seeds = [f"{cfg.seed} {i} {place.sample}" for i, place in enumerate(places)]',
        f"{TEST} neither_on_the_batch",
    ),
    Bug(
        f"{ROOM}/evaluate.py",
        "{place.asked.item.hash} {place.sample}",
        "{place.asked.item.number} {place.sample}",
        f"{TEST} neither_on_the_batch",
    ),
    Bug(f"{ROOM}/evaluate.py", "total / len(text) for", "total for", f"{TEST} choices_are_chosen"),
    Bug(f"{ROOM}/evaluate.py", '"nats": -score.total', '"nats": score.total', f"{TEST} a_perplexity"),
    Bug(f"{ROOM}/evaluate.py", "stops = wording.stops if", "stops = () if", f"{TEST} stops_where"),
    Bug(f"{ROOM}/evaluate.py", "answers[0])) + 1 for", "answers[0])) - 1 for", f"{TEST} exact_answers"),
    Bug(
        f"{ROOM}/items.py",
        "            questions.add(item.question)\n            if more:\n",
        "            if more:\n                questions.add(item.question)\n",
        f"{TEST} never_evaluated_beyond",
    ),
    Bug(f"{ROOM}/items.py", "elif item.question in questions:", "elif False:", f"{TEST} never_evaluated_beyond"),
    Bug(f"{ROOM}/items.py", '{cfg.seed}").sample', '").sample', f"{TEST} never_evaluated_beyond"),
    Bug(f"{ROOM}/items.py", "            skipped += 1\n", "", f"{TEST} skipped_and_counted"),
    Bug(f"{ROOM}/questions.py", "earlier = [turn for", "earlier = [] and [turn for", f"{TEST} after_worked_examples"),
    Bug(f"{ROOM}/questions.py", "solved + BETWEEN", "solved", f"{TEST} after_worked_examples"),
    Bug(
        f"{ROOM}/judge.py", "        if not cfg.execute_code:\n", "        if False:\n", f"{TEST} code_is_written_down"
    ),
    Bug(f"{ROOM}/tasks.py", "        return texts.index(word)\n", "        return 0\n", f"{TEST} named_in_every_way"),
    Bug(f"{ROOM}/tasks.py", "    if word in labels:\n", "    if False:\n", f"{TEST} named_in_every_way"),
    Bug(f"{ROOM}/score.py", "pass_at_k(k, count, n)", "pass_at_k(k, count, 1)", f"{TEST} majority_and_pass"),
    Bug(f"{ROOM}/score.py", "majority(answers, same)", "majority(answers)", f"{TEST} majority_and_pass"),
    Bug(
        f"{ROOM}/score.py",
        'counts[CUT] += record.get("finish_reason") == "length"',
        'counts[CUT] += record.get("finish_reason") == "cut"',
        f"{TEST} counted_for_what",
    ),
    Bug(f"{ROOM}/score.py", "{} if counts[UNJUDGED] else", "{} if False else", f"{TEST} code_is_written_down"),
    Bug(
        f"{ROOM}/compare.py",
        'items.setdefault((record["hash"], len(of)), [])',
        'items.setdefault((record["item"], 1), [])',
        "tests/evaluation/test_compare.py -k matched",
    ),
    Bug(
        f"{ROOM}/compare.py",
        "paired_difference(only_b, only_a, total)",
        "paired_difference(only_a, only_b, total)",
        "tests/evaluation/test_compare.py -k matched",
    ),
    Bug(f"{ROOM}/compare.py", "if len(item) == samples}", "}", "tests/evaluation/test_compare.py -k samples"),
    Bug(
        "src/rwkv_bone/config/acts.py",
        'BELONGS | ({"data_file": "task"} if table is EVALUATE else {})',
        "BELONGS",
        "tests/test_scripts.py -k evaluation_leaves",
    ),
)
