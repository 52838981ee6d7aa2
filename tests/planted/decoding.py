"""Mistakes in what is read token by token, what is drawn, and what of an answer is shown and kept."""

from tests.planted.bug import Bug

INFERENCE, OPS = "src/rwkv_bone/inference", "cuda/cpu/step_ops.h"
DECODER, SAMPLING = "tests/inference/test_decoder.py", "tests/inference/test_sampling.py"
STOPPING, STREAM, GENERATE = (f"tests/inference/test_{name}.py" for name in ("stopping", "stream", "generate"))
COMPILED, WHOLE = f"{INFERENCE}/compiled.py", f"{DECODER} -k whole_text"
ADAPTED = f"{DECODER} -k adapters"

BUGS = (
    # The operations of a token.
    Bug(
        OPS,
        "const vec own = load(x + i), delta = load(previous + i) - own;",
        "const vec own = load(x + i), delta = -own;",
        WHOLE,
    ),
    Bug(OPS, "if (changes) share += load(changes + at);", "", WHOLE),
    Bug(OPS, "store(step.next + op.state + i, own);", "", WHOLE),
    Bug(OPS, "const vec removal = load(a + j) * inverse;", "const vec removal = load(a + j);", WHOLE),
    Bug(OPS, "y[i] = sum(out) + v[i] * bonus;", "y[i] = sum(out);", WHOLE),
    Bug(
        OPS,
        "store(next + j, s * load(decay + j) + v[i] * load(k + j));",
        "store(next + j, s + v[i] * load(k + j));",
        WHOLE,
    ),
    Bug(OPS, "normal * gate * sigmoid(gate)", "normal * sigmoid(gate)", WHOLE),
    Bug(OPS, "* load(decay + j) + sa * load(b + j)", "* load(decay + j) + load(b + j)", WHOLE),
    Bug(
        OPS,
        "load(floats(op, 5) + at + j));\n            store(v + j, value + (",
        "load(floats(op, 5) + at + j));\n            store(v + j, value - (",
        WHOLE,
    ),
    Bug(OPS, "for (int64_t j = 0; i + j < n; j++) y[i + j] = rest[j];", "", WHOLE),
    Bug(OPS, "for (; column < end; column++) {", "for (; column + 1 < end; column++) {", WHOLE),
    Bug(OPS, "pair_up(room, op.n);", "", WHOLE),
    Bug(OPS, "row < begin + BLOCK && row < op.m", "row < begin + BLOCK && row + 1 < op.m", WHOLE),
    Bug(OPS, "op.add ? y[row] + product : product", "product", WHOLE),
    Bug(
        OPS,
        "rest += row[i] * x[i];\n    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;",
        "rest += row[i];\n    return sum(sums[0] + sums[1]) + rest;",
        ADAPTED,
    ),
    Bug(OPS, "op.n) * scales[row]", "op.n) * scales[0]", ADAPTED),
    Bug(OPS, "scales + at / 64,", "scales,", ADAPTED),
    Bug(OPS, "begin + i < op.n; i++) y[i] +=", "begin + op.m <= op.n; i++) y[i] +=", ADAPTED),
    Bug(OPS, "_mm512_srli_epi32(codes, 4)", "_mm512_srli_epi32(codes, 5)", ADAPTED),
    Bug(COMPILED, "        steps.fold(x, folded)\n", "", ADAPTED),
    Bug(COMPILED, "layer.settings.scale, torch.float32)", "1.0, torch.float32)", ADAPTED),
    Bug(COMPILED, "if any(_folded(module) and module.weight is None for module in modules):", "if False:", ADAPTED),
    Bug(COMPILED, "if start is not None:", "if False:", f"{DECODER} -k initial_state"),
    Bug(COMPILED, "after = torch.empty_like(before)", "after = before", f"{DECODER} -k never_changed"),
    Bug(COMPILED, "self._logits.clone()", "self._logits", WHOLE),
    Bug(
        COMPILED,
        "for layer in state for part in layer]",
        "for part in zip(*state) for part in part]",
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
    Bug(f"{INFERENCE}/sampling.py", "if first < wanted and not", "if False and not", f"{SAMPLING} -k at_its_number"),
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
