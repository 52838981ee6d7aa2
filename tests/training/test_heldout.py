"""What is measured before and after training, within the memory of training."""

import json

import pytest

from rwkv_bone.models import RWKV


def test_held_out_loss_is_computed_in_the_chunks_of_training(job, monkeypatch):
    """No more tokens run at once than in training, and the result is the same."""
    forward, widths = RWKV.forward, []

    def spy(self, ids, *args, labels=None, **kwargs):
        if labels is not None and not self.training:
            widths.append(ids.shape[1])
        return forward(self, ids, *args, labels=labels, **kwargs)

    monkeypatch.setattr(RWKV, "forward", spy)
    flags = {"eval_data": job.flags["data_file"], "eval_samples": 0, "epoch_steps": 1, "overwrite": 1}
    measured = {}
    for chunk in (0, 8):
        widths.clear()
        folder = job.run(f"chunk{chunk}", chunk_ctx=chunk, **flags)
        measured[chunk] = json.loads((folder / "evaluation.json").read_text())
        assert widths and (max(widths) == 8 if chunk else max(widths) > 8)
    for when in ("before", "after"):
        whole, chunked = (measured[chunk][when]["loss"] for chunk in (0, 8))
        assert chunked == pytest.approx(whole, rel=1e-5)
