"""Mistakes in what is read token by token, what is drawn, and what of an answer is shown and kept."""

from tests.planted.bug import Bug

INFERENCE, OPS = "src/rwkv_bone/inference", "cuda/cpu/step_ops.h"
DECODER, SAMPLING = "tests/inference/test_decoder.py", "tests/inference/test_sampling.py"
STOPPING, STREAM, GENERATE = (f"tests/inference/test_{name}.py" for name in ("stopping", "stream", "generate"))
COMPILED, WHOLE = f"{INFERENCE}/compiled.py", f"{DECODER} -k whole_text"
ADAPTED, TOGETHER = f"{DECODER} -k adapters", f"{DECODER} -k any_number"
ONCE = f"{GENERATE} -k read_once"

BUGS = (
    # The operations of a token.
    Bug(
        OPS,
        "const vec own = load(x + i), delta = load(previous + i) - own;",
        "const vec own = load(x + i), delta = -own;",
        WHOLE,
    ),
    Bug(OPS, "if (changes) share += load(changes + at);", "", WHOLE),
    Bug(OPS, "if (op.add) store(next + i, own);", "", WHOLE),
    Bug(OPS, "const vec removal = load(a + j) * inverse;", "const vec removal = load(a + j);", WHOLE),
    Bug(OPS, "sum(out) + v[i] * bonus", "sum(out)", WHOLE),
    Bug(OPS, "state * load(decay + j) + v[i] * load(k + j)", "state + v[i] * load(k + j)", WHOLE),
    Bug(OPS, "normal * open * sigmoid(open)", "normal * sigmoid(open)", WHOLE),
    Bug(OPS, "+ sa * load(b + j)", "+ load(b + j)", WHOLE),
    Bug(
        OPS,
        "load(pv + j));\n            store(v + j, value + (",
        "load(pv + j));\n            store(v + j, value - (",
        WHOLE,
    ),
    Bug(OPS, "for (int64_t j = 0; i + j < n; j++) y[i + j] = rest[j];", "", WHOLE),
    Bug(OPS, "for (; column < end; column++)", "for (; column + 1 < end; column++)", WHOLE),
    Bug(OPS, "if (paired(op.kind)) pair_up(to, n);", "", WHOLE),
    Bug(OPS, "for (; at < end; at++) product_of_rows", "for (; at + 1 < end; at++) product_of_rows", WHOLE),
    Bug(OPS, "*to = op.add ? *to + products : products;", "*to = products;", WHOLE),
    Bug(OPS, "if (begin < end) add_step<KIND, M, K, true>", "if (false) add_step<KIND, M, K, true>", WHOLE),
    Bug(OPS, "floats(op, 3)[row + i], before)", "floats(op, 3)[0], before)", ADAPTED),
    Bug(OPS, "rows.scales[(i * rows.n + at) / 64]", "rows.scales[at / 64]", ADAPTED),
    # Of a token of several sequences.
    Bug(OPS, "            if (from)\n", "            if (false)\n", TOGETHER),
    Bug(OPS, "kept[one - first + j][i] = sums[i][j];", "kept[j][i] = sums[i][j];", TOGETHER),
    Bug(OPS, "const float* x = step.prepared + one * width;", "const float* x = step.prepared;", TOGETHER),
    Bug(OPS, "own + at - from + v * LANES, w[v]", "own + v * LANES, w[v]", TOGETHER),
    Bug(OPS, "w[v] * x[j * step.stride + i]", "w[v] * x[i]", TOGETHER),
    Bug(OPS, "time7_head(op, step, i / op.m, i % op.m)", "time7_head(op, step, 0, i % op.m)", TOGETHER),
    Bug(OPS, "read_row(op.kind, op.p[0], step.tokens[one]", "read_row(op.kind, op.p[0], step.tokens[0]", TOGETHER),
    Bug(
        OPS,
        "add_products<FLOAT32, M, K>(floats_of, 0, whole,",
        "add_products<KIND, M, K>(rows, from, to - 1,",
        TOGETHER,
    ),
    Bug(OPS, "own, x + i, (i + LANES < op.n ? LANES :", "own, x + i, (i + LANES < op.n ? LANES - 1 :", TOGETHER),
    Bug(COMPILED, ", state, last=False)", ", state)", TOGETHER),
    Bug(
        COMPILED,
        "self._steps.run([token], [before], [after])",
        "self._steps.run([token], [before], [after], rounded=True)",
        WHOLE,
    ),
    Bug(OPS, "begin + i < op.n; i++) y[i] +=", "begin + op.m <= op.n; i++) y[i] +=", ADAPTED),
    Bug(OPS, "_mm512_srli_epi32(codes, 4)", "_mm512_srli_epi32(codes, 5)", ADAPTED),
    Bug(COMPILED, "        steps.fold(x, folded)\n", "", ADAPTED),
    Bug(COMPILED, "layer.settings.scale, torch.float32)", "1.0, torch.float32)", ADAPTED),
    Bug(COMPILED, "if any(_folded(module) and module.weight is None for module in modules):", "if False:", ADAPTED),
    Bug(COMPILED, "if start is not None:", "if False:", f"{DECODER} -k initial_state"),
    Bug(COMPILED, "after = torch.empty_like(before)", "after = before", f"{DECODER} -k never_changed"),
    Bug(COMPILED, "result(self._logits, 1)[0].clone()", "result(self._logits, 1)[0]", WHOLE),
    Bug(
        COMPILED,
        "flatten() for layer in state for part in layer]",
        "flatten() for part in zip(*state) for part in part]",
        f"{DECODER} -k prompt_read",
    ),
    Bug(
        f"{INFERENCE}/decoder.py",
        "state = self._forward(ids[start : start + self.piece], state)[1]",
        "self._forward(ids[start : start + self.piece], state)",
        f"{DECODER} -k in_pieces",
    ),
    # What is drawn.
    Bug(
        f"{INFERENCE}/sampling.py",
        "if not 0 < self.top_p <= 1:",
        "if not 0 <= self.top_p <= 1:",
        f"{SAMPLING} -k means_nothing",
    ),
    Bug(
        f"{INFERENCE}/sampling.py",
        "0 <= self.temperature < math.inf",
        "0 <= self.temperature",
        f"{SAMPLING} -k means_nothing",
    ),
    Bug(f"{INFERENCE}/sampling.py", "if self.max_new < 0:", "if self.max_new < -1:", f"{SAMPLING} -k means_nothing"),
    Bug(f"{INFERENCE}/sampling.py", "before >= sampling.top_p", "before > 1", f"{SAMPLING} -k at_its_number"),
    Bug(f"{INFERENCE}/sampling.py", "        if len(rows):", "        if False:", f"{SAMPLING} -k at_its_number"),
    Bug(
        f"{INFERENCE}/sampling.py",
        "sampling, numbers[rows])",
        "sampling, numbers[: len(rows)])",
        f"{SAMPLING} -k at_its_number",
    ),
    Bug(
        f"{INFERENCE}/sampling.py",
        "cumulated <= numbers * total",
        "cumulated < numbers * total",
        f"{SAMPLING} -k 'last_number'",
    ),
    Bug(
        f"{INFERENCE}/sampling.py",
        "return places.minimum((cumulated < total).sum(dim=-1, keepdim=True))",
        "return places",
        f"{SAMPLING} -k last_number",
    ),
    Bug(
        f"{INFERENCE}/sampling.py",
        "        self._counts *= self.sampling.penalty_decay\n",
        "",
        f"{SAMPLING} -k chatrwkv",
    ),
    Bug(
        f"{INFERENCE}/sampling.py", "presence * self._seen", "presence * (self._counts > 0)", f"{SAMPLING} -k long_ago"
    ),
    Bug(
        f"{INFERENCE}/sampling.py",
        "self._random = [self._random[row] for row in rows]\n",
        "pass\n",
        f"{SAMPLING} {GENERATE} -k beside",
    ),
    Bug(f"{INFERENCE}/generate.py", "            choose.keep(going)\n", "", f"{GENERATE} -k beside"),
    Bug(f"{INFERENCE}/generate.py", "            sequences.keep(going)\n", "", f"{GENERATE} -k beside"),
    Bug(
        f"{INFERENCE}/generate.py",
        "            del going, logits",
        "            pass",
        f"{GENERATE} -k number_of_prompts",
    ),
    Bug(
        f"{INFERENCE}/generate.py",
        "compiled(model) if isinstance(model, RWKV)",
        "None if isinstance(model, RWKV)",
        f"{GENERATE} -k nothing_but_prompts",
    ),
    # What prompts begin with.
    Bug(f"{INFERENCE}/generate.py", "    if shared:\n        [start] =", "    if shared:\n        _ =", ONCE),
    Bug(f"{INFERENCE}/generate.py", "known.state if known else None, piece", "None, piece", ONCE),
    Bug(
        f"{INFERENCE}/generate.py",
        "enumerate(dict.fromkeys(map(tuple, prompts)))",
        "enumerate(map(tuple, prompts))",
        ONCE,
    ),
    Bug(
        f"{INFERENCE}/generate.py",
        "return torch.cat(logits)[of], _rows(state, of)",
        "return torch.cat(logits)[of], state",
        ONCE,
    ),
    Bug(f"{INFERENCE}/generate.py", "beginning([prompt[:-1] for prompt in prompts])", "beginning(prompts)", ONCE),
    Bug(f"{INFERENCE}/generate.py", ">= SHORTEST else ()", ">= 1 else ()", f"{GENERATE} -k short"),
    Bug(f"{INFERENCE}/generate.py", "len(prompt) > len(begun) and ", "", ONCE),
    Bug(f"{INFERENCE}/generate.py", " and tuple(prompt[: len(begun)]) == begun for", " for", ONCE),
    Bug(
        "src/rwkv_bone/evaluation/evaluate.py",
        'how["known"] = known',
        'how["known"] = None',
        "tests/evaluation/test_evaluate.py -k read_once",
    ),
    Bug(f"{INFERENCE}/generate.py", 'f"{seed} {i}"', "str(seed)", f"{GENERATE} -k beside"),
    Bug(
        f"{INFERENCE}/generate.py",
        "                self.ended = TEXT\n                return False\n",
        "                self.ended = TEXT\n",
        f"{GENERATE} -k nothing_is_written_after",
    ),
    Bug(
        f"{INFERENCE}/generate.py",
        "        if len(self._ids) >= self._limit:\n            return False\n",
        "",
        f"{GENERATE} -k beside",
    ),
    # What is shown, and what is kept.
    Bug(f"{INFERENCE}/stopping.py", 'ready = text.rstrip("\\N{REPLACEMENT CHARACTER}")', "ready = text", STOPPING),
    Bug(
        f"{INFERENCE}/stopping.py",
        "self._given = self._ids, [], 0",
        "self._given = self._ids, [], self._given",
        STOPPING,
    ),
    Bug(f"{INFERENCE}/stopping.py", "self._stop.held_back(self._held)", "0", STOPPING),
    Bug(f"{INFERENCE}/stopping.py", "longest - 1), 0, -1)", "longest - 2), 0, -1)", STOPPING),
    Bug(f"{INFERENCE}/stopping.py", "return min((at for", "return max((at for", STOPPING),
    Bug(f"{INFERENCE}/stopping.py", "if self._characters.whole:", "if True:", STOPPING),
    Bug(f"{INFERENCE}/stopping.py", "        if not cut:\n", "        if True:\n", f"{STOPPING} {STREAM}"),
    Bug(
        f"{INFERENCE}/stopping.py",
        "if mark.characters <= len(self.text))",
        "if mark.characters <= len(self.text) + 1)",
        f"{STOPPING} {STREAM}",
    ),
    Bug(f"{INFERENCE}/stream.py", "if kept[0] <= self._writing.sure][-1]", "if True][-1]", STREAM),
    Bug(f"{INFERENCE}/stream.py", "rest = self._writing.kept()[read:]", "rest = self._writing.ids[read:]", STREAM),
    Bug(f"{INFERENCE}/stream.py", "self._states = self._states[last:]", "pass", f"{STREAM} -k no_more_states"),
    Bug(f"{INFERENCE}/stream.py", "if self._states:\n", "if False:\n", STREAM),
    Bug(f"{INFERENCE}/stream.py", "cut=why == LENGTH", "cut=False", f"{STREAM} -k half_character"),
)
