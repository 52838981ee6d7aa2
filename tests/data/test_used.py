"""Every setting of the data with every kind of data: it acts, or it is refused with a sentence."""

import json
from dataclasses import fields

import numpy as np
import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data import load_dataset, load_tokenizer
from rwkv_bone.data.sources.binidx import PairWriter
from rwkv_bone.errors import UserError

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "ha"},
    {"role": "assistant", "content": "he"},
]
TOOLS = [{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}]
TEXT = "User: hi\n\nAssistant: ho, and {} more words"
KINDS = ("chats", "chats with tools", "pairs", "rows of text", "text", "texts", "ids", "binidx", "datasets")
MARKS = '{"mask0": "Assistant:", "mask1": "User:"}'
WORLD = load_tokenizer("world", 65536)
ALL = dict.fromkeys(KINDS, "acts")
REFUSED = dict.fromkeys(KINDS, "refused")
TURNS = dict.fromkeys(("chats", "chats with tools", "pairs", "datasets"), "acts")
DOCUMENTS = ("rows of text", "text", "texts", "ids", "binidx")
# {(setting, value): what becomes of it with each kind}: acts (other samples than without it), same (what it asks for is
# what is done anyway) or refused.
TABLE = {
    ("sft_split", "[:1]"): ALL | {"text": "refused"},
    ("sft_split", "train[:1]"): ALL | {"text": "refused"},
    ("sft_split", "train"): dict.fromkeys(KINDS, "same"),
    ("sft_split", "test"): REFUSED | {"datasets": "acts"},
    ("sft_split", "test[:1]"): REFUSED | {"datasets": "acts"},
    ("sft_field", ("answer", "question")): REFUSED | {"pairs": "acts", "datasets": "acts"},
    ("template", "alpaca"): REFUSED | TURNS | {"chats with tools": "acts"},
    ("tool_format", "g1"): REFUSED | {"chats with tools": "acts"},
    ("loss_mask", "last"): REFUSED | TURNS | {"pairs": "same", "datasets": "same"},
    ("loss_mask", "none"): ALL | dict.fromkeys(DOCUMENTS, "same"),
    ("loss_mask", "pad"): ALL | dict.fromkeys(DOCUMENTS, "same"),
    ("loss_mask", "qa"): dict.fromkeys(KINDS, "same") | dict.fromkeys(DOCUMENTS, "acts"),
    ("loss_mask", "se"): ALL | {"pairs": "acts", "datasets": "acts"},
    # Ids without lengths end with the tokenizer's id for that, which is 0 for both.
    ("tokenizer", "bytes"): ALL | {"ids": "same", "binidx": "refused"},
    ("long_samples", "drop"): ALL,
    ("ctx_len", 20): ALL,
    ("dataload", "get"): ALL,
    ("task", "dpo"): REFUSED,
    ("task", "kto"): REFUSED,
}
# Settings that this table cannot hold, and where they are held.
ELSEWHERE = {
    "data_file": "names the data",
    "data_type": "test_sources.py",
    "columns": "test_sources.py",
    "data_weights": "for several files: test_dataset.py",
    "eval_data": "names the data",
    "eval_field": "below",
    "eval_general": "names the data",
    "eval_split": "tests/training",
    "mask_id": "with loss_mask se",
    "max_lost": "test_lost.py",
    "bad_rows": "acts where a row is bad: test_sources.py, test_binidx.py",
    "cache_dir": "test_cache.py",
    "micro_bsz": "test_sampler.py",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Factory: the path of data of that kind."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = [TEXT.format("many " * i) for i in (1, 30, 2)]
    pairs = [{"question": f"q{i} User: a", "answer": f"Assistant: a{i}" + " word" * 30 * i} for i in range(3)]
    with_tools = [{"messages": CHAT, "tools": TOOLS}, {"messages": CHAT}, {"messages": CHAT * 20}]

    def lines(name: str, rows: list[dict]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    def path(kind: str) -> str:
        ids = [np.array([*WORLD.encode(text), 0], dtype=np.uint16) for text in texts]
        if kind == "chats":
            return lines("chats.jsonl", [{"messages": CHAT}, {"messages": CHAT * 20}, {"messages": CHAT[2:]}])
        if kind == "chats with tools":
            return lines("tools.jsonl", with_tools)
        if kind == "pairs":
            return lines("pairs.jsonl", pairs)
        if kind == "rows of text":
            return lines("texts.jsonl", [{"text": text} for text in texts])
        if kind == "text":
            (folder / "text.txt").write_text("\n".join(texts))
            return str(folder / "text.txt")
        if kind == "texts":
            (folder / "texts").mkdir(exist_ok=True)
            for i, text in enumerate(texts):
                (folder / "texts" / f"{i}.txt").write_text(text)
            return str(folder / "texts")
        if kind == "ids":
            np.save(folder / "ids.npy", np.concatenate(ids))
            return str(folder / "ids.npy")
        if kind == "binidx":
            if not (folder / "pair.idx").exists():
                with PairWriter(folder / "pair", np.dtype("uint16"), False) as pair:
                    pair.write(np.concatenate(ids), np.array([len(one) for one in ids]))
            return str(folder / "pair")
        datasets = pytest.importorskip("datasets")
        made = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", pairs), ("test", pairs[::-1][:2]))}
        if not (folder / "saved").exists():
            datasets.DatasetDict(made).save_to_disk(folder / "saved")
        return str(folder / "saved")

    return path


def samples(cfg: DataConfig) -> list:
    dataset = load_dataset(cfg, 65536)
    return [dataset.windows, *((sample.ids.tolist(), sample.trained.tolist()) for sample in dataset)]


def test_the_table_has_every_setting_of_the_data():
    assert {name for name, _ in TABLE} | ELSEWHERE.keys() == {spec.name for spec in fields(DataConfig)}
    assert all(row.keys() == set(KINDS) for row in TABLE.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), TABLE, ids=lambda word: str(word))
def test_a_setting_acts_on_the_data_or_is_refused(data, kind, name, value):
    path, base = data(kind), {"max_lost": 1}
    if name == "long_samples":
        base["ctx_len"] = 30
        path = (data("rows of text"), path) if kind == "text" else path  # dropped, it would leave nothing
    if name == "dataload":
        base["loss_mask"] = "none"
    if name in ("tokenizer", "tool_format") and TABLE["template", "alpaca"][kind] == "acts":
        base["template"] = "alpaca"
    path = (path,) if isinstance(path, str) else path
    more = {"mask_id": MARKS} if value == "se" else {}
    expected = TABLE[name, value][kind]
    changed = DataConfig(data_file=path, **{**base, name: value, **more})
    if expected == "refused":
        with pytest.raises(
            UserError, match=rf"--{name} .*(remove|give --sft_split|the splits|--task sft)|with --{name}"
        ):
            load_dataset(changed, 65536)
        return
    assert (samples(changed) != samples(DataConfig(data_file=path, **base))) == (expected == "acts")


def test_a_setting_is_right_if_one_file_can_use_it(data):
    both = data("pairs"), data("text")
    for settings in ({"template": "alpaca"}, {"loss_mask": "last"}, {"sft_field": ("question", "answer")}):
        assert load_dataset(DataConfig(data_file=both, **settings), 65536)
    with pytest.raises(UserError, match=r"--template alpaca .* nothing in .*text.txt \(text\), .*pair \(token ids\)"):
        load_dataset(DataConfig(data_file=(data("text"), data("binidx")), template="alpaca"), 65536)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"template": "alpaca"}, "pairs"), ({"loss_mask": "last"}, "chats"), ({"tool_format": "g1"}, "chats with tools")],
)
def test_a_setting_is_right_if_the_held_out_data_can_use_it(data, settings, kind):
    load_dataset(DataConfig(data_file=(data("text"),), eval_data=(data(kind),), **settings), 65536)
    with pytest.raises(UserError, match="as nothing in .* has"):
        load_dataset(DataConfig(data_file=(data("text"),), eval_data=(data("rows of text"),), **settings), 65536)


def test_what_the_model_brings_along_is_nothing_that_a_user_typed(data):
    typed = DataConfig(data_file=(data("text"),))
    filled = DataConfig(data_file=(data("text"),), template="alpaca", tokenizer="bytes")
    assert len(load_dataset(filled, 65536, typed=typed))
    binidx = DataConfig(data_file=(data("binidx"),), tokenizer="bytes")
    assert load_dataset(binidx, 65536, typed=DataConfig(data_file=(data("binidx"),)))
    assert load_dataset(binidx, 65536, shows_text=True)


def test_one_file_has_no_weight():
    with pytest.raises(UserError, match="--data_weights weighs several files .* see --epoch_count"):
        DataConfig(data_file=("a.jsonl",), data_weights=("2",))
