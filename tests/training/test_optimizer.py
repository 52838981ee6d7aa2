"""Parameter groups: every trained parameter once, decay on large matrices only, the decay bias w0 at twice the rate."""

import pytest
import torch

from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.config import ModelConfig, OptimConfig
from rwkv_bone.models import architecture_from_scratch, build, init_from_scratch
from rwkv_bone.training import optimizer as optimizer_file
from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
from tests.conftest import random_model
from tests.training.conftest import log_of

# What RWKV-LM trains how (its default, --layerwise_lr 1), for every key of every generation: a multiple of the learning
# rate, and whether weight decay acts. `{}` is the layer; layer 0 alone has ln0. A state is RWKV-LM's `time_state`.
OUTSIDE = {"1x": "ln_out.weight ln_out.bias", "decay": "emb.weight head.weight"}
NORMS = "ln0.weight ln0.bias ln1.weight ln1.bias ln2.weight ln2.bias att.ln_x.weight att.ln_x.bias"
ATTENTION = "att.receptance.weight att.key.weight att.value.weight att.output.weight att.time_state"
GATED = f"{ATTENTION} att.gate.weight ffn.key.weight ffn.receptance.weight ffn.value.weight"
UPSTREAM = {
    5: {
        "1x": f"{NORMS} att.time_mix_k att.time_mix_v att.time_mix_r att.time_mix_g att.time_faaaa "
        "ffn.time_mix_k ffn.time_mix_r",
        "2x": "att.time_decay",
        "decay": GATED,
    },
    6: {
        "1x": f"{NORMS} att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r att.time_maa_g "
        "att.time_maa_w1 att.time_maa_w2 att.time_decay_w1 att.time_decay_w2 att.time_faaaa "
        "ffn.time_maa_k ffn.time_maa_r",
        "2x": "att.time_decay",
        "decay": GATED,
    },
    7: {
        "1x": f"{NORMS} att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.w1 att.w2 att.a0 att.a1 att.a2 "
        "att.v0 att.v1 att.v2 att.g1 att.g2 att.k_k att.k_a att.r_k ffn.x_k",
        "2x": "att.w0",
        "decay": f"{ATTENTION} ffn.key.weight ffn.value.weight",
    },
}
MULTIPLES = {"1x": (1.0, 0.0), "2x": (2.0, 0.0), "decay": (1.0, 0.1)}


@pytest.fixture
def model():
    made = build(architecture_from_scratch(ModelConfig(n_layer=2, n_embd=32, vocab_size=61, head_size=16)), op="torch")
    init_from_scratch(made, 0)
    return made


def placement(model, weight_decay=0.1, **options) -> dict[str, tuple[float, float]]:
    """{parameter name: (multiple of the learning rate, weight decay)}"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay, **options)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_full_training_places_every_parameter_once(model):
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert set(placement(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("version", UPSTREAM)
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_every_key_of_every_generation_is_trained_as_upstream_trains_it(version, weight_decay):
    model = random_model(version=version, n_layer=3)
    model.add_time_state()
    expected = {name: MULTIPLES[how] for how, names in OUTSIDE.items() for name in names.split()}
    for layer in range(3):
        for how, names in UPSTREAM[version].items():
            expected |= {f"blocks.{layer}.{name}": MULTIPLES[how] for name in names.split()}
    for name in ("ln0.weight", "ln0.bias"):
        del expected[f"blocks.1.{name}"], expected[f"blocks.2.{name}"]
    if version == 7:
        for name in ("v0", "v1", "v2"):
            del expected[f"blocks.0.att.{name}"]
    if not weight_decay:
        expected = {name: (multiple, 0.0) for name, (multiple, _) in expected.items()}
    assert placement(model, weight_decay) == expected


def test_only_w0_learns_at_twice_the_rate(model):
    doubled = {name for name, (scale, _) in placement(model).items() if scale != 1.0}
    assert doubled == {"blocks.0.att.w0", "blocks.1.att.w0"}
    assert all(placement(model)[name][0] == 2.0 for name in doubled)


def test_only_projections_embedding_and_head_decay(model):
    decayed = {name for name, (_, decay) in placement(model).items() if decay}
    projections = {
        f"blocks.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    }
    assert decayed == projections | {"emb.weight", "head.weight"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_decay_and_frozen_parameters_are_in_no_group(model, kind):
    inject(model, settings=AdapterSettings(kind, 8))
    placed = placement(model)
    own = {f".{name}" for name in ADAPTERS[kind].parameter_names}
    assert placed and {name[name.rindex(".") :] for name in placed} == own
    assert set(placed.values()) == {(1.0, 0.1)}


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_with_lora_plus_b_learns_faster_than_a_and_nothing_else_does(model, kind):
    inject(model, settings=AdapterSettings(kind, 4), train_parts=["time"])
    placed = placement(model, lora_plus=16.0)
    assert {rate for name, (rate, _) in placed.items() if name.endswith("lora_B")} == {16.0}
    others = {name: rate for name, (rate, _) in placed.items() if not name.endswith("lora_B")}
    assert {rate for name, rate in others.items() if not name.endswith("w0")} == {1.0}
    assert sum(name.endswith("lora_A") for name in others) == 12


def test_the_optimiser_is_adamw_with_the_configured_numbers(model):
    config = OptimConfig(beta1=0.8, beta2=0.95, adam_eps=1e-7)
    optimizer = make_optimizer(parameter_groups(model, 0.0), config)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["eps"] == 1e-7


def test_our_adamw_takes_the_steps_of_pytorchs(model):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizers = [
        make_optimizer([{"params": [ours], "lr": 0.1, "weight_decay": 0.1}], OptimConfig()),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=OptimConfig().adam_eps),
    ]
    hooked = []
    optimizers[0].register_step_pre_hook(lambda *_: hooked.append(ours.detach().clone()))
    assert optimizers[0].defaults["betas"] == (0.9, 0.99)
    for number in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.arange(7.0) * (number - 1.5)
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-7) and len(hooked) == 3
    assert torch.equal(hooked[0], torch.linspace(-1, 1, 7))


def test_each_step_is_taken_at_the_rate_of_the_schedule_times_the_factor_of_the_group(job, monkeypatch):
    taken, step = [], optimizer_file.AdamW.step

    def look(self, *arguments):
        taken.append({group["lr"] for group in self.param_groups})
        return step(self, *arguments)

    monkeypatch.setattr(optimizer_file.AdamW, "step", look)
    folder = job.run("rates", peft="none", lr_schedule="linear", micro_bsz=2, accumulate_grad_batches=2)
    rates = [line["lr"] for line in log_of(folder)]
    assert taken == [{rate, 2 * rate} for rate in rates] and rates == pytest.approx([1e-2, 5.5e-3, 1e-3])
