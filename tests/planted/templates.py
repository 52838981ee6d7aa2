"""Bugs in how turns become text, and in which of it is trained."""

from tests.planted.bug import Bug

DATA = "src/rwkv_bone/data"
SEGMENTS, TEMPLATES, TOOLS = (
    f"{DATA}/templates/segments.py",
    f"{DATA}/templates/builtin.py",
    f"{DATA}/templates/tools.py",
)
JINJA, FILES, MASKS = f"{DATA}/templates/jinja.py", f"{DATA}/templates/files.py", f"{DATA}/masks.py"
TOKENIZER, WORLD, SPELLED = f"{DATA}/tokenizer.py", f"{DATA}/world_json.py", f"{DATA}/spelled.py"
# Without the two that take long and find nothing more here.
TEXT_TESTS = "tests/data/test_templates.py -k 'not whatever_the_turns_hold and not independent'"
TOOL_TESTS = "tests/data/test_tool_text.py"
JINJA_TESTS, FILE_TESTS = "tests/data/test_jinja_template.py", "tests/data/test_template_files.py"
MASK_TESTS, SPELLED_TESTS = "tests/data/test_masks.py", "tests/data/test_spelled.py"
FOLDER_TESTS, WORLD_TESTS = "tests/data/test_tokenizer_folder.py", "tests/data/test_tokenizer_world_json.py"

BUGS = (
    # Thinking: both names in a message, one block in a response.
    Bug(JINJA, '("reasoning_content", "thinking"), turn', '("reasoning_content",), turn', JINJA_TESTS),
    Bug(JINJA, '("reasoning_content", "thinking"), turn', '("thinking",), turn', JINJA_TESTS),
    Bug(JINJA, "content if apart else think_block(turn) + content", "content", JINJA_TESTS),
    Bug(JINJA, "if turn.thinking and apart", "if turn.thinking and not apart", JINJA_TESTS),
    Bug(TEMPLATES, 'think_block(turn) or "<think>\\n</think>\\n"', "think_block(turn)", TEXT_TESTS),
    Bug(TEMPLATES, 'return "", f" {think_block(turn)}{answer}"', 'return "", f" {answer}"', TEXT_TESTS),
    Bug(TEMPLATES, "return think_block(turn) + turn.text", "return turn.text", TEXT_TESTS),
    Bug(SEGMENTS, '.replace("\\r\\n", "\\n").strip()', ".strip()", TEXT_TESTS),
    # Turns.
    Bug(TEMPLATES, 'BLANK_LINES = re.compile(r"\\n\\s*\\n")', 'BLANK_LINES = re.compile(r"\\n\\n")', TEXT_TESTS),
    Bug(TEMPLATES, "answer = _one_turn(turn.text)", "answer = turn.text.strip()", TEXT_TESTS),
    Bug(TEMPLATES, 'return text.replace("\\r\\n", "\\n")', "return text", TEXT_TESTS),
    Bug(
        TEMPLATES,
        'yield Segment(f"Assistant:{opening}", PROMPT)',
        'yield Segment(f"Assistant:{opening} ", PROMPT)',
        TEXT_TESTS,
    ),
    Bug(TEMPLATES, 'label = "System" if turn.role == "system" else "User"', 'label = "User"', TEXT_TESTS),
    Bug(
        TEMPLATES,
        'f"{turn.text}\\n{turn.material}" if turn.material',
        'f"{turn.text}\\n\\n{turn.material}" if turn.material',
        TEXT_TESTS,
    ),
    Bug(TEMPLATES, "text = _unix_lines(_with_material(turn))", "text = _unix_lines(turn.text)", TEXT_TESTS),
    Bug(TEMPLATES, "BLANK_LINES.search(text.strip())", "BLANK_LINES.search(text)", TEXT_TESTS),
    Bug(TEMPLATES, 'rf"^[^\\S\\n]*(?:{', 'rf"\\A[^\\S\\n]*(?:{', TEXT_TESTS),
    Bug(TEMPLATES, 'f"{turn.thinking}\\n{_with_material(turn)}"', "_with_material(turn)", TEXT_TESTS),
    Bug(TEMPLATES, 'turn = replace(turn, thinking="")', "pass", TEXT_TESTS),
    Bug(TEMPLATES, 'if turn.thinking and self.name == "g1"', "if turn.thinking", TEXT_TESTS),
    Bug(TEMPLATES, "hashlib.sha256(text.encode())", "hashlib.sha256(text[:19].encode())", TEXT_TESTS),
    Bug(TEMPLATES, 'return f"{self.name} {VERSION} {self.tools.name}"', 'return f"{self.name} {VERSION}"', TOOL_TESTS),
    Bug(SEGMENTS, "if joined and joined[-1].role == segment.role", "if False", TEXT_TESTS),
    Bug(SEGMENTS, 'turn.role == "assistant" and turn.trained', 'turn.role == "assistant"', TEXT_TESTS),
    Bug(SEGMENTS, "turns[: trained[-1] + 1]", "turns[: trained[0] + 1]", TEXT_TESTS),
    Bug(SEGMENTS, "return RESPONSE if turn.trained else MASKED", "return RESPONSE", TEXT_TESTS),
    # Tools.
    Bug(TEMPLATES, 'G1 if name in ("g1", "g1-think") else HERMES', 'G1 if name == "g1" else HERMES', TOOL_TESTS),
    Bug(TOOLS, 'separators=(",", ":")', 'separators=(", ", ": ")', TOOL_TESTS),
    Bug(TOOLS, "_compact(calls[0]) if len(calls) == 1 else _lines(calls)", "_compact(calls[0])", TOOL_TESTS),
    Bug(TOOLS, "for more in (left, function, rest)", "for more in (function, rest)", TOOL_TESTS),
    Bug(TOOLS, "for more in (left, function, rest)", "for more in (left, function)", TOOL_TESTS),
    Bug(TOOLS, 'written[f"parameters.{key}" if key in written else key] = value', "written[key] = value", TOOL_TESTS),
    Bug(TOOLS, 'f"{turns[0].text.strip()}\\n{offer}"', "offer", TOOL_TESTS),
    Bug(TOOLS, 'if turns and turns[0].role == "system"', "if False", TOOL_TESTS),
    Bug(TOOLS, "filter(None, [turn.text.strip()])", "[]", TOOL_TESTS),
    Bug(TOOLS, "json.dumps(call, ensure_ascii=False)", "json.dumps(call)", TOOL_TESTS),
    Bug(TOOLS, 'turn.calls or turn.role == "tool"', "turn.calls", TOOL_TESTS),
    # Jinja as transformers has it.
    Bug(JINJA, "json.dumps(x, ensure_ascii=ensure_ascii,", "json.dumps(x, ensure_ascii=True,", JINJA_TESTS),
    Bug(JINJA, "sort_keys: bool = False,\n) -> str", "sort_keys: bool = True,\n) -> str", JINJA_TESTS),
    Bug(JINJA, "trim_blocks=True", "trim_blocks=False", JINJA_TESTS),
    Bug(JINJA, ', "jinja2.ext.loopcontrols"]', "]", JINJA_TESTS),
    Bug(JINJA, "tools=list(conversation.tools) or None", "tools=None", JINJA_TESTS),
    Bug(JINJA, '{"id": number} | call if number else call', "call", JINJA_TESTS),
    Bug(JINJA, '"name": turn.name}', "}", JINJA_TESTS),
    Bug(JINJA, "named = self._templates.get(WITH_TOOLS) if conversation.tools else None", "named = None", JINJA_TESTS),
    Bug(JINJA, "json.dumps([texts, self._specials]", "json.dumps([list(texts), self._specials]", TEXT_TESTS),
    Bug(JINJA, "if not segments[-1].text.strip():", "if False:", JINJA_TESTS),
    Bug(JINJA, "found[UNMARKED] = int(last.role == PROMPT)", "found[UNMARKED] = 0", JINJA_TESTS),
    Bug(JINJA, "sum(thought not in text for thought in thoughts)", "0", JINJA_TESTS),
    Bug(JINJA, "roles = [response_role(turn) for turn in answers]", "pass", JINJA_TESTS),
    Bug(JINJA, "if len(parts) != len(answers)", "if False", JINJA_TESTS),
    Bug(
        JINJA,
        "yield Segment(written[len(prompt) :], response_role(turn))",
        "yield Segment(written[len(prompt) :], RESPONSE)",
        JINJA_TESTS,
    ),
    Bug(JINJA, "if not text.startswith(before)", "if False", JINJA_TESTS),
    Bug(FILES, "if path.name == TEMPLATE_FILE else {}", "if False else {}", FILE_TESTS),
    Bug(FILES, "    if DEFAULT not in texts:", "    if False:", FILE_TESTS),
    Bug(FILES, '(isinstance(content, dict) and "chat_template" in content)', "content is not None", FILE_TESTS),
    # Masks.
    Bug(
        MASKS,
        "if i == last or role == DOCUMENT else PROMPT",
        "if i == len(roles) - 1 or role == DOCUMENT else PROMPT",
        MASK_TESTS,
    ),
    Bug(MASKS, 'if loss_mask in ("none", "pad", "se")', 'if loss_mask in ("none", "pad")', MASK_TESTS),
    Bug(MASKS, "trained &= stream_mask(", "trained = stream_mask(", MASK_TESTS),
    Bug(MASKS, "trained[0] = False", "pass", MASK_TESTS),
    Bug(MASKS, "if pieces[-1][-1:] != [tokenizer.eod]:", "if True:", FOLDER_TESTS),
    Bug(
        MASKS,
        "values = np.repeat([False, False, True, False]",
        "values = np.repeat([True, False, True, False]",
        MASK_TESTS,
    ),
    Bug(MASKS, 'kind="stable"', 'kind="quicksort"', MASK_TESTS),
    Bug(MASKS, "hits = heads[heads <= len(ids) - len(form)]", "hits = heads[heads < len(ids) - len(form)]", MASK_TESTS),
    Bug(MASKS, "ends.append(hits + len(form))", "ends.append(hits + len(form) - 1)", MASK_TESTS),
    # Tokenizers.
    Bug(TOKENIZER, "self.library.no_truncation()", "pass", FOLDER_TESTS),
    Bug(TOKENIZER, "self.library.no_padding()", "pass", FOLDER_TESTS),
    Bug(
        TOKENIZER,
        'content.decode("utf-16" if wide else "utf-8-sig")',
        'content.decode("utf-16" if wide else "utf-8")',
        FILE_TESTS,
    ),
    Bug(TOKENIZER, 'text.replace("\\r\\n", "\\n").replace("\\r", "\\n")', "text", FILE_TESTS),
    Bug(
        TOKENIZER,
        'read_tokenizer_config(folder).get("chat_template"))',
        '"chat_template" in read_tokenizer_config(folder))',
        FILE_TESTS,
    ),
    Bug(
        TOKENIZER,
        "token.content for token in added if token.special",
        "token.content for token in added",
        SPELLED_TESTS,
    ),
    Bug(SPELLED, "key=len, reverse=True", "key=len", SPELLED_TESTS),
    Bug(SPELLED, "set(pattern.findall(text))", "pattern.findall(text)", SPELLED_TESTS),
    Bug(SPELLED, ".removesuffix(end)", "", SPELLED_TESTS),
    Bug(WORLD, 'optional = "" in node', "optional = False", WORLD_TESTS),
)
