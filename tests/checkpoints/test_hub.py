"""Names of the Hugging Face Hub, against a server on the loopback that speaks its routes; and without any network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.checkpoints import hub
from rwkv_bone.errors import UserError
from tests.hub_server import COMMIT, serve

SOURCE = Path(__file__).resolve().parents[2] / "src"
INDEX = "model.safetensors.index.json"
MODEL = {
    "README.md": b"read me",
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    INDEX: b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * (11 << 12),
    "model-00002-of-00002.safetensors": b"2" * 1000,
    "pytorch_model.bin": b"another form of the weights",
    "onnx/model.onnx": b"and another",
}
READ = sorted(name for name in MODEL if name not in ("README.md", "pytorch_model.bin", "onnx/model.onnx"))
DATA = {f"data/train-0000{number}.jsonl": b'{"text": "a"}\n' * (1 + number) for number in range(2)}
DATA |= {"README.md": b"cards", "logo.png": b"p", "load.py": b"x"}


@pytest.fixture
def site():
    repositories = {
        "models/RWKV/RWKV7-1.5B": MODEL,
        "models/BlinkDL/many": {"a.pth": b"1", "b.pth": b"2"},
        "models/BlinkDL/one": {"rwkv.pth": b"1", "README.md": b"r"},
        "models/some/gguf": {"model.gguf": b"1"},
        "models/some/gated": MODEL,
        "datasets/some/rows": DATA,
        "datasets/some/images": {"logo.png": b"p"},
    }
    with serve(repositories) as served:
        served.gated.add("models/some/gated")
        yield served


@pytest.fixture
def ask(tmp_path):
    """ask(site, name, function="local_model", **environment) -> (path or error, stderr), in a process of its own.

    huggingface_hub reads its environment only once. Without the package around it, the module starts at once.
    """

    def run(site, name, function="local_model", **environment):
        code = (
            f"import importlib.util, sys; sys.path.insert(0, {str(SOURCE)!r})\n"
            f"spec = importlib.util.spec_from_file_location('hub', {hub.__file__!r})\n"
            "sys.modules['hub'] = hub = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(hub)\n"
            "from rwkv_bone.errors import UserError\n"
            f"try: print(hub.{function}({name!r}))\n"
            "except UserError as error: print('error:', error)\n"
        )
        url = site if isinstance(site, str) else site.url
        clean = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
        environment = clean | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")} | environment
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return run


NOWHERE = "http://127.0.0.1:9"  # nothing listens at this port


def test_a_model_is_downloaded_with_only_the_files_that_are_read(site, ask):
    path, said = ask(site, "RWKV/RWKV7-1.5B")
    assert site.files == READ
    assert Path(path).name == INDEX
    assert {file: Path(path).with_name(file).read_bytes() for file in READ} == {file: MODEL[file] for file in READ}
    assert f"{len(READ)} files" in said and site.url in said
    assert hub.origin(path) == f"commit {COMMIT[:10]} of the Hugging Face Hub"


def test_what_is_there_is_not_downloaded_again_and_is_used_without_a_network(site, ask):
    path, _ = ask(site, "RWKV/RWKV7-1.5B")
    site.served.clear()
    found, said = ask(site, "RWKV/RWKV7-1.5B")
    assert found == path and "downloaded" not in said and site.files == []
    for where, environment in ((NOWHERE, {}), (site, {"HF_HUB_OFFLINE": "1"})):
        found, said = ask(where, "RWKV/RWKV7-1.5B", **environment)
        assert found == path
        assert f"taken from {Path(path).parent}" in said
    assert site.files == []


def test_a_download_that_breaks_off_goes_on_where_it_was(site, ask):
    shard = "model-00001-of-00002.safetensors"
    site.cut[shard] = (21 << 20) // 2
    path, _ = ask(site, "RWKV/RWKV7-1.5B")
    assert Path(path).with_name(shard).read_bytes() == MODEL[shard]
    ranges = [wanted for file, wanted in site.served if file == shard]
    assert ranges == ["", f"bytes={10 << 20}-"]


def test_a_download_that_failed_keeps_whole_files_and_says_what_is_missing(site, ask):
    shard = "model-00001-of-00002.safetensors"
    site.down.add(shard)
    message, _ = ask(site, "RWKV/RWKV7-1.5B")
    assert message.startswith("error: RWKV/RWKV7-1.5B is on this machine only in part (")
    assert shard in message and "status 410" in message and "run this again" in message
    message, _ = ask(NOWHERE, "RWKV/RWKV7-1.5B")
    assert "only in part (" in message and shard in message and "cannot be reached" in message
    site.down.clear()
    site.served.clear()
    path, _ = ask(site, "RWKV/RWKV7-1.5B")
    assert Path(path).with_name(shard).read_bytes() == MODEL[shard]
    assert shard in site.files and "config.json" not in site.files


def test_a_tokenizer_that_is_not_there_is_missed(site, ask):
    # The model would be trained with another tokenizer, chosen by the size of the vocabulary.
    path, _ = ask(site, "RWKV/RWKV7-1.5B")
    Path(path).with_name("tokenizer.json").unlink()
    message, _ = ask(NOWHERE, "RWKV/RWKV7-1.5B")
    assert "only in part (tokenizer.json missing" in message


def test_a_revision_is_a_branch_a_tag_or_a_commit(site, ask):
    path, _ = ask(site, "RWKV/RWKV7-1.5B@v1")
    assert Path(path).parent.name == COMMIT
    assert ask(NOWHERE, "RWKV/RWKV7-1.5B@v1")[0] == path
    assert ask(NOWHERE, f"RWKV/RWKV7-1.5B@{COMMIT}")[0] == path
    message, _ = ask(site, "RWKV/RWKV7-1.5B@v2")
    assert message == "error: RWKV/RWKV7-1.5B@v2: RWKV/RWKV7-1.5B has no revision v2"


def test_a_repository_with_one_checkpoint_is_that_file(site, ask):
    path, _ = ask(site, "BlinkDL/one")
    assert Path(path).name == "rwkv.pth" and site.files == ["rwkv.pth"]


def test_other_forms_of_the_weights_in_the_cache_do_not_confuse(site, ask):
    path, _ = ask(site, "RWKV/RWKV7-1.5B")
    Path(path).with_name("pytorch_model.bin").touch()
    Path(path).with_name("rwkv.pth").touch()
    assert ask(site, "RWKV/RWKV7-1.5B")[0] == ask(NOWHERE, "RWKV/RWKV7-1.5B")[0] == path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BlinkDL/many", "has 2 checkpoints: a.pth, b.pth. Download the one you mean and name the file: hf download"),
        ("some/gguf", "has no weights that are read here: .* found model.gguf"),
        ("some/gated", "is gated: accept its terms at .*/some/gated, and log in with `hf auth login`"),
        ("outt/rwkv-0", "is neither a path on this machine nor a model of .*: check the spelling"),
    ],
)
def test_a_repository_that_cannot_be_used_is_refused_with_the_reason(site, ask, name, words):
    message, _ = ask(site, name)
    assert message.startswith(f"error: {name} ")
    assert re.search(words, message), message
    assert site.files == []


def test_without_a_network_the_message_says_what_to_do(ask, tmp_path):
    message, _ = ask(NOWHERE, "RWKV/RWKV7-1.5B")
    assert message.startswith("error: RWKV/RWKV7-1.5B is not on this machine, as a path or in ")
    for words in ("cannot be reached", "HTTPS_PROXY", "hf download RWKV/RWKV7-1.5B --local-dir RWKV7-1.5B", "spelling"):
        assert words in message
    message, _ = ask(NOWHERE, "RWKV/RWKV7-1.5B", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: unset it to download" in message


def test_a_data_set_is_downloaded_without_its_pictures_and_programs(site, ask):
    path, _ = ask(site, "some/rows", "local_data")
    assert site.files == ["README.md", "data/train-00000.jsonl", "data/train-00001.jsonl"]
    assert (Path(path) / "data" / "train-00000.jsonl").read_bytes() == DATA["data/train-00000.jsonl"]
    assert ask(NOWHERE, "some/rows", "local_data")[0] == path
    assert ask(site, "hf://datasets/some/rows", "local_data")[0] == path
    Path(path, "data", "train-00001.jsonl").unlink()
    message, _ = ask(NOWHERE, "some/rows", "local_data")
    assert "only in part (data/train-00001.jsonl missing" in message
    message, _ = ask(site, "some/images", "local_data")
    assert message == "error: some/images has no data that is read here: found logo.png"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder, and a Hub that must not be asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *arguments: pytest.fail("asked the Hub"))
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "model.pth",
        "nowhere/model.pth",
        "nowhere/x.safetensors",
        "a/b/c",
        "/a/b",
        "./a/b",
        "../a/b",
        "~/a",
        "a",
        "a/",
        "",
    ],
)
def test_a_path_that_does_not_exist_is_left_to_its_reader(folder, name):
    assert hub.local_model(name) == Path(name)
    assert hub.local_data(name) == name


def test_a_path_that_exists_is_that_path(folder):
    (folder / "RWKV" / "model").mkdir(parents=True)
    assert hub.local_model("RWKV/model") == Path("RWKV/model")
    assert hub.local_model(Path("RWKV/model")) == Path("RWKV/model")


def test_a_misspelt_file_of_a_folder_that_is_here_does_not_go_to_the_network(folder):
    (folder / "out").mkdir()
    (folder / "out" / "rwkv-0.pth").touch()
    with pytest.raises(UserError) as refused:
        hub.local_model("out/rwkv-0")
    assert str(refused.value).startswith("out/rwkv-0 does not exist: the folder out is here and has no rwkv-0; it has ")
    assert "rwkv-0.pth" in str(refused.value) and "hf://out/rwkv-0" in str(refused.value)


def test_a_name_that_begins_with_hf_is_of_the_hub_whatever_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RWKV").mkdir()
    asked = []
    monkeypatch.setattr(hub, "_download", lambda repository, wanted: asked.append(repository) or tmp_path)
    hub.local_data("hf://RWKV/x@main")
    assert [str(one) for one in asked] == ["RWKV/x@main"]
    with pytest.raises(UserError, match="hf://x: expected hf://owner/name"):
        hub.local_model("hf://x")
