"""`transformers.Trainer` as it is, on a model with adapters."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from rwkv_bone.hf import BoneConfig, BoneModel, get_bone_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

OURS = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}


@pytest.fixture
def train(make_model, ids, tmp_path):
    base = make_model("llama")
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 20, (16, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]

    def run(name, resume=None, checkpointing=False, **options):
        """(base, trained model, losses, folder)."""
        config = BoneConfig(r=8, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
        model = get_bone_model(copy.deepcopy(base), config)
        if checkpointing:
            model.gradient_checkpointing_enable()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=4,
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            learning_rate=0.03,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return base, model, [row["loss"] for row in trainer.state.log_history if "loss" in row], tmp_path / name

    return run


def test_it_trains_saves_the_adapter_alone_and_resumes_exactly(train, ids):
    base, model, losses, folder = train("whole")
    assert losses[-1] < losses[0] - 0.1
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) == (name not in trained)
    checkpoint = folder / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir()} >= OURS
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert load_file(checkpoint / "model.safetensors").keys() == saved.keys()

    _, resumed, rest, _ = train("resumed", resume=checkpoint)
    assert rest == losses  # the log of the first three steps is the checkpoint's
    assert all(torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in model.state_dict().items())
    last = BoneModel.from_pretrained(copy.deepcopy(base), folder / "checkpoint-6")
    assert torch.equal(last(ids).logits, model.eval()(ids).logits)


def test_the_best_checkpoint_is_loaded_at_the_end(train, ids):
    base, model, _, folder = train("best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    best = BoneModel.from_pretrained(copy.deepcopy(base), folder / "checkpoint-6")
    assert torch.equal(best(ids).logits, model.eval()(ids).logits)


def test_checkpointed_activations_give_the_same_losses(train):
    assert train("checkpointed", checkpointing=True)[2] == pytest.approx(train("plain")[2], rel=1e-6)
