"""`BoneConfig` in the hands of peft's own `get_peft_model`, and of TRL's `SFTTrainer`."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.hf import BoneConfig, BoneModel, MissConfig, get_bone_model
from tests.hf.conftest import fill

peft = pytest.importorskip("peft")

SOURCE = Path(__file__).resolve().parents[2] / "src"
MODES = ["bone", "bat-col"]


def saved_by_peft(model, base, folder) -> tuple[BoneModel, torch.nn.Module]:
    """The adapter that a PeftModel writes, loaded into `base` by us and by peft."""
    model.save_pretrained(folder)
    ours = BoneModel.from_pretrained(copy.deepcopy(base), folder)
    return ours, peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_one_of_pefts_and_stays_a_bone_config(mode):
    config = BoneConfig(r=8, target_modules=["q_proj"], mode=mode, task_type="CAUSAL_LM")
    assert isinstance(config, peft.MissConfig) and isinstance(config, BoneConfig) and MissConfig is BoneConfig
    assert config.peft_type is peft.PeftType.MISS
    theirs = peft.MissConfig(**config.to_dict())  # which knows every key
    assert theirs.init_weights == ("bat" if mode == "bat-col" else True) and theirs.r == 8
    others = (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config))
    assert all(other == config and type(other) is type(config) for other in others)
    assert dataclasses.replace(config, r=4).r == 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], "all-linear", "All-Linear", r".*layers\.0.*[qv]_proj", None]
)
def test_pefts_get_peft_model_builds_what_ours_does(make_model, ids, tmp_path, mode, targets):
    base = make_model("llama")
    config = BoneConfig(r=8, target_modules=targets, mode=mode, task_type="CAUSAL_LM")
    ours = get_bone_model(copy.deepcopy(base), config)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    expected = fill(theirs).eval()(ids).logits
    assert (expected - base(ids).logits).norm() > 0.05 * expected.norm()
    for loaded in saved_by_peft(theirs, base, tmp_path):
        torch.testing.assert_close(loaded(ids).logits, expected)
    # What peft has done to the configuration does not end its use.
    again = get_bone_model(copy.deepcopy(base), config)
    assert again.bone.layers.keys() == ours.bone.layers.keys()


@pytest.mark.parametrize("mode", MODES)
def test_trls_sfttrainer_trains_and_saves_it(make_model, tokenizer, ids, tmp_path, mode):
    trl = pytest.importorskip("trl")
    base = make_model("llama")
    config = BoneConfig(r=8, mode=mode, target_modules="all-linear")
    model, losses = sft(trl, copy.deepcopy(base), tokenizer, tmp_path, config)
    assert isinstance(model, peft.PeftModel)
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    expected = model.eval()(ids).logits
    assert (expected - base(ids).logits).norm() > 0.05 * expected.norm()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(ids).logits
    ours = BoneModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(theirs, expected)
    torch.testing.assert_close(ours, expected)


def test_bat_by_rows_is_refused_as_a_peft_config_and_trained_as_a_model_of_ours(make_model, tokenizer, ids, tmp_path):
    trl = pytest.importorskip("trl")
    base = make_model("llama")
    config = BoneConfig(r=8, mode="bat-row", target_modules="all-linear")
    with pytest.raises(UserError, match="mode 'bat-row' is RWKV-PEFT's bat, which PEFT cannot build. Take mode"):
        sft(trl, copy.deepcopy(base), tokenizer, tmp_path, config)
    with pytest.raises(UserError, match="which PEFT cannot build"):
        peft.get_peft_model(copy.deepcopy(base), config)
    model, losses = sft(trl, get_bone_model(copy.deepcopy(base), config), tokenizer, tmp_path)
    assert losses[-1] < losses[0] - 0.2
    loaded = BoneModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def sft(trl, model, tokenizer, folder, peft_config=None) -> tuple[torch.nn.Module, list[float]]:
    """(the trained model, losses of 20 steps); the adapter is in folder/adapter."""
    from datasets import Dataset

    pairs = [("1 in words: ", "one"), ("2 in words: ", "two"), ("3 in words: ", "three"), ("4 in words: ", "four")]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder / "run"),
            max_steps=20,
            per_device_train_batch_size=4,
            learning_rate=0.02,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": word} for prompt, word in pairs * 4]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_without_peft_it_is_a_plain_class_with_the_same_fields_and_checks(tmp_path):
    code = (
        "import sys; sys.modules['peft'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import pickle, torch\n"
        "from torch import nn\n"
        "from rwkv_bone.hf import BoneConfig, BoneModel, get_bone_model\n"
        "config = BoneConfig(r=4, target_modules=['0'])\n"
        "assert type(config) is BoneConfig and pickle.loads(pickle.dumps(config)) == config\n"
        "assert BoneConfig(mode='bat-row').peft_type == 'RWKV_BONE_BAT'\n"
        "model = get_bone_model(nn.Sequential(nn.Linear(8, 8)), config)\n"
        "nn.init.ones_(model[0].bone)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "again = BoneModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), sys.argv[2])\n"
        "assert torch.equal(again[0].bone, model[0].bone)\n"
        "try: BoneConfig(foo=1)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, SOURCE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BoneConfig has no argument 'foo'; there are r, target_modules, ")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert peft.MissConfig(**config).r == 4


@pytest.mark.parametrize(
    "given,message",
    [
        ({"foo": 1}, "BoneConfig has no argument 'foo'; there are r, target_modules"),
        ({"target_module": ["q"]}, r"no argument 'target_module' \(did you mean target_modules\?\)"),
        ({"miss_dropout": 0.1}, "miss_dropout 0.1 is not supported, expected 0.0"),
        ({"mini_r": 4}, "mini_r 4 is not supported, expected 1"),
    ],
)
def test_arguments_of_the_configuration_that_do_not_exist_are_named(given, message):
    with pytest.raises(UserError, match=message):
        BoneConfig(**given)
    # The others of PEFT's are there, at PEFT's defaults.
    ours = {spec.name for spec in dataclasses.fields(BoneConfig)}
    theirs = {spec.name: spec.default for spec in dataclasses.fields(peft.MissConfig)}
    assert theirs.keys() - ours == {"peft_type", "peft_version"}
    BoneConfig(**{name: default for name, default in theirs.items() if name in ours})


@pytest.mark.parametrize(
    "given,message",
    [
        ({"foo": 1}, "{} has no argument 'foo'; there are model, "),
        ({"adapter": "x"}, r"{} has no argument 'adapter' \(did you mean adapter_name\?\)"),
        ({"autocast_adapter_dtype": False}, "{}: autocast_adapter_dtype False exists in PEFT only, expected True"),
        ({"revision": "main"}, "{}: revision 'main' exists in PEFT only, expected None"),
    ],
)
def test_arguments_of_the_functions_that_do_not_exist_are_named(make_model, tmp_path, given, message):
    config = BoneConfig(r=8, target_modules=["q_proj"])
    with pytest.raises(UserError, match=message.format("get_bone_model")):
        get_bone_model(make_model("llama"), config, **given)
    get_bone_model(make_model("llama"), config, low_cpu_mem_usage=True, mixed=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message.format("BoneModel.from_pretrained")):
        BoneModel.from_pretrained(make_model("llama"), tmp_path, **given)
    BoneModel.from_pretrained(make_model("llama"), tmp_path, low_cpu_mem_usage=True, config=None)


def test_fields_of_a_saved_configuration_that_are_unknown_are_named(make_model, tmp_path):
    model = peft.get_peft_model(make_model("llama"), peft.MissConfig(r=8, target_modules=["q_proj"], miss_dropout=0.1))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BoneModel.from_pretrained(make_model("llama"), tmp_path)  # every field of today's peft is known
    with pytest.warns(UserWarning, match="it was trained with miss_dropout 0.1, and here it trains without"):
        BoneModel.from_pretrained(make_model("llama"), tmp_path, is_trainable=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale": 2.0, "twist": None}))
    with pytest.warns(UserWarning, match="not known here and do nothing: scale 2.0, twist None"):
        BoneModel.from_pretrained(make_model("llama"), tmp_path)
