"""lm_eval's model class: what lm_eval asks of a model, compared with its definition and with lm_eval's own classes."""

import json
import logging
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from rwkv_bone import checkpoints
from rwkv_bone.commands import lm_eval as command
from rwkv_bone.errors import UserError
from tests.conftest import REPOSITORY, random_model

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements/lm_eval.txt")

from lm_eval import tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402

from rwkv_bone.evaluation.harness import RWKVBone  # noqa: E402

BUNDLED = REPOSITORY / "assets" / "rwkv7-tiny.pth"
GSM8K = REPOSITORY / "tests" / "assets" / "data" / "gsm8k" / "train.jsonl"


@pytest.fixture(scope="module")
def bundled():
    return RWKVBone(str(BUNDLED), precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with the World vocabulary; its weights are random."""
    path = tmp_path_factory.mktemp("world") / "world.pth"
    checkpoints.write_state(path, random_model(n_layer=1, vocab_size=65536).state_dict())
    return RWKVBone(str(path), device="cpu")


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("task", number, 1)) for number, args in enumerate(arguments)]


@torch.no_grad()
def steps(model, ids: list[int]) -> list[tuple[float, bool]]:
    """(log-probability, whether it is the likeliest) of each token but the first: the whole text at once."""
    rows = model(torch.tensor([ids]))[0].double().log_softmax(dim=1)
    return [(float(row[token]), int(row.argmax()) == token) for row, token in zip(rows, ids[1:], strict=False)]


@torch.no_grad()
def slowly(lm, context: str, until: list[str], most: int) -> str:
    """Greedy, a token at a time, without a look at stop texts; then cut at the first of them."""
    ids, answer, state = lm.voice.encode(context), [], None
    while len(answer) < most:
        logits, state = lm.voice.model(torch.tensor([ids]), state=state, return_state=True)
        ids = [int(logits[0, -1].argmax())]
        if ids == [0]:
            break
        answer += ids
    text = lm.voice.tokenizer.decode(answer)
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


PAIRS = [
    ("2577 in words: ", "two thousand five hundred seventy-seven"),
    ("2577 in words: ", "two thousand"),
    ("2577 in words:", " two thousand five hundred seventy-seven"),
    ("Question: 1 + 1?\nAnswer:", " 2"),
    ("", "forty-two"),
    ("  \n", "a"),
    ("40 in words: ", "forty\n"),
]


def test_the_likelihood_of_a_continuation_is_that_of_its_tokens_in_the_whole_text(bundled):
    pairs = [*PAIRS, ("Call me", slowly(bundled, "Call me", [], 5))]
    found = bundled.loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        text = [0, *(context + continuation).encode()]
        # Bytes: what is asked about are the continuation and the white space before it.
        count = len((context + continuation).encode()) - len(context.rstrip().encode())
        start = 0 if context.strip() == "" else 1  # only an empty context is the end of another document
        expected = steps(bundled.voice.model, text[start:])[-count:]
        assert total == pytest.approx(sum(p for p, _ in expected), abs=2e-3)
        assert greedy == all(right for _, right in expected)
    assert {greedy for _, greedy in found} == {True, False}


def test_the_likelihood_of_a_text_begins_at_the_end_of_another_document(bundled):
    texts = ["Call me Ishmael. Some years ago", "", "Naïve – 天"]
    found = bundled.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    expected = [sum(p for p, _ in steps(bundled.voice.model, [0, *text.encode()])) if text else 0 for text in texts]
    assert found == pytest.approx(expected, abs=2e-3)


class Theirs(TemplateLM):
    """lm_eval's own way to cut a pair, with our tokenizer."""

    def __init__(self, encode):
        self.encode = encode

    def tok_encode(self, string, **options):
        return self.encode(string)

    eot_token_id = 0
    _loglikelihood_tokens = loglikelihood_rolling = generate_until = None


CUTS = [
    ("Question: Who?\nAnswer:", " Somebody"),
    ("Question: Who?\nAnswer: ", "Somebody"),
    ("A passage.\n\n", "\nNext"),
    ("def f(x):\n    ", "return x"),
    ("问题：谁？\n答案：", "甲"),
    ("Naïve\t ", "Straße"),
]


@pytest.mark.parametrize(("context", "continuation"), CUTS)
def test_a_pair_is_cut_as_lm_evals_own_models_cut_it(bundled, world, context, continuation):
    for lm in (bundled, world):
        (before, after), spans = lm._cut(context, continuation)
        assert (before, after) == Theirs(lm.voice.encode)._encode_pair(context, continuation)
        assert not spans
        assert lm.voice.tokenizer.decode(before + after) == context + continuation


def test_a_token_that_reaches_over_the_border_belongs_to_the_continuation_and_no_text_is_lost(world, caplog):
    decode = world.voice.tokenizer.decode
    before, after = Theirs(world.voice.encode)._encode_pair("It says hel", "lo")
    assert decode(before + after) != "It says hello"  # lm_eval's own models read another text
    (before, after), spans = world._cut("It says hel", "lo")
    assert (decode(before), decode(after), spans) == ("It says", " hello", True)
    with caplog.at_level(logging.WARNING, "rwkv_bone"):
        world.loglikelihood(asked("loglikelihood", ("It says hel", "lo"), ("It says", " hello")))
    assert "1 of 2 continuations begin within a token" in caplog.text


def test_an_empty_choice_is_refused(bundled):
    with pytest.raises(UserError, match="empty continuation.*in words: '"):
        bundled.loglikelihood(asked("loglikelihood", ("2577 in words: ", "")))


def test_an_answer_ends_before_whichever_stop_text_comes_first(bundled):
    contexts = ["2577 in words: ", "Call me ", "It was the best of "]
    requests, expected = [], []
    for context in contexts:
        whole = slowly(bundled, context, [], 25)
        for until, most in (([" the", "en"], 25), (["\n"], 25), ([], 7), (["e", "ea"], 25)):
            requests.append((context, {"until": until, "max_gen_toks": most, "do_sample": False}))
            expected.append(whole[: min((whole.find(stop) for stop in until if stop in whole), default=most)])
    assert bundled.generate_until(asked("generate_until", *requests)) == expected
    assert len(set(expected)) > 6 and all(expected)


def test_a_single_stop_text_and_other_names_of_max_gen_toks_are_understood(bundled):
    how = {"until": "e", "max_new_tokens": 20, "temperature": 0.0}
    [answer] = bundled.generate_until(asked("generate_until", ("2577 in words: ", how)))
    assert answer == slowly(bundled, "2577 in words: ", ["e"], 20)
    [short] = bundled.generate_until(asked("generate_until", ("2577 in words: ", {"until": [], "max_tokens": 3})))
    assert short == slowly(bundled, "2577 in words: ", [], 3)


def test_what_an_answer_draws_follows_from_the_seed_the_task_and_the_document_alone(bundled):
    how = {"until": ["\n"], "do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    torch.manual_seed(1234)
    requests = asked("generate_until", *[("Call me", how)] * 4)
    answers = bundled.generate_until(requests)
    assert len(set(answers)) == 4
    assert bundled.generate_until(requests[2:]) == answers[2:]
    torch.manual_seed(5)
    assert bundled.generate_until(requests) != answers
    # The same document several times, as `repeats` asks: an answer of its own each time.
    assert len(set(bundled.generate_until([requests[0]] * 3))) == 3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"stop": ["x"]}, "stop="),
        ({"max_length": 9}, "max_length=9"),
        ({"do_sample": True}, "without a temperature"),
    ],
)
def test_an_argument_of_generation_that_would_not_act_is_refused(bundled, how, words):
    with pytest.raises(UserError, match=words):
        bundled.generate_until(asked("generate_until", ("a", {"until": [], **how})))
    neutral = {"until": [], "max_gen_toks": 1, "num_beams": 1, "repetition_penalty": 1.0, "top_p": 1.0}
    bundled.generate_until(asked("generate_until", ("a", neutral)))


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_chat_template_writes_messages_as_training_does(world):
    text = world.apply_chat_template(MESSAGES)
    assert text == "System: Be brief.\n\nUser: Hi\n\nAssistant: "
    more = [*MESSAGES, {"role": "assistant", "content": "Hello."}, *MESSAGES[1:]]
    assert world.apply_chat_template(more) == text + "Hello.\n\nUser: Hi\n\nAssistant: "
    begun = [*MESSAGES, {"role": "assistant", "content": "The answer is"}]
    assert world.apply_chat_template(begun, add_generation_prompt=False) == text + "The answer is"
    assert world.chat_template(True).startswith("world: ")
    assert world.chat_template("world") and world.chat_template(False) is None
    with pytest.raises(UserError, match="--template g1"):
        world.chat_template("g1")
    assert "/" not in world.tokenizer_name


def test_the_space_that_begins_an_answer_is_the_models_to_write(world, monkeypatch):
    text = world.apply_chat_template(MESSAGES)
    encode, decode = world.voice.encode, world.voice.tokenizer.decode
    (before, after), _ = world._cut(text, "Paris")
    assert (decode(before), after) == (text.rstrip(), encode(" Paris"))
    seen = {}

    def generate(model, prompts, **how):
        seen.update(how, prompts=prompts)
        return [encode(" Paris"), encode("London")]

    monkeypatch.setattr("rwkv_bone.evaluation.harness.generate", generate)
    answers = world.generate_until(asked("generate_until", (text, {"until": ["."]}), (text, {"until": ["."]})))
    assert answers == ["Paris", "London"]
    assert seen["prompts"] == [encode(text.rstrip())] * 2
    assert seen["stop_texts"] == (".", "\n\n")  # a blank line ends a turn
    world.generate_until(asked("generate_until", ("Hi ", {"until": ["."]}), ("Hi ", {"until": ["."]})))
    assert seen["prompts"] == [encode("Hi ")] * 2 and seen["stop_texts"] == (".",)


def test_a_think_block_is_no_part_of_an_answer(world, monkeypatch):
    answers = ["<think>\nIs it 5?\n</think>\nIt is 4.", ">\nIs it 5?\n</think>\n\nIt is 4.", "<think>\nIs it"]
    seen = []

    def generate(model, prompts, *, opening, **how):
        seen.append(opening)
        return [world.voice.encode(answers[len(seen) - 1])]

    monkeypatch.setattr("rwkv_bone.evaluation.harness.generate", generate)
    contexts = ["Q:", "Q: <think", "Q: <think>\n</think>\nA:"]
    requests = [asked("generate_until", (context, {"until": ["?"]})) for context in contexts]
    found = [world.generate_until(request)[0] for request in requests]
    assert found == ["It is 4.", "It is 4.", "<think>\nIs it"]
    assert seen == ["", "<think>", ""]


def test_a_template_without_turns_is_refused(bundled):
    with pytest.raises(UserError, match="--template raw has no turns"):
        bundled.chat_template(True)


def test_results_go_to_lm_evals_cache_as_they_come(bundled, monkeypatch):
    kept = []
    monkeypatch.setattr(bundled.cache_hook, "add_partial", lambda kind, args, result: kept.append((kind, args)))
    bundled.loglikelihood(asked("loglikelihood", *PAIRS[:2]))
    bundled.loglikelihood_rolling(asked("loglikelihood_rolling", ("a",)))
    how = {"until": [], "max_gen_toks": 1}
    bundled.generate_until(asked("generate_until", ("a", how)))
    assert kept == [
        *(("loglikelihood", pair) for pair in PAIRS[:2]),
        ("loglikelihood_rolling", ("a",)),
        ("generate_until", ("a", how)),
    ]


@pytest.mark.parametrize(("size", "largest", "expected"), [("auto", None, 32), ("auto:4", 8, 8), (3, None, 3)])
def test_the_batch_size_is_lm_evals(tiny_checkpoint, size, largest, expected):
    path = str(tiny_checkpoint(vocab_size=256))
    assert RWKVBone(path, device="cpu", batch_size=size, max_batch_size=largest).batch_size == expected
    with pytest.raises(UserError, match="--batch_size 0"):
        RWKVBone(path, device="cpu", batch_size=0)


# Tasks of local files.


def write_tasks(folder, lm) -> list[str]:
    """Four tasks of local files, one of each kind that lm_eval knows; GSM8K with the rules of lm_eval's own file.

    lm: it must know the answers to some questions.
    """
    numbers = [json.loads(line) for line in (REPOSITORY / "assets/numbers_heldout.jsonl").open(encoding="utf-8")]
    texts = [json.loads(line) for line in (REPOSITORY / "assets/corpus_heldout.jsonl").open(encoding="utf-8")]
    for row in numbers[:9:3]:
        row["response"] = slowly(lm, row["prompt"], ["\n"], 20)
    rows = {
        "choice": [
            {
                "prompt": row["prompt"],
                "choices": [row["response"], other["response"], row["response"] + " and one"],
            }
            for row, other in zip(numbers[:8], numbers[8:], strict=False)
        ],
        "exact": numbers[:9],
        "perplexity": [{"text": row["text"][:300]} for row in texts[:3]],
        # The other implementation reads everything again for each new token.
        "gsm8k": sorted((json.loads(line) for line in GSM8K.open(encoding="utf-8")), key=lambda row: len(str(row)))[:3],
    }
    kinds = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": metrics("acc", "acc_norm"),
        },
        "exact": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{response}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": metrics("exact_match"),
        },
        "perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": name, "aggregation": kind, "higher_is_better": False}
                for name, kind in (("byte_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
            ],
        },
        "gsm8k": {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}",
            "fewshot_split": "test",
            "num_fewshot": 1,
            "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [
                {
                    **metrics("exact_match")[0],
                    "ignore_case": True,
                    "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
                }
            ],
            "filter_list": [
                {"name": name, "filter": [{"function": "regex", **rule}, {"function": "take_first"}]}
                for name, rule in (
                    ("strict-match", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
                    ("flexible-extract", {"group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}),
                )
            ],
        },
    }
    for name, task in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        common = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return [f"local_{name}" for name in kinds]


def metrics(*names: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def evaluate(lm, folder, names: list[str]) -> tuple[dict, dict]:
    """(results, {task: its samples, in order}) by lm_eval."""
    from lm_eval import simple_evaluate

    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    samples = {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in found["samples"].items()}
    return found["results"], samples


def test_scores_of_lm_eval_are_those_computed_by_hand(bundled, tmp_path):
    write_tasks(tmp_path, bundled)
    results, samples = evaluate(bundled, tmp_path, ["local_choice", "local_exact", "local_perplexity"])
    model, right, normed = bundled.voice.model, [], []
    for sample in samples["local_choice"]:
        context, choices = sample["doc"]["prompt"], sample["doc"]["choices"]
        totals = [sum(p for p, _ in steps(model, [*(context + c).encode()])[-len(c) - 1 :]) for c in choices]
        assert [float(pair[0]) for pair in sample["filtered_resps"]] == pytest.approx(totals, abs=2e-3)
        right.append(np.argmax(totals) == 0)
        normed.append(np.argmax([total / len(c) for total, c in zip(totals, choices, strict=True)]) == 0)
    assert results["local_choice"]["acc,none"] == np.mean(right)
    assert results["local_choice"]["acc_norm,none"] == np.mean(normed)

    answers = [slowly(bundled, sample["doc"]["prompt"], ["\n"], 20) for sample in samples["local_exact"]]
    assert [sample["filtered_resps"][0] for sample in samples["local_exact"]] == answers
    expected = [
        answer == sample["doc"]["response"] for answer, sample in zip(answers, samples["local_exact"], strict=True)
    ]
    assert results["local_exact"]["exact_match,none"] == np.mean(expected) > 0.2

    texts = [sample["doc"]["text"] for sample in samples["local_perplexity"]]
    nats = sum(p for text in texts for p, _ in steps(model, [0, *text.encode()]))
    per_byte = -nats / sum(len(text.encode()) for text in texts)
    assert results["local_perplexity"]["byte_perplexity,none"] == pytest.approx(math.exp(per_byte), rel=1e-4)


@pytest.mark.slow
def test_item_for_item_the_numbers_are_those_of_lm_evals_own_class_on_another_implementation(tmp_path):
    """lm_eval's HFLM on `rwkv7-hf`, which reads the folder that we export: model, tokens and numbers are theirs."""
    pytest.importorskip("rwkv7_hf", reason="rwkv7-hf is not installed")
    from lm_eval.models.huggingface import HFLM
    from rwkv7_hf import RWKV7ForCausalLM
    from transformers import AutoTokenizer

    from rwkv_bone.commands import convert

    folder = tmp_path / "fla"
    sys.argv = ["convert", "--base_model", str(BUNDLED), "--output", str(folder), "--layout", "fla"]
    assert convert() == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = RWKV7ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=1 << 20)
    assert_same_items(RWKVBone(str(BUNDLED), precision="fp32", device="cpu"), theirs, tmp_path)


def assert_same_items(ours, theirs, folder) -> None:
    names = write_tasks(folder, ours)
    (found, samples), (expected, other) = evaluate(ours, folder, names), evaluate(theirs, folder, names)
    for task in names:
        for one, two in zip(samples[task], other[task], strict=True):
            assert one["arguments"] == two["arguments"]
            if task in ("local_exact", "local_gsm8k"):
                assert one["filtered_resps"] == two["filtered_resps"]
            else:
                numbers = [np.array(s["filtered_resps"], dtype=float) for s in (one, two)]
                np.testing.assert_allclose(*numbers, atol=2e-3, rtol=1e-4)
        for name, value in expected[task].items():
            assert found[task][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


# The command.


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command: (status, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rwkv-bone-lm-eval", *words])
        # Reading the thousands of tasks that lm_eval brings takes 20 seconds.
        monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
        try:
            status = command()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


MODEL = ("--load_model", str(BUNDLED))


def test_the_command_passes_lm_evals_flags_on_as_they_are(run, bundled, tmp_path):
    write_tasks(tmp_path, bundled)
    status, out, _ = run(
        *(*MODEL, "--tasks", "local_exact", "--include_path", str(tmp_path), "--limit", "3", "--accelerator", "cpu"),
        *("--output_path", str(tmp_path / "out"), "--log_samples", "--gen_kwargs", "max_gen_toks=5", "--quant", "none"),
    )
    assert status == 0 and "local_exact" in out and "batch_size: auto" in out
    [results] = tmp_path.glob("out/*/results_*.json")
    assert json.loads(results.read_text())["config"]["model_args"] == {"pretrained": str(BUNDLED), "quant": "none"}
    [samples] = tmp_path.glob("out/*/samples_local_exact_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 3 and all(len(row["filtered_resps"][0]) == 5 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--load_model is missing"),
        (MODEL, "--tasks is missing"),
        ((*MODEL, "--tasks", "no_such_task"), "lm_eval: Tasks not found: no_such_task"),
        ((*MODEL, "--tasks", "x", "--model", "hf"), "--model: the model is given by --load_model"),
        ((*MODEL, "--tasks", "x", "--model_args", "a=1"), "--model_args: the model is given"),
        ((*MODEL, "--tasks", "x", "--accelerator", "cpu", "--device", "cuda"), "say the same: give one"),
        (
            (*MODEL, "--tasks", "x", "--adaptor", "a.pth"),
            "--adaptor is not a flag of rwkv-bone-lm-eval; did you mean --adapter?",
        ),
        ((*MODEL, "--tasks", "x", "--quant", "int3"), "--quant int3: expected one of"),
    ],
)
def test_wrong_words_end_the_command_before_anything_is_loaded(run, words, message):
    status, _, err = run(*words)
    assert status == 2 and message in err


def test_a_file_of_lm_evals_settings_may_not_name_another_model(run, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: hf\ntasks: [local_exact]\n", encoding="utf-8")
    status, _, err = run(*MODEL, "--config", str(path))
    assert status == 2 and f"model in --config {path}: the model is given by --load_model" in err


def test_without_lm_eval_the_command_says_what_to_install(run, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run(*MODEL, "--tasks", "x")
    assert (status, err) == (2, "error: lm_eval is not installed: pip install -r requirements/lm_eval.txt\n")
