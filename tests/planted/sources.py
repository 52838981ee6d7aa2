"""Reading of files: src/rwkv_bone/data/{sources,formats,files,rows,json_rows,delimited,columnar,folders,...}.py."""

from __future__ import annotations

from tests.planted.bug import Bug

DATA, TESTS = "src/rwkv_bone/data", "tests/data/test_sources"
ENCODINGS, TABLES, FOLDERS = f"{TESTS}_encodings.py", f"{TESTS}_tables.py", f"{TESTS}_folders.py"

BUGS: tuple[Bug, ...] = (
    # A byte order mark becomes part of the first row.
    Bug(f"{DATA}/sources/files.py", "file.seek(len(encoding.mark))", "file.seek(0)", f"{ENCODINGS} -k every_encoding"),
    Bug(f"{DATA}/sources/files.py", '("utf-16-le", "utf-16-be")', '("utf-16-le",)', f"{ENCODINGS} -k without_its_mark"),
    Bug(f"{DATA}/sources/files.py", "if self._returns:", "if False:", f"{ENCODINGS} -k foreign_line_ends"),
    # --data_type says what a file is, whatever its name and beginning.
    Bug(
        f"{DATA}/sources/open.py",
        '"table") and (found is None or isinstance(found, str))',
        '"table") and found is None',
        "tests/data/test_sources.py -k comes_before",
    ),
    # A file that changes between opening and reading.
    Bug(f"{DATA}/sources/files.py", "            check_unchanged(path, seen)\n", "", f"{ENCODINGS} -k changes_while"),
    Bug(
        f"{DATA}/sources/files.py", "seen = seen or stamp(path)", "seen = stamp(path)", f"{ENCODINGS} -k changes_while"
    ),
    Bug(
        f"{DATA}/sources/files.py",
        'if path.suffix.lower() == ".gz"',
        'if path.suffix == ".gz"',
        f"{ENCODINGS} -k any_case",
    ),
    Bug(f"{DATA}/sources/files.py", "return plain.suffix.lower()", "return plain.suffix", f"{ENCODINGS} -k any_case"),
    # The last of two values of one key.
    Bug(f"{DATA}/conversations/values.py", "if len(found) < len(pairs):", "if False:", f"{ENCODINGS} -k stands_twice"),
    Bug(
        f"{DATA}/sources/json_rows.py",
        'line.decode("utf-8-sig")',
        'line.decode("utf-8")',
        f"{ENCODINGS} -k joined_files",
    ),
    Bug(f"{DATA}/sources/json_rows.py", "number += 1\n                value", "value", f"{TESTS}.py -k bad_json_list"),
    Bug(f"{DATA}/sources/formats.py", "if head.startswith(mark):", "if False:", f"{ENCODINGS} -k wrapping"),
    Bug(f"{DATA}/sources/formats.py", ") and is_gzip(path):", ") and False:", f"{ENCODINGS} -k wrapping"),
    Bug(f"{DATA}/sources/text_files.py", 'if "\\0" in new:', "if False:", f"{ENCODINGS} -k nul_characters"),
    Bug(
        f"{DATA}/sources/text_files.py",
        "if not text[end + 1].isspace():",
        "if True:",
        f"{TESTS}.py -k read_in_pieces_has",
    ),
    # A TSV read with the quoting of CSV.
    Bug(
        f"{DATA}/sources/delimited.py",
        'self._quoted = self._separator != "\\t" or',
        "self._quoted = True or",
        f"{TABLES} -k tabs",
    ),
    Bug(
        f"{DATA}/sources/delimited.py",
        "or all(len(cell) > 1",
        "or any(len(cell) > 1",
        f"{TABLES} -k one_name",
    ),
    # The first row of a table without a header becomes its names.
    Bug(
        f"{DATA}/sources/delimited.py",
        "(reason := _no_header(rows, fields))",
        "(reason := '')",
        f"{TABLES} -k looks_like",
    ),
    Bug(f"{DATA}/sources/delimited.py", "if set(names) & set(fields) or", "if", f"{TABLES} -k first_line_of_names"),
    Bug(
        f"{DATA}/sources/delimited.py",
        "!= len(WITHOUT_HEADER) or fields:",
        "!= len(WITHOUT_HEADER):",
        f"{TABLES} -k needs_their_names",
    ),
    Bug(f"{DATA}/sources/delimited.py", "elif cells == first:", "elif False:", f"{TABLES} -k no_row_where"),
    Bug(f"{DATA}/sources/delimited.py", "if name and any(", "if False and any(", f"{TABLES} -k looks_like"),
    Bug(f"{DATA}/sources/delimited.py", '        row.pop("", None)\n', "", f"{TABLES} -k without_a_name"),
    # Nulls that only the format made.
    Bug(
        f"{DATA}/sources/columnar.py",
        "for name, part in value.items() if part is not None)",
        "for name, part in value.items())",
        f"{TABLES} -k format_made",
    ),
    Bug(
        f"{DATA}/sources/columnar.py",
        "if not (value is None or isinstance(value, UserError))",
        "if not isinstance(value, UserError)",
        f"{TABLES} -k only_the_columns",
    ),
    Bug(
        f"{DATA}/sources/columnar.py",
        "if field.name in self._kept or _is_text(field.type)]",
        "if field.name in self._kept]",
        f"{TABLES} -k only_the_columns",
    ),
    Bug(
        f"{DATA}/sources/columnar.py",
        "column.validate(full=True)",
        "column.validate()",
        f"{TABLES} -k 'damage or utf8'",
    ),
    Bug(f"{DATA}/sources/columnar.py", "if end < file.size():", "if False:", f"{TABLES} -k two_joined"),
    Bug(f"{DATA}/sources/columnar.py", "!= END_OF_STREAM:", "== b'':", f"{TABLES} -k two_joined"),
    Bug(f"{DATA}/sources/columnar.py", 'text.replace(" ", "T", 1)', "text", f"{TABLES} -k as_people"),
    Bug(f"{DATA}/sources/columnar.py", "float(str(np.float32(value)))", "value", f"{TABLES} -k as_people"),
    Bug(f"{DATA}/sources/columnar.py", "        if twice:", "        if False:", f"{TABLES} -k two_columns"),
    # Folders.
    Bug(
        f"{DATA}/sources/folders.py",
        "(_of_shard, _of_folders, _of_file_name)",
        "(_of_folders, _of_file_name)",
        f"{FOLDERS} -k 'datasets_library or chosen'",
    ),
    Bug(
        f"{DATA}/sources/folders.py",
        "(_of_shard, _of_folders, _of_file_name)",
        "(_of_shard, _of_file_name, _of_folders)",
        f"{FOLDERS} -k splits",
    ),
    Bug(f"{DATA}/sources/folders.py", "part.lower()", "part", f"{FOLDERS} -k tell_the_splits"),
    Bug(
        f"{DATA}/sources/folders.py",
        'True: ("test", "validation", "train")',
        'True: ("train", "test", "validation")',
        f"{FOLDERS} -k tell_the_splits",
    ),
    Bug(
        f"{DATA}/sources/folders.py",
        "if texts and len(texts) < len(files):",
        "if False:",
        f"{FOLDERS} -k never_read_partly",
    ),
    Bug(
        f"{DATA}/sources/folders.py",
        "key=lambda path: path.relative_to(folder).parts",
        "key=lambda path: path.name",
        f"{FOLDERS} -k order_of_path",
    ),
    Bug(f"{DATA}/sources/folders.py", "if path not in listed:", "if False:", f"{FOLDERS} -k says_itself"),
    Bug(f"{DATA}/sources/folders.py", "and (here / name).resolve() in above", "and False", f"{FOLDERS} -k loop"),
    Bug(f"{DATA}/sources/folders.py", "rule is _of_file_name and all_or_none", "False", f"{FOLDERS} -k titles"),
    Bug(
        f"{DATA}/sources/folders.py",
        "yield Places.number(file, number), (part.parse, raw), size",
        "yield Places.number(0, number), (part.parse, raw), size",
        f"{FOLDERS} -k named_with_its_file",
    ),
    Bug(f"{DATA}/sources/hub_cards.py", "    datasets.disable_progress_bars()\n", "", f"{FOLDERS} -k without_noise"),
    Bug(f"{DATA}/sources/open.py", 'if pair and data_type == "auto":', "if False:", f"{FOLDERS} -k told_apart"),
    # Token files.
    Bug(
        f"{DATA}/sources/token_files.py",
        'or array.dtype.kind not in "iu"',
        "",
        "tests/data/test_sources.py -k other_arrays",
    ),
    Bug(f"{DATA}/sources/binidx.py", "if found != expected:", "if found < expected:", "tests/data/test_binidx.py"),
)
