"""Bugs in how rows with answers that are compared are read, and in what they become."""

from tests.planted.bug import Bug

DATA = "src/rwkv_bone/data"
READ, MASKS, ENCODE = f"{DATA}/conversations/preference.py", f"{DATA}/masks.py", f"{DATA}/encode.py"
BLOCKS, PART, LOAD = f"{DATA}/tokenise.py", f"{DATA}/part.py", f"{DATA}/load.py"
LAYOUTS, SECTIONS = f"{DATA}/conversations/layouts.py", "src/rwkv_bone/config/sections.py"
READ_TESTS, ENCODE_TESTS = "tests/data/test_preference.py", "tests/data/test_encode.py"

BUGS = (
    # Which fields are read.
    Bug(READ, '("preferred_output", "non_preferred_output"),', "", READ_TESTS),
    Bug(
        READ,
        "fields = Fields({name: value for name, value in row.items() if value is not None}",
        "fields = Fields(row",
        READ_TESTS,
    ),
    Bug(READ, "(whole and isinstance(row[chosen], str)) or ", "", READ_TESTS),
    Bug(READ, "(not prompts and (whole or _speaks(row[chosen])))", "(not prompts and whole)", READ_TESTS),
    Bug(READ, "and len({str(row.get(name)).strip() for name in prompts}) > 1", "and False", READ_TESTS),
    Bug(READ, 'isinstance(row.get(prompts[0]), str) else "named"', 'True else "named"', READ_TESTS),
    Bug(READ, "return names or inside or [", "return names or [", READ_TESTS),
    Bug(READ, "if not or_usual:\n            raise", "if True:\n            raise", READ_TESTS),
    Bug(READ, 'if task in PAIRED else ("", names[-1])', "", READ_TESTS),
    Bug(LAYOUTS, "if found.rejected:", "if False:", READ_TESTS),
    Bug(SECTIONS, "if names and len(names) not in (2, 3):", "if len(names) > 3:", READ_TESTS),
    # Where the prompt ends.
    Bug(READ, "most = min(map(len, talks)) - 1", "most = min(map(len, talks))", READ_TESTS),
    Bug(READ, 'if turns[shared].role != "assistant":', "if False:", READ_TESTS),
    Bug(
        READ,
        "shared = len(prompt) if _same(prompt, talks[0][: len(prompt)]) and prompt else last",
        "shared = last",
        READ_TESTS,
    ),
    Bug(READ, 'trained=turn.role != "assistant") for turn in talks', "trained=True) for turn in talks", READ_TESTS),
    Bug(READ, "found.append(Answer(talk, len(before),", "found.append(Answer(talk, shared,", READ_TESTS),
    Bug(READ, "good if number == 0 else False", "good", READ_TESTS),
    Bug(READ, "remarks -= again", "pass", READ_TESTS),
    Bug(READ, "dict(+remarks) if number == 0 else {}", "dict(+remarks)", READ_TESTS),
    Bug(READ, "del remarks[IN_PROMPT]", "pass", READ_TESTS),
    Bug(READ, "if not _contains(turns, prompt):", "if False:", READ_TESTS),
    Bug(READ, 'if turns and turns[-1].role == "assistant":', "if False:", READ_TESTS),
    Bug(READ, "items.pop()  # where", "pass  # where", READ_TESTS),
    Bug(READ, 'else {"role": "assistant"} | value', "else value", READ_TESTS),
    Bug(READ, '("false", "0", "0.0", "bad"', '("false", "0", "0.0", "-1", "bad"', READ_TESTS),
    Bug(READ, "said = TRUTH.get(str(value).strip().lower())", "said = bool(value)", READ_TESTS),
    # Ids, masks and hashes.
    Bug(
        MASKS,
        "return ids, trained, min(border, int(trained.argmax()))",
        "return ids, trained, int(trained.argmax())",
        ENCODE_TESTS,
    ),
    Bug(MASKS, "sum(lengths[: answers[responses]])", "sum(lengths[: answers[0]])", ENCODE_TESTS),
    Bug(
        ENCODE,
        "prompt = min(_common([one.ids for one in found]), *(one.prompt for one in found))",
        "prompt = found[0].prompt",
        ENCODE_TESTS,
    ),
    Bug(ENCODE, "if not trained.any():", "if False:", ENCODE_TESTS),
    Bug(ENCODE, "if not prompt:", "if False:", ENCODE_TESTS),
    Bug(ENCODE, "documents = () if alike else", "documents =", ENCODE_TESTS),
    Bug(ENCODE, "first += other - once", "first += other", ENCODE_TESTS),
    Bug(BLOCKS, "one.ids[: one.prompt] if compared else one.ids", "one.ids", ENCODE_TESTS),
    Bug(
        BLOCKS,
        "np.array([number for number, _ in found], dtype=np.int64)",
        "np.array([n for n, _ in good], dtype=np.int64)",
        ENCODE_TESTS,
    ),
    Bug(BLOCKS, 'how = "left out" if reason == ALIKE else', "how =", ENCODE_TESTS),
    Bug(PART, "// (2 if layout.rejected else 1)", "// 1", ENCODE_TESTS),
    Bug(PART, '"task": self.task_kind,', "", ENCODE_TESTS),
    Bug(PART, "members=2 if cfg.task in PAIRED else 1", "members=2 if layout.rejected else 1", ENCODE_TESTS),
    Bug(PART, 'good=arrays.get("good") if cfg.task == "kto" else None', 'good=arrays.get("good")', ENCODE_TESTS),
    Bug(PART, 'if self.cfg.task != "sft" and not isinstance(self.source, Rows):', "if False:", ENCODE_TESTS),
    # What is said and expected.
    Bug(LOAD, "if answer.good]", "]", ENCODE_TESTS),
    Bug(LOAD, "if not (good and bad):", "if not good:", ENCODE_TESTS),
    Bug(LOAD, 'if cfg.task != "sft":  # a file', "if False:  # a file", ENCODE_TESTS),
)
