"""planning/heldout.py: what measurements take, from parts of one."""

import pytest
import torch

from rwkv_bone.config.flags import parse_train
from rwkv_bone.planning.heldout import Costs, TimeHeldOut
from rwkv_bone.training.heldout_sets import prepare_heldout
from rwkv_bone.training.measuring import ANSWERS, LOSSES, SAMPLES, Rhythm
from rwkv_bone.training.prepare import load_data, plan_batches


class Model:
    """Takes a millisecond a position to read and ten a token to write, by its own clock."""

    def __init__(self):
        self.now, self.device = 0.0, torch.device("cpu")

    def eval(self): ...

    def train(self): ...

    def __call__(self, ids, labels=None, state=None, return_state=False, **_):
        if labels is not None:
            self.now += 0.001 * ids.numel()
            return torch.zeros(())
        documents = ids.shape[0] if ids.shape[1] == 1 else 11
        self.now += 0.01
        return torch.zeros(documents, 256), [torch.zeros(documents)]


@pytest.fixture
def heldout(job):
    words = job.argv({"eval_split": 0.0, "eval_data": job.flags["data_file"], "eval_general": "none"})
    config = parse_train([word for word in words if word != "--typed"])
    dataset, split = load_data(config, 256, config.data)
    return prepare_heldout(config, 256, split, plan_batches(config, dataset), job.folder, print, keep=False)


def test_the_loss_takes_its_positions_times_what_one_takes(heldout, monkeypatch):
    model = Model()
    watch = TimeHeldOut(heldout, lambda: model.now)
    monkeypatch.setattr(watch, "_answers", lambda *_: 3.0)
    watch.on_train_start(None, model)
    positions = sum(len(heldout.main.dataset[i].ids) - 1 for i in range(len(heldout.main.dataset)))
    assert watch.costs.whole == pytest.approx(0.001 * positions)
    part = sum(len(heldout.main.part[i].ids) - 1 for i in range(len(heldout.main.part)))
    assert watch.costs.loss == pytest.approx(0.001 * part)
    assert (watch.costs.answers, watch.costs.samples) == (3.0, 3.0)


def test_an_answer_takes_its_longest_number_of_tokens(heldout, monkeypatch):
    from rwkv_bone.planning import heldout as module

    model = Model()

    def write(model, prompts, *, max_new, stop_id, device):
        assert stop_id is None  # else an untrained model's answers might end at once
        model.now += 0.5 + 0.01 * max_new

    monkeypatch.setattr(module, "generate", write)
    watch = TimeHeldOut(heldout, lambda: model.now)
    longest = max(len(response) for _, response in heldout.main.pairs) + 1
    watch.on_train_start(None, model)
    assert watch.costs.answers == pytest.approx(0.5 + 0.01 * longest)
    assert watch.costs.samples == pytest.approx(0.5 + 0.01 * 100)


def test_a_run_measures_at_both_ends_and_in_between():
    costs = Costs(whole=4.0, loss=1.0, answers=2.0, samples=0.5)
    for what, each in ((LOSSES, 1.0), (SAMPLES, 1.5), (ANSWERS, 3.5)):
        count, seconds = costs.in_a_run(Rhythm(10, what, ""), 30)
        assert count == 2  # after steps 10 and 20; after the last one it is an end
        assert seconds == 2 * (4.0 + 2.0 + 0.5) + 2 * each
    assert costs.in_a_run(Rhythm(0, LOSSES, ""), 30) == (0, 13.0)
