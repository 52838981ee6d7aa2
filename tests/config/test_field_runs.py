"""Scripts as a user of RWKV-PEFT or RWKV-LM has them run in a checkout of this repository: training, then the merge.

Each is written here from the flags of such a script. Sizes, paths and the device are those of a tiny model on a
processor; all else is as it stands there: unquoted variables, JSON in single quotes, a line continued into nothing.
"""

import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from tests.conftest import REPOSITORY, adapter_state, clean_environment, random_model

MERGES = ("merge", "merge_bone", "merge_disha", "merge_lora", "merge_pissa", "merge_state")
TEXTS = [b"one and two", b"three and four", b"five and six and seven", b"eight and nine", b"ten and eleven", b"twelve"]


def write_binidx(path: Path) -> None:
    """Token ids of bytes in Megatron's format, each document ended by token 0."""
    documents = [[*text, 0] for text in TEXTS]
    lengths = [len(document) for document in documents]
    starts = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    count = len(documents)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    index += struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *starts, *range(count + 1))
    path.with_suffix(".idx").write_bytes(index)
    path.with_suffix(".bin").write_bytes(np.array(sum(documents, []), dtype=np.uint16).tobytes())


@dataclass
class Checkout:
    """A folder with the programs of the repository, a `python` on PATH, models and data."""

    root: Path

    def __post_init__(self):
        for name in ("train.py", "merge.py"):
            shutil.copy(REPOSITORY / name, self.root)
        shutil.copytree(REPOSITORY / "merge", self.root / "merge", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "src").symlink_to(REPOSITORY / "src")
        (self.root / "bin").mkdir()
        (self.root / "bin" / "python").symlink_to(sys.executable)
        for version in (6, 7):
            model = random_model(version=version, vocab_size=256, dtype=torch.bfloat16)
            checkpoints.write_state(self.root / f"v{version}.pth", model.state_dict())
        write_binidx(self.root / "tokens")
        rows = [{"query": text.decode(), "response": text.decode()[::-1]} for text in TEXTS]
        (self.root / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sh(self, script: str, status: int = 0) -> str:
        """What a script prints, on both streams."""
        (self.root / "mine.sh").write_text(script)
        # A virtual environment finds its packages by the path of its Python, which is a link here.
        packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
        environment = clean_environment() | {
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": packages,
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["sh", "mine.sh"],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout
        return done.stdout


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# --- the programs that merge, on files as RWKV-PEFT writes them, which have no metadata ---


def write_adapter(folder: Path, kind: str, **settings) -> dict[str, Path]:
    model = random_model(version=6, vocab_size=256)
    checkpoints.write_state(folder / "base.pth", model.state_dict())
    inject(model, settings=AdapterSettings(kind, 0 if kind == "state" else 8, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    state = adapter_state(model)
    first = {key: tensor for key, tensor in state.items() if ".init_lora_" in key}
    if first:
        checkpoints.write_state(folder / "init_pissa.pth", first)
    checkpoints.write_state(folder / "rwkv-0.pth", {key: state[key] for key in state.keys() - first.keys()})
    return {"base": folder / "base.pth", "adapter": folder / "rwkv-0.pth", "init": folder / "init_pissa.pth"}


NAMED = "--base_model {base} --lora_checkpoint {adapter} --output {out}"


@pytest.mark.parametrize(
    ("program", "words", "kind"),
    [
        ("merge_bone", NAMED, "bone"),
        ("merge_bone", f"{NAMED} --quant none --device cpu", "bat"),
        ("merge_disha", NAMED.replace("lora_checkpoint", "peft_checkpoint"), "bone"),
        ("merge", f"{NAMED} --type bone", "bone"),
        ("merge", f"{NAMED} --type lora --lora_alpha 16", "lora"),
        ("merge", f"--lora_init {{init}} {NAMED} --type pissa", "pissa"),
        ("merge", f"--lora_init {{init}} {NAMED}", "pissa"),
        ("merge_lora", f"{NAMED} --lora_alpha 16", "lora"),
        ("merge_lora", "16 {base} {adapter} {out}", "lora"),
        ("merge_lora", "--use-gpu 16 {base} {adapter} {out}", "lora"),
        ("merge_pissa", "{base} {init} {adapter} {out}", "pissa"),
        ("merge_pissa", "--use-gpu {base} {init} {adapter} {out}", "pissa"),
        ("merge_state", NAMED.replace("lora_checkpoint", "state_checkpoint"), "state"),
        ("merge_state", NAMED, "state"),
        ("../merge", NAMED.replace("lora_checkpoint", "state_checkpoint"), "state"),
    ],
)
def test_the_fields_programs_merge_what_merge_py_merges(program, words, kind, tmp_path, monkeypatch, capsys):
    files = write_adapter(tmp_path, kind, **({"alpha": 16.0} if kind == "lora" else {}))
    expected, found = tmp_path / "expected.pth", tmp_path / "found.pth"
    about = {"lora": {"lora_alpha": 16.0}, "pissa": {"pissa_init": str(files["init"])}}.get(kind, {})
    merge_files(MergeConfig(str(files["base"]), str(files["adapter"]), str(expected), peft=kind, **about))
    argv = words.format(**files, out=found).split()
    monkeypatch.setattr(sys, "argv", [f"merge/{program}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "merge" / f"{program}.py"), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
    found, expected, base = map(checkpoints.read_state, (found, expected, files["base"]))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert any(key not in base or not torch.equal(found[key], base[key]) for key in found)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (
            "merge_lora",
            "16 base.pth adapter.pth",
            "expected 4 arguments, lora_alpha, base_model, lora_checkpoint, output",
        ),
        ("merge_bone", "base.pth adapter.pth out.pth", "base.pth is not a flag of merge/merge_bone.py"),
        ("merge_state", "--base_model b --state_checkpoint a --peft_checkpoint c --output o", "contradicts --state"),
        ("merge_pissa", "--base_model b --lora_checkpoint a --output o --type dora", "--type dora: expected lora"),
        ("merge_lora", "--base_model b --lora_checkpoint a --output o --peft bat --type lora", "contradicts --type"),
        ("merge_state", "--output o", "--base_model is missing"),
    ],
)
def test_mistakes_in_the_fields_programs_are_named(program, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"merge/{program}.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "merge" / f"{program}.py"), run_name="__main__")
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_folder_merge_hides_neither_merge_py_nor_a_program():
    assert {path.stem for path in (REPOSITORY / "merge").glob("*")} - {"__pycache__"} == {*MERGES}
    code = "import merge; print(merge.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == REPOSITORY / "merge.py"


# --- whole scripts ---

HEAD = """load_model={base}
proj_dir='out/mine'
data_file={data}

n_layer=2
n_embd=32

micro_bsz=2
epoch_save=1
epoch_steps=3
ctx_len=32
{variables}

"""
ADAM = "--warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8"
TRAIN = (
    r"""python train.py --load_model $load_model \
--proj_dir $proj_dir --data_file $data_file \
--vocab_size 256 \
--n_layer $n_layer --n_embd $n_embd \
{reading} \
--ctx_len $ctx_len --micro_bsz $micro_bsz \
--epoch_steps $epoch_steps --epoch_count 2 {epochs} --epoch_save $epoch_save \
--lr_init {rate} --lr_final {rate} """
    + ADAM
    + r""" \
--accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 \
--my_testing "{version}" \
{adapter}
"""
)
MERGE = r"""
base_model={base}
peft_checkpoint='out/mine/rwkv-1.pth'
pissa_init='out/mine/init_pissa.pth'
output='out/merged.pth'

python merge/{program}.py --base_model $base_model \
{words} \
--output $output \

"""
BINIDX = "--data_type binidx --dataload pad --loss_mask pad"
SFT = '--data_type sft --sft_field query response --sft_split "train"'
CHECKPOINT = "--lora_checkpoint $peft_checkpoint"


@dataclass
class Script:
    """What differs between scripts. program, merge: of the merge, none if what is trained is a whole model."""

    adapter: str
    variables: str = ""
    program: str = ""
    merge: str = CHECKPOINT
    version: str = "x060"
    reading: str = BINIDX
    rate: str = "2e-3"
    epochs: str = "--epoch_begin 0"
    says: tuple[str, ...] = ()
    steps: int = 6

    def text(self) -> str:
        data = "'rows.json'" if self.reading == SFT else "'tokens'"
        base = f"'v{self.version[2]}.pth'"
        fill = {"base": base, "data": data, "words": self.merge, **vars(self)}
        return (HEAD + TRAIN + (MERGE if self.program else "")).format(**fill)


LORA = """lora_config='{"lora_load":"","lora_r":4,"lora_alpha":8,"lora_dropout":0.0}'"""
PISSA = """pissa_config='{"pissa_load":"","pissa_init":"","pissa_r":4,"svd_niter":4}'"""
SAMPLES = "is read as --sft_split [:3]"
SCRIPTS = {
    "bone of 2024": Script(
        "--peft bone --bone_config $bone_config",
        """bone_config='{"bone_mode":"bone","bone_load":"","bone_r":8}'""",
        "merge_bone",
        says=("without --train_parts only the adapter",),
    ),
    "bat of 2024, rows, int8": Script(
        "--peft bone --bone_config $bone_config --train_parts ln time --quant int8",
        """bone_config='{"bone_mode":"bat","bone_load":"","bone_r":8}'""",
        "merge_bone",
        f"{CHECKPOINT} --quant int8",
        reading=SFT,
        says=("--template alpaca", "quant     int8"),
    ),
    "lora of 2024": Script(
        "--peft lora --lora_config $lora_config", LORA, "merge", f"{CHECKPOINT} --type lora --lora_alpha 8"
    ),
    "pissa of 2024": Script(
        "--peft pissa --pissa_config $pissa_config",
        PISSA,
        "merge",
        f"--lora_init $pissa_init {CHECKPOINT} --type pissa",
        says=("init_pissa.pth is ignored: no such file",),
    ),
    "state of 2024": Script(
        '--train_type "state"  --dataload pad --fla',
        program="merge_state",
        merge="--state_checkpoint $peft_checkpoint",
        rate="1e-1",
        says=("state tuning is --peft state here",),
    ),
    "every weight, 2024": Script("", says=("without --peft trains every weight",)),
    "lora of 2023": Script(
        "--lora_load rwkv-0 --lora --lora_r 4 --lora_alpha 8 --lora_dropout 0.0 --lora_parts=att,ffn,time,ln",
        program="merge_lora",
        merge="--lora_checkpoint $peft_checkpoint --lora_alpha 8",
        says=("--lora is read as --peft lora --targets att ffn --train_parts time ln",),
    ),
    "disha of 2025": Script(
        "--peft disha --disha_config $disha_config",
        """disha_config='{"mode":"bone","load":"","r":8}'""",
        "merge_disha",
        "--peft_checkpoint $peft_checkpoint",
        "x070",
    ),
    "state of 2025": Script(
        '--train_type "state"  --dataload pad --op fla',
        program="merge_state",
        merge="--state_checkpoint $peft_checkpoint",
        version="x070",
        rate="1e-1",
    ),
    "every weight, 2025": Script("--lr_schedule cos", version="x070", reading=SFT, says=("trains every weight",)),
    "miss of 2026": Script(
        "--peft miss --peft_config $peft_config",
        """peft_config='{"r":8}'""",
        "merge_disha",
        version="x070",
        reading="--data_type binidx",
        epochs="",
        says=(SAMPLES, "pads each document: --dataload pad"),
        steps=-1,
    ),
    "lora of 2026": Script(
        "--peft lora --peft_config $peft_config",
        """peft_config='{"r":4,"lora_alpha":8,"lora_dropout":0.05,"target_modules":["receptance","key"]}'""",
        "merge",
        f"{CHECKPOINT} --type lora",
        version="x070",
        reading="--data_type binidx --dataload pad",
        epochs="",
        says=(SAMPLES,),
        steps=-1,
    ),
    "state of 2026": Script(
        "--peft state --op fla",
        program="merge_state",
        merge="--state_checkpoint $peft_checkpoint",
        version="x070",
        rate="1e-1",
        reading="--data_type binidx --dataload pad",
        epochs="",
        says=(SAMPLES,),
        steps=4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_the_field_trains_and_merges(name, checkout):
    script = SCRIPTS[name]
    said = checkout.sh(script.text())
    for text in script.says:
        assert text in said
    log = (checkout.root / "out" / "mine" / "train_log.jsonl").read_text().splitlines()
    assert len(log) == script.steps or script.steps == -1
    base = checkpoints.read_state(checkout.root / f"v{script.version[2]}.pth")
    trained = checkpoints.read_state(checkout.root / "out" / "mine" / "rwkv-1.pth")
    merged = checkpoints.read_state(checkout.root / "out" / "merged.pth") if script.program else trained
    changed = {key for key in merged if key not in base or not torch.equal(merged[key].float(), base[key].float())}
    states = {f"blocks.{layer}.att.time_state" for layer in range(2)}
    assert merged.keys() - base.keys() == (states if "state" in name else set()) and base.keys() <= merged.keys()
    if "state" in name:
        assert changed == states
    elif "every weight" in name:
        # Which of them moves in bf16 after six steps of this size is another matter.
        assert {"emb.weight", "head.weight", "blocks.0.att.key.weight", "blocks.1.ffn.value.weight"} <= changed
        assert len(changed) > len(merged) / 2
    else:
        adapted = {key for key in base if key.endswith(("receptance.weight", "key.weight"))}
        assert adapted <= changed and not changed & {"emb.weight", "head.weight"}
        assert any(".ln" in key or "time" in key for key in changed) == (
            "train_parts" in script.adapter or "2023" in name
        )


NEW = r"""proj_dir='out/mine'
data_file={data}

python train.py {base} \
--proj_dir $proj_dir --data_file $data_file \
--vocab_size 256 --n_layer 1 --n_embd 64 --my_testing "x070" \
--ctx_len 16 --micro_bsz 2 {length} --epoch_begin 0 --epoch_save 1 \
--lr_init 3e-4 --lr_final 1e-4 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
--accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 \
{reading}
"""


@pytest.mark.slow
def test_a_script_for_pretraining_trains_a_new_model(checkout):
    script = NEW.format(
        data="'rows.json'", base="", length="--epoch_steps 1 --epoch_count 3", reading=f"{SFT} --max_lost 1"
    )
    said = checkout.sh(script)
    assert "without --peft trains every weight" in said
    assert {path.name for path in (checkout.root / "out" / "mine").glob("rwkv-*.pth")} == {
        f"rwkv-{epoch}.pth" for epoch in range(3)
    }
    state = checkpoints.read_state(checkout.root / "out" / "mine" / "rwkv-2.pth")
    assert state["emb.weight"].shape == (256, 64) and "blocks.0.att.w1" in state


@pytest.mark.slow
def test_rwkv_lms_two_scripts_are_one_command_here_and_go_on_from_its_init_file(checkout):
    length = "--epoch_count 999999 --my_exit_tokens 96 --magic_prime 5"
    fill = {"data": "'tokens'", "length": length}
    stage = "--data_type binidx --train_stage {} --head_size 64 --head_chunk 0 --kernel @rwkv3"
    said = checkout.sh(NEW.format(**fill, base='--wandb ""', reading=stage.format(1)), status=2)
    assert "--train_stage 1 only makes new weights" in said
    results = checkout.root / "out" / "mine"
    results.mkdir(parents=True, exist_ok=True)
    first = random_model(n_layer=1, n_embd=64, head_size=64, vocab_size=256, dtype=torch.bfloat16).state_dict()
    checkpoints.write_state(results / "rwkv-init.pth", first)
    said = checkout.sh(NEW.format(**fill, base='--load_model "0"', reading=stage.format(3)))
    assert "is read as --load_model out/mine/rwkv-init.pth" in said and "one epoch of 3 steps of 32 tokens" in said
    trained = checkpoints.read_state(results / "rwkv-0.pth")
    assert trained.keys() == first.keys() == checkpoints.read_state(results / "rwkv-init.pth").keys()
    assert not torch.equal(trained["head.weight"], first["head.weight"])
    said = checkout.sh(NEW.format(**fill, base='--load_model "0"', reading=stage.format(3)))
    assert "the run in out/mine is complete: 3 of 3 optimiser steps" in said
