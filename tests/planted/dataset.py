"""From documents to batches: what is lost, the fingerprint, the cache, remarks, the plan of a run."""

from tests.planted.bug import Bug

DATA = "src/rwkv_bone/data/"
FINGERPRINT = "tests/data/test_fingerprint.py"
LOST = "tests/data/test_lost.py"
CACHE = "tests/data/test_cache.py"
SAMPLER = "tests/data/test_sampler.py"

BUGS = (
    # What a run says of its data.
    Bug(
        DATA + "dataset.py",
        "windows: bool | None = None, notes: bool = True)",
        "windows: bool | None = None, notes: bool = False)",
        "tests/training/test_data_lines.py -k splits_its_own",
    ),
    Bug(
        DATA + "sources/folders.py",
        "saved = splits is not None",
        "saved = False",
        "tests/data/test_sources_folders.py -k says_itself",
    ),
    # The fingerprint.
    Bug(
        DATA + "fingerprint.py",
        "range(0, total, BLOCK)",
        "range(0, min(total, 256), BLOCK)",
        f"{FINGERPRINT} -k three_thousand",
    ),
    Bug(
        DATA + "fingerprint.py",
        "    for part in ids:\n        digest.update(np.ascontiguousarray(part, dtype=width).data)\n",
        "",
        f"{FINGERPRINT} -k three_thousand",
    ),
    Bug(
        DATA + "fingerprint.py",
        "    digest.update(np.packbits(np.concatenate(targets)).data)\n",
        "",
        f"{FINGERPRINT} -k changed_target",
    ),
    Bug(DATA + "fingerprint.py", "dtype=width).data", "dtype=part.dtype).data", f"{FINGERPRINT} -k dtype"),
    Bug(DATA + "fingerprint.py", "part.itemsize <= 2 or part.max() < 1 << 16", "True", f"{FINGERPRINT} -k sixteen"),
    Bug(DATA + "fingerprint.py", "for column in (places[back], lengths[back])", "for column in ()", FINGERPRINT),
    Bug(DATA + "fingerprint.py", "if dataset.repeats is not None", "if False", f"{FINGERPRINT} -k borders"),
    Bug(
        DATA + "fingerprint.py", "{dataset.ctx_len} {dataset.windows}", "{dataset.ctx_len}", f"{FINGERPRINT} -k borders"
    ),
    Bug(DATA + "fingerprint.py", '"table": table, ', "", f"{FINGERPRINT} -k made_once"),
    Bug(
        DATA + "fingerprint.py",
        "            mask[firsts - low] = False\n",
        "",
        FINGERPRINT,
    ),
    Bug(DATA + "fingerprint.py", "mine + offset", "mine", f"{FINGERPRINT} -k which_files"),
    Bug(
        "src/rwkv_bone/training/resume.py",
        'of_this_format(self.metadata["data"]) and',
        "False and",
        "tests/training/test_data_lines.py -k character",
    ),
    # Which documents become which samples.
    Bug(DATA + "samples.py", "-(-(full - 1) // ctx_len)", "full // ctx_len + 1", f"{LOST} -k exact_number"),
    Bug(DATA + "samples.py", "-(-(full - 1) // ctx_len)", "-(-full // ctx_len)", f"{LOST} -k exact_number"),
    Bug(DATA + "samples.py", "-(-(full - 1) // ctx_len)", "(full - 1) // ctx_len", f"{LOST} -k exact_number"),
    Bug(DATA + "samples.py", '"cut" if documents.turns else "split"', '"cut"', f"{LOST} -k novel"),
    Bug(DATA + "samples.py", '"cut" if documents.turns else "split"', '"split"', f"{LOST} -k conversations"),
    Bug(
        DATA + "samples.py",
        "share(targets.sum() - samples.trained.sum(), targets.sum())",
        "share((full[too_long] - limit).sum(), full.sum())",
        f"{LOST} -k of_trained_tokens",
    ),
    Bug(DATA + "samples.py", "share(full[empty].sum(), full.sum())", "0.0", f"{LOST} -k finds_nothing"),
    # What is lost.
    Bug(DATA + "lost.py", "if 1 - kept > limit", "if 1 - kept >= limit", f"{LOST} -k one_half"),
    Bug(DATA + "lost.py", "kept *= 1 - min(", "kept = 1 - min(", f"{LOST} -k together"),
    Bug(DATA + "lost.py", "self.share > WARNED", "self.share > 5 * WARNED", f"{LOST} -k ten_percent"),
    Bug(DATA + "lost.py", "0 < share < 0.001", "False", f"{LOST} -k rounded"),
    Bug(
        DATA + "dataset.py", "lost = [*documents.lost, *samples.lost]", "lost = [*samples.lost]", f"{LOST} -k one_half"
    ),
    Bug(DATA + "load.py", "max_lost=cfg.max_lost", "max_lost=0.5 if path is None else 1", f"{LOST} -k held_out"),
    Bug(
        "src/rwkv_bone/training/heldout_sets.py",
        "for line in dataset.note_lines()",
        "for line in ()",
        "tests/training/test_data_lines.py -k held_out",
    ),
    # Remarks.
    Bug(DATA + "part.py", "remarks.add(block.remarks)", "remarks = remarks", f"{CACHE} -k remarks"),
    Bug(
        DATA + "part.py",
        "remarks.add(block.remarks)",
        "remarks.counts = dict(block.remarks)",
        f"{CACHE} -k remarks_are_added_up",
    ),
    Bug(
        DATA + "encode.py",
        "(talk.remarks, self.template.remarks(talk), ",
        "(talk.remarks, ",
        f"{CACHE} -k remarks_name",
    ),
    Bug(DATA + "encode.py", "(talk.remarks, self.template", "(self.template", f"{CACHE} -k remarks"),
    # Keys of the cache.
    Bug(DATA + "cache.py", 'folder.rglob("*.py")', 'folder.glob("[a-r]*.py")', f"{CACHE} -k any_module"),
    Bug(DATA + "part.py", '            "libraries": library_versions(),\n', "", f"{CACHE} -k other_code"),
    Bug(DATA + "part.py", '            "code": code_hash(),\n', "", f"{CACHE} -k other_code"),
    Bug(DATA + "part.py", '            "columns": cfg.columns,\n', "", f"{CACHE} -k names_of_columns"),
    Bug(DATA + "part.py", '            "bad_rows": cfg.bad_rows,\n', "", f"{CACHE} -k changes_the_tokens"),
    # What cannot act.
    Bug(DATA + "part.py", "        self._check_split()\n", "", "tests/data/test_used.py -k sft_split"),
    Bug(
        DATA + "used.py",
        "or any(map(rule.acts, parts))",
        "or all(map(rule.acts, parts))",
        "tests/data/test_used.py -k one_file",
    ),
    Bug(DATA + "used.py", "any(map(rule.acts, held_out()))", "False", "tests/data/test_used.py -k held_out"),
    Bug(
        DATA + "used.py",
        "any(documents.tools for documents in found)",
        "found",
        "tests/data/test_used.py -k tool_format",
    ),
    # The plan of a run.
    Bug(
        DATA + "sampler.py",
        "bounds = order.bounds[first : first + self.world_size + 1]",
        "bounds = order.bounds[first : first + 2]",
        f"{SAMPLER} -k widest",
    ),
    Bug(
        DATA + "sampler.py",
        "self._widest(order, mine - rank)",
        "self._widest(order, mine)",
        f"{SAMPLER} -k widest",
    ),
    Bug(DATA + "sampler.py", "max(self.budget // SIZES, 1)", "1", f"{SAMPLER} -k few_lengths"),
    Bug(DATA + "sampler.py", "bounds = np.append(bounds, filled)", "bounds[-1] = filled", f"{SAMPLER} -k few_lengths"),
    Bug(
        DATA + "sampler.py",
        "return self._filled(int(lengths.max())) if",
        "return int(lengths.max()) if",
        f"{SAMPLER} -k few_lengths",
    ),
    Bug(DATA + "sampler.py", "seen[order.samples[:end]] = True", "seen[:end] = True", f"{SAMPLER} -k share_that_a_run"),
    Bug(
        DATA + "sampler.py",
        "number + 1, steps - taken",
        "number + 1, steps - taken - 1",
        f"{SAMPLER} -k 'share or weights'",
    ),
    Bug(DATA + "split.py", "min(max(count, 1), len(unique) - 1)", "max(count, 1)", "tests/data/test_split.py"),
)
