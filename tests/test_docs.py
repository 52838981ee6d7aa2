"""README and docs/: every command in them runs, every link and every quoted message exists.

Each page is one test. Its ```sh and ```python blocks run from top to bottom in one scratch copy of the repository, as a
reader types them; the line `<!-- not run: needs NAME -->` directly before a fence leaves a block out and says why.
Output shown to the reader stands in ```text. `PYTHONPATH=src:. python tests/test_docs.py` lists the blocks that run and
those that do not.

Only the Python that the blocks find is a stand-in (`PYTHON`): it runs training for two steps an epoch, and answers
`python -m pytest`, which `sh scripts/test.sh` calls, with pytest's version, or these tests would run themselves.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import pytest

from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.config import MergeConfig
from rwkv_bone.config.field_flags import MERGE_FLAGS, TRAIN_FLAGS
from rwkv_bone.config.flags import ALIASES
from rwkv_bone.config.saved import SECTIONS
from rwkv_bone.conversion.flags import ConvertConfig
from rwkv_bone.data.prepare import PrepareConfig
from rwkv_bone.data.preview import PreviewConfig
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.hf.flags import HfConfig
from tests.conftest import clean_environment

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
RUN, SHOWN = ("sh", "python"), ("", "text", "json", "jinja")
FENCED = re.compile(
    r"^(?:<!-- not run: needs (?P<needs>\S.*?) -->\n)?```(?P<language>.*?)\n(?P<code>(?s:.*?))^```$", re.MULTILINE
)
TIMEOUT = 600  # seconds for a block, which take a few: a run that is not shortened ends here

PYTHON = """#!/bin/sh
case " $* " in
    *train_hf.py\\ *) set -- "$@" --num_train_epochs 0.01 ;;
    *train.py\\ *--eval_*) set -- "$@" --epoch_steps 2 --warmup_steps 0 --eval_samples 2 ;;
    *train.py\\ *) set -- "$@" --epoch_steps 2 --warmup_steps 0 ;;
    *\\ -m\\ pytest\\ *) set -- -m pytest --version ;;
esac
exec "{python}" "$@"
"""
COPIED = ("train.py", "merge.py", "train_hf.py", "pyproject.toml", "requirements.txt", "requirements-dev.txt")
COPIED_FOLDERS = ("assets", "benchmarks", "cuda", "docs", "merge", "recipes", "scripts", "src", "tests")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    needs: str  # what a block that is not run needs, else empty

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["needs"] or ""
        )
        for found in FENCED.finditer(text)
    ]


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in RUN]


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(name: str, count: int) -> list[dict]:
    with open(REPOSITORY / "assets" / name, encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def talk(row: dict) -> dict:
    turns = [("system", "Write numbers in words."), ("user", row["prompt"].strip()), ("assistant", row["response"])]
    turns += [("user", "Thank you."), ("assistant", "You are welcome.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write_tiny_llama(folder: Path) -> None:
    """A Llama with random weights and a tokenizer of bytes, as `save_pretrained` leaves one."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class Desk:
    """A scratch copy of the repository with a reader's files in it, and the Python that its commands find."""

    def __init__(self, folder: Path):
        self.root, self.bin = folder / "rwkv-bone", folder / "bin"
        skipped = shutil.ignore_patterns("__pycache__", ".rwkv_bone_cache", "*.egg-info")
        for name in COPIED_FOLDERS:
            shutil.copytree(REPOSITORY / name, self.root / name, ignore=skipped)
        for name in COPIED:
            shutil.copy(REPOSITORY / name, self.root)
        shutil.copy(REPOSITORY / "assets" / "rwkv7-tiny.pth", self.root / "my-model.pth")
        write_rows(self.root / "mine.jsonl", rows_of("numbers_train.jsonl", 40))
        write_rows(self.root / "heldout.jsonl", rows_of("numbers_heldout.jsonl", 10))
        write_rows(self.root / "chat.jsonl", map(talk, rows_of("numbers_train.jsonl", 12)))
        prose = "\n\n".join(row["text"] for row in rows_of("corpus_train.jsonl", 6))
        (self.root / "prose.txt").write_text(prose, encoding="utf-8")
        self.bin.mkdir()
        self.program("python", PYTHON.format(python=sys.executable))
        for name in ("python3", "torchrun"):
            more = " -m torch.distributed.run" if name == "torchrun" else ""
            self.program(name, f'#!/bin/sh\nexec "{self.bin}/python"{more} "$@"\n')

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def run(self, block: Block) -> None:
        """AssertionError with the end of its output if a block fails."""
        environment = clean_environment() | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "RWKV_PYTHON": str(self.bin / "python"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.root / "src"), os.environ.get("PYTHONPATH")])),
            # No block may need the network: what tries finds none, at once.
            "HF_HUB_OFFLINE": "1",
            # Threads that wait for one another take longer than such small models do.
            "OMP_NUM_THREADS": "1",
            "https_proxy": "http://127.0.0.1:9",
            "PIP_RETRIES": "0",
        }
        command = ["sh", "-eu", "-c"] if block.language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.code],
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, (
            f"{block} ended with status {done.returncode}:\n{block.code}\n{done.stdout[-3000:]}"
        )


def pages_with_blocks() -> list:
    """The pages that have something to run, as parameters of a test; all but README are slow."""
    found = [page for page in PAGES if runnable(page)]
    return [pytest.param(page, id=page.name, marks=[] if page == README else [pytest.mark.slow]) for page in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_of_a_known_language_and_every_mark_stands_directly_before_one(page):
    text, blocks = page.read_text(encoding="utf-8"), blocks_of(page)
    assert [f"{block}: {block.language}" for block in blocks if block.language not in RUN + SHOWN] == []
    assert len(re.findall(r"(?m)^\s*```", text)) == 2 * len(blocks)
    assert text.count("<!-- not run") == sum(bool(block.needs) for block in blocks if block.language in RUN)


@pytest.mark.parametrize("page", pages_with_blocks())
def test_every_block_of_a_page_runs(page, tmp_path):
    desk, blocks = Desk(tmp_path), runnable(page)
    if any("models/my-model" in block.code for block in blocks):
        write_tiny_llama(desk.root / "models" / "my-model")
    for block in blocks:
        if block.needs:
            print(f"not run   {block}, needs {block.needs}")
        else:
            desk.run(block)
            print(f"run       {block}")


# --- what a page says about the repository ---

MARKDOWN = [path for path in REPOSITORY.rglob("*.md") if not {".venv", "out", ".git"} & set(path.parts)]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", prose(page)):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("]", heading).lower()).strip().replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_within_the_repository_goes_somewhere(page):
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_readme_is_read_in_one_sitting():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 150] == []


def test_readme_leads_to_every_page():
    linked = {(REPOSITORY / link.partition("#")[0]).resolve() for link in LINK.findall(prose(README))}
    assert [page.name for page in PAGES if page not in linked and page != README] == []


def file_map() -> list[tuple[str, str]]:
    """(folder, name) of every entry of README's file map."""
    (block,) = [block for block in blocks_of(README) if "src/rwkv_bone/" in block.code and block.language == "text"]
    entries, folder = [], ""
    for line in block.code.splitlines():
        names = re.match(r" *(\S+(?: \S+)*)", line)
        if line.strip() and names:
            inside = line.startswith(" ")
            entries += [(folder if inside else "", name) for name in names[1].split()]
            folder = folder if inside else names[1].split()[0]
    return entries


def test_the_file_map_names_what_is_there_and_every_room_of_the_package():
    entries = file_map()
    assert [name for folder, name in entries if not (REPOSITORY / folder / name).exists()] == []
    rooms = {path.parent.name for path in (REPOSITORY / "src" / "rwkv_bone").glob("*/__init__.py")}
    assert rooms <= {name.rstrip("/") for folder, name in entries if folder == "src/rwkv_bone/"}
    assert set(COPIED_FOLDERS) <= {name.split("/")[0] for folder, name in entries if not folder}


SETTINGS = (
    *SECTIONS.values(),
    MergeConfig,
    ConvertConfig,
    PrepareConfig,
    PreviewConfig,
    HfConfig,
    ChatConfig,
    EvaluateConfig,
)
TOOLS = [*(REPOSITORY / "scripts").glob("*.sh"), *(REPOSITORY / "benchmarks").rglob("*.py")]
TOOLS += (REPOSITORY / "recipes").glob("*.sh")
TOOLS += (REPOSITORY / "tests").glob("*/__main__.py")
# Of docker, pip, torchrun, Slurm and lm_eval.
OF_OTHERS = {"gpus", "force-reinstall", "index-url", "logdir", "nnodes", "no-python", "requeue", "signal"}
OF_OTHERS |= {
    "master_addr",
    "master_port",
    "node_rank",
    "nproc_per_node",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "apply_chat_template",
    "dpo",
    "batch_size",
    "gen_kwargs",
    "include_path",
    "output_path",
    "tasks",
}


def test_every_flag_that_a_page_names_exists():
    ours = {spec.name for section in SETTINGS for spec in fields(section)} | {"config", "help"}
    ours |= {*ALIASES.values(), *TRAIN_FLAGS, *MERGE_FLAGS}
    flag = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
    ours |= {name for tool in TOOLS for name in flag.findall(tool.read_text(encoding="utf-8"))}
    pages = [page for page in PAGES if page.name != "migrating.md"]  # made from the tables of flags
    named = [(page.name, name) for page in pages for name in flag.findall(page.read_text(encoding="utf-8"))]
    assert [f"{page}: --{name}" for page, name in named if name not in ours | OF_OTHERS] == []


# --- messages ---

VARYING = re.compile(r"\.\.\.|…|\b[A-Z][A-Z0-9_]*\b")
HOLE = "\0"  # where a message of the source has a value


def source_messages() -> list[str]:
    """The texts that the package and the scripts can say: values as holes, docstrings left out."""
    texts = []
    for path in [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "scripts").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                texts.append(node.value)
    for path in (REPOSITORY / "scripts").glob("*.sh"):
        code = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
        texts += re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", HOLE, "\n".join(code)).splitlines()
    return texts


def quoted_messages() -> list[tuple[int, str]]:
    """(line, message) of the first column of troubleshooting.md's tables headed `message`."""
    found, inside = [], False
    lines = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        first = line.split("|")[1].strip() if line.startswith("|") else ""
        if first == "message":
            inside = True
        elif not first:
            inside = False
        elif inside and not set(first) <= set("-:"):
            assert re.fullmatch(r"`[^`]+`", first), (
                f"troubleshooting.md:{number}: {first} is not one message in backticks"
            )
            found.append((number, first.strip("`")))
    return found


def says(text: str, message: str) -> bool:
    """Whether a text of the source says a quoted message: its fixed words, in order, with anything in between."""
    position = 0
    for part in VARYING.split(message):
        position = text.find(part.strip(), position)
        if position < 0:
            return False
        position += len(part.strip())
    return True


def test_every_message_of_troubleshooting_is_one_that_the_code_can_say():
    texts, quoted = source_messages(), quoted_messages()
    assert len(quoted) >= 40
    for _, message in quoted:
        assert len("".join(VARYING.split(message))) >= 12, f"{message}: too little of it is fixed to be found"
    assert [f"line {n}: {message}" for n, message in quoted if not any(says(text, message) for text in texts)] == []


def listing() -> str:
    """The blocks of all pages, those that run and those that do not."""
    lines = []
    for page in PAGES:
        for block in runnable(page):
            first = block.code.strip().splitlines()[0]
            lines.append(f"{'not run' if block.needs else 'run':<8} {block!s:<34} {block.needs or first}")
    run = sum(line.startswith("run") for line in lines)
    return "\n".join([*lines, f"{run} blocks run, {len(lines) - run} do not"])


if __name__ == "__main__":
    print(listing())
