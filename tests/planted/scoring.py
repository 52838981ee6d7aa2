"""Mistakes in how answers are found, compared and counted, and in how a model's programs are run."""

from tests.planted.bug import Bug

ROOM, TESTS = "src/rwkv_bone/evaluation", "tests/evaluation"
STATISTICS, TEST_STATISTICS = f"{ROOM}/statistics.py", f"{TESTS}/test_statistics.py"
EXTRACT, TEST_EXTRACT = f"{ROOM}/extract.py", f"{TESTS}/test_extract.py"
EQUAL, FORMULA, TEST_EQUAL = f"{ROOM}/equal.py", f"{ROOM}/formula.py", f"{TESTS}/test_equal.py"
CODE, SANDBOX, TEST_CODE = f"{ROOM}/code.py", f"{ROOM}/sandbox.py", f"{TESTS}/test_code.py"

BUGS = (
    # Statistics.
    Bug(STATISTICS, "middle = share + z * z / (2 * total)", "middle = share", f"{TEST_STATISTICS} -k wilson"),
    Bug(STATISTICS, "(1 + level) / 2", "level", f"{TEST_STATISTICS} -k wilson"),
    Bug(STATISTICS, "range(min(b, c) + 1)", "range(min(b, c))", f"{TEST_STATISTICS} -k mcnemar"),
    Bug(
        STATISTICS,
        "min(1.0, 2 * tail / 2 ** (b + c))",
        "min(1.0, tail / 2 ** (b + c))",
        f"{TEST_STATISTICS} -k mcnemar",
    ),
    Bug(STATISTICS, "(a + b - (a - b) ** 2) / (total + 2)", "(a + b) / (total + 2)", f"{TEST_STATISTICS} -k paired"),
    Bug(
        STATISTICS, "math.comb(n - c, k)) / math", "math.comb(n - c, 1) ** k) / math", f"{TEST_STATISTICS} -k pass_at_k"
    ),
    Bug(STATISTICS, "        if answer is None:\n            continue\n", "", f"{TEST_STATISTICS} -k no_vote"),
    Bug(STATISTICS, "_student(len(values) - 1, level)", "_normal(level)", f"{TEST_STATISTICS} -k mean"),
    # Extraction.
    Bug(
        EXTRACT,
        "text.rpartition(CLOSE)[2].partition(OPEN)[0]",
        "text.rpartition(CLOSE)[2]",
        f"{TEST_EXTRACT} -k thoughts",
    ),
    Bug(EXTRACT, 'found[1].replace(",", "") if found', "found[1] if found", f"{TEST_EXTRACT} -k after_hashes"),
    Bug(
        EXTRACT,
        "return found[-1] if found else None\n\n\ndef metamath_number",
        "return found[0] if found else None\n\n\ndef metamath_number",
        f"{TEST_EXTRACT} -k flexible",
    ),
    Bug(EXTRACT, "value /= int(below) or 1", "value /= int(below)", f"{TEST_EXTRACT} -k metamath_number"),
    Bug(EXTRACT, "str(round(value))", "str(int(value))", f"{TEST_EXTRACT} -k metamath_number"),
    Bug(EXTRACT, "if depth == 0 and brace", "if depth <= 1 and brace", f"{TEST_EXTRACT} -k boxed"),
    Bug(EXTRACT, r'r"\\.|[{}]"', 'r"[{}]"', f"{TEST_EXTRACT} -k boxed"),
    Bug(EXTRACT, r"(?<![\w)\]}%])(?P<sign>[-+])", "(?P<sign>[-+])", f"{TEST_EXTRACT} -k last_number"),
    Bug(EXTRACT, r"(?<![\w.])\.[0-9]+)", r"\.[0-9]+)", f"{TEST_EXTRACT} -k last_number"),
    Bug(EXTRACT, "return numbers[-1] if numbers", "return numbers[0] if numbers", f"{TEST_EXTRACT} -k last_number"),
    Bug(EXTRACT, "text[ends[-1] :] if ends", "text[ends[0] :] if ends", f"{TEST_EXTRACT} -k final_answer"),
    # Equality.
    Bug(EQUAL, "x is not None and x == y", "x == y", f"{TEST_EQUAL} -k same_number"),
    Bug(EQUAL, "return -value if sign", "return value if sign", f"{TEST_EQUAL} -k same_number"),
    Bug(EQUAL, "len(sides[0]) <= 2", "len(sides[0]) <= 3", f"{TEST_EQUAL} -k same_hendrycks"),
    Bug(EQUAL, "brackets = tokens[0] + tokens[-1]", 'brackets = "()"', f"{TEST_EQUAL} -k same_math"),
    Bug(EQUAL, 'if a.kind not in ("set", "∪")', 'if a.kind not in ("set", "∪", "()")', f"{TEST_EQUAL} -k same_math"),
    Bug(EQUAL, "        del rest[index]\n", "", f"{TEST_EQUAL} -k same_math"),
    Bug(
        EQUAL,
        "if isinstance(a, Fraction) and isinstance(b, Fraction):\n        return False\n",
        "if False:\n        return False\n",
        f"{TEST_EQUAL} -k same_math",
    ),
    Bug(
        FORMULA,
        "value + Fraction(int(found[1]), int(found[3]))",
        "value * Fraction(int(found[1]), int(found[3]))",
        f"{TEST_EQUAL} -k same_math",
    ),
    Bug(FORMULA, "(-1 if number >> 16 & 1 else 1)", "1", f"{TEST_EQUAL} -k same_math"),
    Bug(FORMULA, "self.tokens.append(token[1:])", "pass", f"{TEST_EQUAL} -k same_math"),
    # Programs.
    Bug(CODE, 'report["token"] == token', "True", f"{TEST_CODE} -k claims"),
    Bug(CODE, "elif process.poll() is not None:", "elif False:", f"{TEST_CODE} -k holds_the_pipe"),
    Bug(CODE, "os.killpg(process.pid, signal.SIGKILL)", "process.kill()", f"{TEST_CODE} -k holds"),
    Bug(CODE, "if outcome.passed and behind", "if False", f"{TEST_CODE} -k holds"),
    Bug(CODE, "min(ends, default=len(text))", "len(text)", f"{TEST_CODE} -k becomes"),
    Bug(CODE, 'text = text.partition("\\n```")[0] if starts else text', "pass", f"{TEST_CODE} -k becomes"),
    Bug(CODE, "\\n    pass\\n\\n\\n{code}", "\\n\\n\\n{code}", f"{TEST_CODE} -k becomes"),
    Bug(SANDBOX, "signal.setitimer(signal.ITIMER_PROF, seconds)", "pass", f"{TEST_CODE} -k loop"),
    Bug(SANDBOX, "    watch(os.getcwd())\n", "", f"{TEST_CODE} -k outside"),
    Bug(
        SANDBOX,
        "full = realpath(join(base, fsdecode(fspath(path))))",
        "full = join(inside, fsdecode(fspath(path)))",
        f"{TEST_CODE} -k outside",
    ),
    Bug(SANDBOX, "vars(builtins).update(before)", "pass", f"{TEST_CODE} -k built"),
    Bug(SANDBOX, "names[entry_point] = guarded(function)", "names[entry_point] = function", f"{TEST_CODE} -k equals"),
    Bug(SANDBOX, "if name not in before or", "if True or", f"{TEST_CODE} -k functions"),
    Bug(SANDBOX, "except BaseException as error", "except Exception as error", f"{TEST_CODE} -k exits"),
    Bug(SANDBOX, "    os.dup2(null, 0)\n", "", f"{TEST_CODE} -k waits"),
    Bug(SANDBOX, "leave(0)", "sys.exit(0)", f"{TEST_CODE} -k passes_whatever"),
)
