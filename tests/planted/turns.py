"""Mistakes in what a row means: fields, layouts, turns, thinking, and what train_hf.py makes of them."""

from tests.planted.bug import Bug

DATA = "src/rwkv_bone/data/"
THINKING = "tests/data/test_thinking.py"
LAYOUTS = "tests/data/test_layouts.py"
TURNS = "tests/data/test_turns.py"
VALUES = "tests/data/test_values.py"
CONVERSATION = "tests/data/test_conversation.py"
FILES = "tests/data/test_fields_of_files.py"
HF_DATA = "tests/hf/test_data.py"

BUGS = (
    # Both thinking fields: the text's block wins over the field's.
    Bug(DATA + "conversations/turns.py", "own or thought.thinking", "thought.thinking or own", THINKING),
    Bug(DATA + "conversations/turns.py", "remarks[TWO_THOUGHTS] += 1", "pass", THINKING),
    Bug(DATA + "conversations/turns.py", "return texts[0]", "return texts[-1]", THINKING),
    Bug(
        DATA + "conversations/layouts.py",
        '("reasoning_content", "reasoning", "thinking")',
        '("reasoning_content", "thinking")',
        THINKING,
    ),
    Bug(DATA + "conversations/turns.py", "self._thinking() or parts_thinking", "self._thinking()", THINKING),
    Bug(DATA + "conversations/thinking.py", "if not end or BEGIN in block:", "if not end or BEGIN in text:", THINKING),
    Bug(
        DATA + "conversations/thinking.py",
        "inside, rest, lone = [block], after, True",
        "return Thought('', text, False)",
        THINKING,
    ),
    Bug(DATA + "conversations/thinking.py", "if not end:", "if end is None:", THINKING),
    Bug(
        DATA + "conversations/thinking.py",
        "while rest.lstrip().startswith(BEGIN)",
        "if rest.lstrip().startswith(BEGIN)",
        THINKING,
    ),
    # Weight 0 trained.
    Bug(DATA + "conversations/turns.py", 'more["trained"] = False', "pass", TURNS),
    Bug(DATA + "conversations/turns.py", "bool(number) == (key in WEIGHTS)", "bool(number)", TURNS),
    Bug(DATA + "conversations/turns.py", "number not in (0, 1)", "not 0 <= number <= 1", TURNS),
    Bug(DATA + "conversations/turns.py", "return all(said.values())", "return any(said.values())", TURNS),
    Bug(DATA + "conversations/turns.py", "remarks[MASKED] += 1", "remarks[MASKED] += 0", TURNS),
    Bug(DATA + "conversations/turns.py", "self.remarks[WEIGHT_OF_OTHERS] += 1", "pass", TURNS),
    Bug(DATA + "conversations/conversation.py", "remarks[NOTHING_TRAINED] += 1", "pass", TURNS),
    # An unused field not counted.
    Bug(DATA + "conversations/conversation.py", "for name in fields.unread():", "for name in ():", LAYOUTS),
    Bug(
        DATA + "conversations/fields.py",
        "isinstance(value, str | list | dict) and",
        "isinstance(value, str) and",
        LAYOUTS,
    ),
    Bug(DATA + "conversations/fields.py", "if inside:", "if False:", LAYOUTS),
    Bug(DATA + "conversations/turns.py", "if other not in self._read and", "if False and", LAYOUTS),
    Bug(DATA + "conversations/remarks.py", "self.counts.get(remark, 0) + count", "count", "tests/data/test_remarks.py"),
    # Fields and layouts.
    Bug(DATA + "conversations/fields.py", 'JOINED_BY = "\\n"', 'JOINED_BY = " "', LAYOUTS),
    Bug(DATA + "conversations/fields.py", "if name in row or", "if", LAYOUTS),
    Bug(
        DATA + "conversations/fields.py",
        "    if name in row:\n        return (name,), row[name]",
        "    if '.' not in name and name in row:\n        return (name,), row[name]",
        LAYOUTS,
    ),
    Bug(DATA + "conversations/fields.py", "self.missing += ", "_ = ", LAYOUTS),
    Bug(DATA + "conversations/fields.py", "key.lower(): [key]", "key: [key]", LAYOUTS),
    Bug(DATA + "conversations/layouts.py", 'if prompt.lower() == "input" and', "if False and", LAYOUTS),
    Bug(DATA + "conversations/layouts.py", "*(fields.usual((BODY,)) if", "*([] if", LAYOUTS),
    Bug(DATA + "conversations/layouts.py", "if len(candidates) == 1:", "if candidates:", LAYOUTS),
    Bug(DATA + "conversations/layouts.py", "_candidates(full, data_type) or", "", LAYOUTS),
    Bug(DATA + "conversations/layouts.py", "if chosen and rejected:", "if False:", LAYOUTS),
    Bug(DATA + "conversations/layouts.py", "if labels and pairs:", "if False:", LAYOUTS),
    Bug(
        DATA + "conversations/layouts.py",
        "names = chosen if says_all or not prompt else",
        "names = chosen if not prompt else",
        LAYOUTS,
    ),
    Bug(DATA + "conversations/layouts.py", "        if not or_usual:\n            raise\n", "", LAYOUTS),
    Bug(
        DATA + "conversations/layouts.py",
        'if kind == "text":\n        return ()',
        "if False:\n        return ()",
        LAYOUTS,
    ),
    Bug(DATA + "conversations/conversation.py", 'if layout.kind == "pair" else ""', "", LAYOUTS),
    Bug(DATA + "conversations/conversation.py", 'trained=turn.role != "assistant"', "trained=True", LAYOUTS),
    Bug(DATA + "conversations/conversation.py", 'if turns[0].role != "system" and', "if", CONVERSATION),
    Bug(DATA + "conversations/conversation.py", "return turns[:answered]", "return turns", CONVERSATION),
    Bug(DATA + "conversations/conversation.py", "and count >= rows", "and count > rows", LAYOUTS),
    Bug(DATA + "conversations/conversation.py", "not tools or (may_be_other and", "not tools or (False and", TURNS),
    # Numbers.
    Bug(DATA + "conversations/values.py", "number.text = str(text)", "number.text = str(float(text))", VALUES),
    Bug(DATA + "conversations/values.py", 'return "true" if value else "false"', "return str(value)", VALUES),
    Bug(
        DATA + "conversations/values.py",
        " and not _is_nan(value):\n        return str",
        ":\n        return str",
        VALUES,
    ),
    # Calls.
    Bug(DATA + "conversations/turns.py", "ids if any(ids) else ()", "()", TURNS),
    Bug(DATA + "conversations/turns.py", "arguments = parse_json(arguments)", "pass", TURNS),
    Bug(DATA + "conversations/turns.py", "text.split(CALL_TAGS[0])", "text.split(CALL_TAGS[0])[-1:]", TURNS),
    Bug(DATA + "conversations/turns.py", "remarks[CALLS_AS_TEXT] += 1", "pass", TURNS),
    # Each file by its own fields.
    Bug(DATA + "part.py", "cfg.eval_field if held_out and cfg.eval_field else cfg.sft_field", "cfg.sft_field", FILES),
    Bug(DATA + "part.py", "not cfg.eval_field if held_out else", "False if held_out else", FILES),
    Bug(DATA + "part.py", "else len(cfg.data_file) > 1", "else True", FILES),
    Bug(DATA + "part.py", "if self._layout.instead:", "if False:", FILES),
    # train_hf.py.
    Bug("src/rwkv_bone/hf/data.py", 'turn.role == "assistant" and turn.trained]', 'turn.role == "assistant"]', HF_DATA),
    Bug(
        "src/rwkv_bone/hf/data.py",
        "+ end, True)], False\n    if not getattr",
        "+ end, False)], False\n    if not getattr",
        "tests/hf/test_finetune.py -k without_a_template",
    ),
    Bug("src/rwkv_bone/hf/data.py", "(written, answer.trained)", "(written, True)", HF_DATA),
    Bug("src/rwkv_bone/hf/data.py", "tools=list(talk.tools) or None", "tools=None", HF_DATA),
    Bug(
        "src/rwkv_bone/hf/data.py",
        "if has_tools(talk) and not _writes_tools",
        "if False and not _writes_tools",
        HF_DATA,
    ),
    Bug("src/rwkv_bone/hf/data.py", "and not _writes_thinking(talk, tokenizer)", "and False", HF_DATA),
    Bug("src/rwkv_bone/hf/data.py", "samples.remarks.add(talk.remarks)", "pass", HF_DATA),
)
