"""One training step by itself: what the gradient of a micro-batch is scaled by, and what is trained at all."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config import ModelConfig, OptimConfig
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import Batch
from rwkv_bone.models import NOTHING, build
from rwkv_bone.training.gather import gather
from rwkv_bone.training.module import ASKS, TrainingModule
from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
from rwkv_bone.training.prepare import prepare_model
from tests.conftest import random_model


@pytest.mark.parametrize(("world", "accumulate", "trained"), [(1, 1, 777), (3, 1, 3077), (2, 5, 999)])
def test_the_head_is_told_the_factor_that_its_loss_is_multiplied_by(world, accumulate, trained):
    """The head can then round its gradient once."""
    told, made = [], []

    def model(ids, *, labels, loss_scale, **_):
        told.append(loss_scale)
        made.append(torch.tensor(5.0, requires_grad=True))
        return made[-1]

    ids = torch.arange(24).view(2, 12)
    batch = Batch(ids, ids, torch.arange(24), [], 24, trained, 12)
    module = SimpleNamespace(
        plan=SimpleNamespace(accumulate=accumulate, world_size=world),
        config=OptimConfig(),
        running=ModelConfig("base.pth"),
        recompute=NOTHING,
        objective=None,
        first_step=0,
        global_rank=0,
        device=torch.device("cpu"),
        model=model,
        _table=torch.zeros(world, accumulate + 2 + len(ASKS), dtype=torch.float64),
    )
    module._loss = lambda *arguments: TrainingModule._loss(module, *arguments)
    module._run = lambda *arguments, **options: TrainingModule._run(module, *arguments, **options)
    for micro in range(accumulate):
        TrainingModule.training_step(module, batch, micro).backward()
    for factor, loss in zip(told, made, strict=True):
        assert factor == world / trained
        assert loss.grad == pytest.approx(factor, rel=2e-7)


def test_gathered_tensors_are_copies_that_a_later_step_does_not_change():
    model = random_model()
    state = gather(model.named_parameters(), keep=True)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    assert gather(model.named_parameters(), keep=False) == {}


def layer_0_with_values(path, dtype=torch.bfloat16):
    """A checkpoint whose layer 0 has the v0, v1, v2 that nothing reads."""
    arch = replace(random_model().arch, v_in_layer0=True)
    model = build(arch)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(p.shape, generator=generator).to(dtype) / 8 for key, p in model.state_dict().items()}
    checkpoints.write_state(path, state)
    return state


@pytest.mark.parametrize("flags", [["--peft", "none"], ["--peft", "bone", "--train_parts", "time", "--bone_r", "8"]])
def test_what_no_layer_reads_is_not_trained_and_keeps_every_bit(tmp_path, flags):
    """v0, v1 and v2 of layer 0: a step with weight decay or with momentum would change them all the same."""
    state = layer_0_with_values(tmp_path / "base.pth")
    unused = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
    argv = ["--load_model", str(tmp_path / "base.pth"), "--proj_dir", str(tmp_path / "out"), "--data_file", "x.jsonl"]
    config = parse_train([*argv, *flags, "--op", "torch", "--precision", "fp32"])
    prepared = prepare_model(config, torch.device("cpu"))
    model = prepared.model
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & unused and {key.replace(".0.", ".1.") for key in unused} <= trained
    optimizer = make_optimizer(parameter_groups(model, 0.5), OptimConfig())
    placed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(ids, labels=ids).backward()
        optimizer.step()
    for key in unused:
        parameter = model.get_parameter(key)
        assert parameter.grad is None and id(parameter) not in placed
        assert torch.equal(parameter.float(), state[key].float())
    written = set(prepared.output.keys)
    assert unused <= written if "none" in flags else not unused & written
