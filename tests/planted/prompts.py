"""Prompts that are computed once for both answers."""

from tests.planted.bug import Bug

PROMPTS = "src/rwkv_bone/training/prompts.py"
TESTS = "tests/training/test_prompts.py"

BUGS = (
    # An answer goes on from the state of another pair's prompt.
    Bug(
        PROMPTS,
        "rows.unsqueeze(1).expand(-1, 2, *rows.shape[1:]).flatten(0, 1)",
        "rows.repeat(2, *[1] * (rows.dim() - 1))",
        f"{TESTS} -k whole_documents",
    ),
    # The gradient stops at the state.
    Bug(PROMPTS, "_twice(rows[: made.pairs])", "_twice(rows[: made.pairs].detach())", f"{TESTS} -k whole_documents"),
    # What has a label is shared, too.
    Bug(
        PROMPTS, "most = before[one : one + 2].min()", "most = before[one : one + 2].min() + 3", f"{TESTS} -k documents"
    ),
    # Losses in the order of the rest.
    Bug(PROMPTS, "torch.cat([nothing, losses])[order]", "torch.cat([nothing, losses])", f"{TESTS} -k whole_documents"),
    # Prompts that are not worth their states are shared.
    Bug(PROMPTS, "length if length >= least else 0", "length", f"{TESTS} -k worth"),
    # Prompts are computed twice.
    Bug(
        "src/rwkv_bone/training/module.py",
        "batch.answers.members == 2 and batch.cu_seqlens is not None",
        "batch.answers.members == 1 and batch.cu_seqlens is not None",
        f"{TESTS} -k a_run_that_shares",
    ),
)
