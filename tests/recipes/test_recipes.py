"""recipes/: what their headers promise, how flags reach the programs, and every one end to end on a few rows."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

from rwkv_bone.adapters import AdapterSettings, inject, settings_of
from rwkv_bone.config import ModelConfig
from rwkv_bone.config.flags import SECTIONS, parse_train
from rwkv_bone.config.preferences import PAIRED
from rwkv_bone.hf.flags import HfConfig
from rwkv_bone.models import EVERY_BLOCK, NOTHING, Recompute, architecture_from_scratch, build
from rwkv_bone.training.memory import GB, Run, count, needs
from tests.conftest import REPOSITORY, clean_environment
from tests.nvidia import write_program

RECIPES = sorted(path for path in (REPOSITORY / "recipes").glob("*.sh") if path.name != "lib.sh")
NAMES = [path.stem for path in RECIPES]
LIB = (REPOSITORY / "recipes" / "lib.sh").read_text(encoding="utf-8")
OWN = set(re.search(r"^own='(.*)'", LIB, re.MULTILINE)[1].split())
TRAIN = {spec.name for section in SECTIONS.values() for spec in fields(section)}
SIZES = {"0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560), "7.2B": (32, 4096), "13.3B": (61, 4096)}
AGAIN = {"0": NOTHING, "wkv": Recompute(wkv=True), "1": EVERY_BLOCK}


def text_of(name: str) -> str:
    return (REPOSITORY / "recipes" / f"{name}.sh").read_text(encoding="utf-8")


def header(name: str) -> str:
    """The comment at the top, as one text without line breaks inside its paragraphs."""
    lines = text_of(name).split("# shellcheck disable")[0].splitlines()[1:]
    return re.sub(r"\n#   (?! *[\d.]+ GB)", " ", "\n".join(lines))


def settings(name: str) -> dict[str, str]:
    """name -> the rest of its line, of the variables at the top."""
    return dict(re.findall(r"^([a-z]\w*)=(.*)$", text_of(name).split("\nrepo=")[0], re.MULTILINE))


@cache
def counted(size: str, adapter: AdapterSettings | None):
    """A released model's architecture, and a model of it with this adapter (None: every weight is trained), counted."""
    layers, width = SIZES[size]
    arch = architecture_from_scratch(ModelConfig(n_layer=layers, n_embd=width, vocab_size=65536))
    with torch.device("meta"):
        model = build(arch)
        if adapter:
            inject(model, settings=adapter)
    return arch, count(model)


def planned(size: str, flags: str):
    """What the plan computes memory from, for a run with these flags of train.py: config, architecture, counts."""
    config = parse_train(["--load_model", "m.pth", "--data_file", "d.jsonl", *flags.split()])
    return config, *counted(size, settings_of(config.adapter) if config.adapter.kind != "none" else None)


MEMORY = [
    pytest.param(found[1], found[2], found[3], id=f"{name}-{found[2]}-{found[1]}")
    for name in NAMES
    for found in re.finditer(r"^#\s+([\d.]+) GB: ([\d.]+B), (--.*)$", text_of(name), re.MULTILINE)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_cost_memory_what_to_expect_and_where_that_comes_from(name):
    found = header(name)
    for key in ("cost", "memory", "expected", "source", "data"):
        assert re.search(rf"^# {key}( \[\w+\])?: .{{8,}}", found, re.MULTILINE), key
    assert re.search(r"^# expected( \[published\]: .*|: .*no published number.*)", found, re.MULTILINE | re.IGNORECASE)
    assert re.search(r"^# cost \[estimate\]: .*\d hours.*\$\d|^# cost \[estimate\]: .*minutes.*\$", found, re.MULTILINE)
    assert text_of(name).splitlines()[1].endswith(f": sh recipes/{name}.sh [--flag value ...]")
    assert max(map(len, text_of(name).splitlines())) <= 120
    assert os.access(REPOSITORY / "recipes" / f"{name}.sh", os.X_OK)


@pytest.mark.parametrize("gigabytes, size, flags", MEMORY)
def test_memory_in_a_header_is_what_the_plan_computes_for_a_card(gigabytes, size, flags):
    config, arch, counts = planned(size, flags)
    data, model = config.data, config.model
    again, members = AGAIN[model.grad_cp], 2 if data.task in PAIRED else 1
    run = Run(data.ctx_len, data.micro_bsz, model.quant, again, chunk_ctx=model.chunk_ctx, members=members)
    assert f"{needs(arch, counts, run).card / GB:.1f}" == gigabytes


@pytest.mark.parametrize("name", [name for name in NAMES if "# size [plan]" in text_of(name)])
def test_the_number_of_trained_parameters_in_a_header_is_counted(name):
    millions, size = re.search(r"trains? ([\d.]+) M parameters of a ([\d.]+B)", header(name)).groups()
    first = next(param.values[2] for param in MEMORY if param.id.startswith(f"{name}-{size}"))
    assert f"{planned(size, first)[2].trained / 1e6:.1f}" == millions


def methods() -> dict[str, str]:
    """method -> its flags, of recipes/lib.sh."""
    return dict(re.findall(r"^ +(\w+)\) _adapter='(.*?)'", LIB, re.MULTILINE))


@pytest.mark.parametrize("size", ["0.4B", "2.9B"])
def test_the_five_methods_train_equally_many_parameters(size):
    trained = {name: planned(size, flags)[2].trained for name, flags in methods().items()}
    assert list(trained) == ["lora", "rslora", "pissa", "bone", "bat"] == text_methods()
    layers, width = SIZES[size]
    # 64 rows of a block of each output (ffn.key has 4 C), or rank 32 of inputs and outputs: 18 C.
    assert set(trained.values()) == {64 * 9 * width * layers} == {32 * 18 * width * layers}


def test_the_page_lists_every_recipe_with_the_cost_of_its_header():
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)\.sh` \| (.*) \|$", page, re.MULTILINE))
    assert sorted(rows) == NAMES
    for name, row in rows.items():
        (cost,) = re.findall(r"^# cost \[estimate\]: (.*)$", header(name), re.MULTILINE)
        assert f"sh recipes/{name}.sh" in row
        # The last sum of the header is what comes out of its rate.
        assert re.findall(r"\$[\d.]*\d", row) == re.findall(r"\$[\d.]*\d", cost)[-1:]


def text_methods() -> list[str]:
    return re.search(r"^methods='(.*?)'", text_of("metamath_gsm8k"), re.MULTILINE)[1].split()


def test_the_papers_settings_are_those_of_the_recipe():
    found = {name: rest.split("#")[0].strip() for name, rest in settings("metamath_gsm8k").items()}
    assert float(found["lr_init"]) == 2e-5 and float(found["lr_final"]) == 0 and int(found["warmup_steps"]) == 0
    assert int(found["micro_bsz"]) * int(found["accumulate_grad_batches"]) == 64 and found["dataload"] == "pad"
    assert int(found["epoch_count"]) == 1 and "lr_schedule" not in found  # whose default is the cosine


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_is_a_setting_with_a_line_of_meaning(name):
    known = OWN | ({spec.name for spec in fields(HfConfig)} if name == "huggingface_llama" else TRAIN)
    for variable, rest in settings(name).items():
        assert variable in known
        assert re.search(r" # \w.+", rest), f"{variable} has no comment"


def test_recipes_have_the_frame_of_the_scripts():
    def frame(text: str) -> tuple[str, str]:
        begin = re.search(r"^set -eu.*\n.*\n", text, re.MULTILINE)[0]
        return begin, text.split("\nrepo=", 1)[1].split("# shellcheck source-path")[0]

    script = frame((REPOSITORY / "scripts" / "run_bone.sh").read_text(encoding="utf-8"))
    assert {frame(text_of(name)) for name in NAMES} == {script}


@pytest.fixture
def programs(tmp_path):
    """A function: a recipe with flags, in a folder of its own, with a Python that writes down what it is asked for."""
    log = tmp_path / "calls.jsonl"
    echo = f"import json, sys; open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
    write_program(tmp_path / "python", f'exec "{sys.executable}" -c "{echo}" "$@"')

    def run(name: str, *flags: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        log.unlink(missing_ok=True)
        result = subprocess.run(
            ["sh", REPOSITORY / "recipes" / f"{name}.sh", *flags],
            cwd=tmp_path,
            env=clean_environment() | {"RWKV_PYTHON": str(tmp_path / "python")},
            capture_output=True,
            text=True,
        )
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return result, calls

    return run


def test_what_is_typed_reaches_training_and_the_other_steps(programs, tmp_path):
    (tmp_path / "mine.pth").touch()
    flags = [
        "--load_model",
        "mine.pth",
        "--output=here",
        "--epoch_count",
        "3",
        "--beta1",
        "0.8",
        "--data_file",
        "a",
        "b",
    ]
    result, (train, merge, chat) = programs("chat_g1", *flags)
    assert result.returncode == 0, result.stderr
    model = str(tmp_path / "mine.pth")
    assert f"--load_model={model}" in train and "--output=here" not in train
    assert train[train.index("--proj_dir") + 1] == f"{tmp_path}/here/train"
    assert train[-7:] == ["--epoch_count", "3", "--beta1", "0.8", "--data_file", "a", "b"]
    assert merge[merge.index("--base_model") + 1] == model
    assert merge[merge.index("--peft_checkpoint") + 1] == f"{tmp_path}/here/train/rwkv-2.pth"
    assert chat[:2] == ["-m", "rwkv_bone.chat.main"] and "--typed" in chat


def test_a_plan_asks_for_the_plan_of_every_method_and_does_nothing_else(programs, tmp_path):
    (tmp_path / "mine.pth").touch()
    result, calls = programs("metamath_gsm8k", "--load_model", "mine.pth", "--plan", "1", "--methods", "lora", "bat")
    assert result.returncode == 0, result.stderr
    assert [Path(call[0]).name for call in calls] == ["train.py", "train.py"]
    for call, method in zip(calls, ("lora", "bat"), strict=True):
        given = call[call.index("--typed") :]
        assert given[1:5] == ["--proj_dir", f"{REPOSITORY}/out/metamath/{method}", "--plan", "1"] or "--plan" in given
        assert methods()[method].split() == [word for word in given if word in methods()[method].split()]


@pytest.mark.parametrize(
    "name, flags, sentence",
    [
        ("metamath_gsm8k", [], "error: --load_model models/rwkv7-2.9b.pth: there is no such file or folder; expected "),
        ("metamath_gsm8k", ["--smoke", "1", "--gsm8k", "no.jsonl"], "error: --gsm8k "),
        ("metamath_gsm8k", ["--smoke", "2"], "error: --smoke 2: expected 0 or 1"),
        ("metamath_gsm8k", ["--smoke", "1", "--methods", "dora"], "error: --methods: dora is none of lora rslora"),
        ("chat_g1", ["--methods", "lora"], "error: --methods is no setting of this recipe"),
        ("chat_g1", ["--output"], "error: --output: expected one value"),
        ("chat_g1", ["stray"], "error: stray: expected flags"),
        ("huggingface_llama", ["--plan", "1"], "error: --plan 1: "),
        ("huggingface_llama", [], "error: --model_name_or_path models/llama-2-7b: there is no such file or folder"),
    ],
)
def test_what_is_missing_or_wrong_is_one_sentence(name, flags, sentence, programs):
    result, _ = programs(name, *flags)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(sentence)


def kept(folder: Path) -> dict[Path, int]:
    """The results that must not be made twice, with the time of their last change."""
    files = [*folder.rglob("*.pth"), *folder.rglob("answers*.jsonl"), *folder.rglob("*.safetensors")]
    return {path: path.stat().st_mtime_ns for path in files if path.name != "resume.pth"}


@pytest.mark.parametrize("name", ["metamath_gsm8k", "codefeedback_humaneval"])
def test_a_flag_that_training_refuses_shows_before_the_base_has_answered(name, programs, tmp_path):
    """The Python here answers for the one program that reads the flags, and writes down every other call."""
    (tmp_path / "python").rename(tmp_path / "others")
    reads = f'case $2 in rwkv_bone.config.flags) exec "{sys.executable}" "$@" ;; esac'
    write_program(tmp_path / "python", f'{reads}\nexec "{tmp_path}/others" "$@"')
    for flags, sentence in (
        (["--lr_initt", "3e-4"], "--lr_initt is not a flag of train.py; did you mean --lr_init?"),
        (["--lr_init", "fast"], "--lr_init: expected a number or auto, got 'fast'"),
        (["--methods", "lora dora"], "--methods: dora is none of lora rslora pissa bone bat"),
    ):
        result, calls = programs(name, "--smoke", "1", "--output", "here", *flags)
        assert (result.returncode, calls) == (2, []), result.stderr
        assert result.stderr.splitlines()[-1].startswith(f"error: {sentence}")
    result, calls = programs(name, "--smoke", "1", "--output", "here", "--methods", "lora")
    assert calls[0][1] == "rwkv_bone.evaluation.main", result.stderr


def smoked(name: str, folder: Path) -> str:
    """What a recipe prints with --smoke 1, without a network."""
    where = "--output_dir" if name == "huggingface_llama" else "--output"
    result = subprocess.run(
        ["sh", REPOSITORY / "recipes" / f"{name}.sh", "--smoke", "1", where, folder],
        env=clean_environment()
        | {"RWKV_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr and "warning:" not in result.stdout + result.stderr
    return result.stdout


def test_a_recipe_runs_end_to_end_on_a_few_rows(tmp_path):
    folder = tmp_path / "with a space"
    smoked("state_persona", folder)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and (folder / "model.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_end_to_end_and_a_second_call_makes_nothing_twice(name, tmp_path):
    if name == "huggingface_llama":
        pytest.importorskip("transformers")
    folder = tmp_path / "with a space"
    smoked(name, folder)
    made = kept(folder)
    assert made
    again = smoked(name, folder)
    assert kept(folder) == made
    assert "is complete" in again or "nothing is left to do" in again
