"""Mistakes in preference tuning: the losses of tokens, and what is made of them."""

from tests.planted.bug import Bug

HEAD, LAYERS, MODEL, CONTEXT, LOSSES = (
    f"src/rwkv_bone/{name}.py"
    for name in ("ops/cross_entropy", "models/layers", "models/rwkv", "training/context", "preferences/losses")
)
OBJECTIVE, STEP, REFERENCE, DATASET, SAMPLER = (
    f"src/rwkv_bone/{name}.py"
    for name in ("preferences/objective", "training/module", "training/reference", "data/dataset", "data/sampler")
)
ROWS, TOKENS, FORMULAS = (
    f"tests/{name}.py" for name in ("ops/test_cross_entropy", "models/test_token_losses", "preferences/test_losses")
)
PROMPTS, SHARED = "src/rwkv_bone/training/prompts.py", "tests/training/test_prompts.py"
SUMMED, RUNS, CUT = (
    f"tests/{name}.py" for name in ("preferences/test_objective", "training/test_preferences", "data/test_units")
)

BUGS = (
    # The losses of tokens.
    Bug(
        HEAD,
        "d_hidden[at] = (part * factor)",
        "d_hidden[at] = (part * factor.to(part.dtype))",
        f"{ROWS} -k common_error",
    ),
    Bug(HEAD, "total += logits.T @ (part * factor)", "total += logits.T @ (part + 0 * factor)", f"{ROWS} -k float64"),
    Bug(HEAD, "torch.empty_like(inputs) if want_weight else inputs", "inputs", f"{ROWS} -k float64"),
    Bug(HEAD, "                softmax_gradient_(logits, target)\n", "", f"{ROWS} -k float64"),
    Bug(HEAD, "torch.zeros_like(weight, dtype=grad.dtype)", "torch.zeros_like(weight)", f"{ROWS} -k common_error"),
    Bug(HEAD, "d_inputs.new_zeros(ctx.hidden_shape)", "d_inputs.new_empty(ctx.hidden_shape)", f"{ROWS} -k float64"),
    Bug(HEAD, "hidden.detach()[rows], labels[rows]", "hidden.detach()[rows], labels[rows.sort()[0]]", ROWS),
    Bug(
        HEAD, "        return torch.cat(losses)\n", "        return torch.cat(losses).float()\n", f"{ROWS} -k gradcheck"
    ),
    Bug(HEAD, "if l2wrap or loss_scale != 1:", "if l2wrap:", f"{ROWS} -k refuse"),
    Bug(LAYERS, 'reduction="none")', 'reduction="mean")[None]', f"{TOKENS} -k plain_logits"),
    Bug(LAYERS, "        if per_token:\n            return F.c", "        if False:\n            return F.c", TOKENS),
    Bug(MODEL, "label_rows, loss_scale, per_token)", "label_rows, loss_scale)", f"{TOKENS} -k plain_logits"),
    Bug(MODEL, "l2wrap, label_rows, per_token)", "l2wrap, label_rows)", f"{TOKENS} -k plain_logits"),
    Bug(MODEL, "labels is None or l2wrap or loss_scale != 1", "labels is None", f"{TOKENS} -k refuse"),
    Bug(CONTEXT, "torch.cat(losses)[places]", "torch.cat(losses)", f"{TOKENS} -k order_of_the_labels"),
    Bug(CONTEXT, "np.argsort(order)]", "order]", f"{TOKENS} -k order_of_the_labels"),
    # The four losses.
    Bug(LOSSES, "(rejected - reference_rejected)\n", "(rejected + reference_rejected)\n", f"{FORMULAS} -k digits"),
    Bug(LOSSES, "-(1 - label_smoothing) * F", "-F", f"{FORMULAS} -k smoothed"),
    Bug(LOSSES, "label_smoothing * F.logsigmoid(-margin)", "label_smoothing * F.logsigmoid(margin)", FORMULAS),
    Bug(LOSSES, "F.logsigmoid(margin)", "torch.log(torch.sigmoid(margin))", f"{FORMULAS} -k digits"),
    Bug(LOSSES, "- log_odds(rejected_mean)", "- rejected_mean", f"{FORMULAS} -k orpo"),
    Bug(LOSSES, "torch.log(-torch.expm1(log_p))", "torch.log(1 - torch.exp(log_p))", f"{FORMULAS} -k digits"),
    Bug(LOSSES, "    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)\n", "", f"{FORMULAS} -k certain"),
    Bug(LOSSES, "(log_p.dtype).tiny", "(log_p.dtype).eps", f"{FORMULAS} -k digits"),
    Bug(LOSSES, "_mean) - gamma, label", "_mean - gamma), label", FORMULAS),
    Bug(LOSSES, "gain = beta * (policy - reference - kl)", "gain = beta * (policy - reference)", f"{FORMULAS} -k kto"),
    Bug(
        LOSSES,
        "good, desirable_weight * torch.sigmoid(-gain)",
        "good, desirable_weight * (1 - torch.sigmoid(gain))",
        FORMULAS,
    ),
    Bug(LOSSES, "undesirable_weight * torch.sigmoid(gain)", "undesirable_weight * torch.sigmoid(-gain)", FORMULAS),
    Bug(LOSSES, ".mean().clamp(min=0)", ".mean()", f"{FORMULAS} -k divergence"),
    Bug(LOSSES, "(policy - reference).detach()", "(policy - reference)", f"{FORMULAS} -k divergence"),
    # More of a step, beside those of preference_runs.py and units.py.
    Bug(OBJECTIVE, "rewards = config.beta * mean", "rewards = config.beta * logp", SUMMED),
    Bug(OBJECTIVE, "rewards[:, 0] > rewards[:, 1]", "rewards[:, 0] >= rewards[:, 1]", SUMMED),
    Bug(STEP, "scale = self.plan.world_size / self._units", "scale = 1 / self._units", f"{RUNS} -k two_processes"),
    Bug(
        STEP,
        "(total / first.answers.window_units).clamp(min=0)",
        "total / first.answers.window_units",
        "tests/training/test_kl_estimate.py",
    ),
    Bug(REFERENCE, "] = run(other)[:, 0]", "] = run(batch)[:, 0]", f"{RUNS} -k plain"),
    Bug(DATASET, 'np.arange(len(self)), side="right")', 'np.arange(len(self)), side="left")', CUT),
    Bug(SAMPLER, "good=None if self.good is None else function(self.good),", "good=self.good,", f"{CUT} -k device"),
    # The prompt that both answers share.
    Bug(PROMPTS, "rows.unsqueeze(1).expand(-1, 2, *rows.shape[1:]).flatten(0, 1)", "torch.cat([rows, rows])", SHARED),
    Bug(PROMPTS, "torch.cat([nothing, losses])[order]", "torch.cat([nothing, losses])", SHARED),
)
