"""Generation continues from states exactly as if the whole text were read again for every token."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.inference.generate import BATCH, PIECE, generate, read_beginning
from rwkv_bone.models import LayerState
from tests.conftest import random_model
from tests.live_bytes import LiveBytes

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13], [30, 31]]


@pytest.fixture(scope="module")
def model():
    return random_model(seed=3).eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in lengths]


class Letters:
    """A tokenizer with a letter for each id."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 0x4E00 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


@torch.no_grad()
def slowly(model, prompt: list[int], max_new: int, stop_id: int | None) -> list[int]:
    """Greedy decoding without any state."""
    ids = list(prompt)
    for _ in range(max_new):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == stop_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("targets", [None, ("head",)])
def test_last_only_gives_the_logits_of_the_last_position_of_each_sequence(version, targets):
    model = random_model(seed=4, version=version)
    inject(model, settings=AdapterSettings("bone", 8), targets=targets)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    logits, state = model(ids, return_state=True)
    last, same = model(ids, last_only=True, return_state=True)
    torch.testing.assert_close(last, logits[:, -1])
    assert all(map(torch.equal, same[1], state[1]))
    packed = {"cu_seqlens": torch.tensor([0, 1, 6, 8])}
    last = model(ids.view(1, 8), last_only=True, **packed)
    torch.testing.assert_close(last, model(ids.view(1, 8), **packed)[0, [0, 5, 7]])
    with pytest.raises(ValueError, match="last_only"):
        model(ids, labels=ids, last_only=True)


def test_greedy_batch_equals_reading_everything_again_for_each_prompt(model):
    expected = [slowly(model, prompt, 12, None) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new=12, stop_id=None) == expected
    assert len(set(map(tuple, expected))) > 1


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("kwargs", [{"batch": 2}, {"piece": 1}, {"piece": 3}, {"piece": 4, "batch": 3}, {"piece": 8}])
def test_an_answer_does_not_depend_on_how_many_are_under_way_nor_on_how_prompts_are_read(version, kwargs):
    """Pieces smaller than prompts, of several prompts, and ending where a prompt ends (tokens 3, 4 and 12)."""
    model = random_model(seed=3, version=version).eval()
    model.add_time_state()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_(generator=torch.Generator().manual_seed(0))
    expected = [slowly(model, prompt, 6, None) for prompt in PROMPTS]
    stop = expected[0][3]
    assert generate(model, PROMPTS, max_new=6, stop_id=None, **kwargs) == expected
    assert generate(model, PROMPTS, max_new=6, stop_id=stop, **kwargs) == [slowly(model, p, 6, stop) for p in PROMPTS]


def adder(ids, state=None, return_state=False, last_only=False, cu_seqlens=None):
    """A "model" that forgets nothing: the next token is the sum of all tokens before it, modulo 61."""
    documents = ids if cu_seqlens is None else ids[0].tensor_split(cu_seqlens[1:-1])
    sums = torch.stack([document.sum() for document in documents])
    if state is not None:
        sums[: len(state[0].wkv)] += state[0].wkv
    return F.one_hot(sums % 61, 61), [LayerState(sums, sums, sums)]


def test_every_token_of_a_prompt_counts_however_long_it_is():
    prompts = prompts_of(3, 2 * PIECE + 500, PIECE, 1, 2 * PIECE)
    first = [sum(prompt) % 61 for prompt in prompts]
    expected = [[token, 2 * token % 61, 4 * token % 61] for token in first]
    assert generate(adder, prompts, max_new=3, stop_id=None) == expected


def test_each_answer_ends_before_its_own_stop_token(model):
    free = [slowly(model, prompt, 12, None) for prompt in PROMPTS]
    stop = free[0][4]
    answers = generate(model, PROMPTS, max_new=12, stop_id=stop)
    assert answers == [slowly(model, prompt, 12, stop) for prompt in PROMPTS]
    assert {len(answer) for answer in answers} != {12}


def test_one_token_and_no_token_and_no_prompt(model):
    assert generate(model, PROMPTS, max_new=1, stop_id=None) == [slowly(model, p, 1, None) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new=0) == [[] for _ in PROMPTS]
    assert generate(model, [], max_new=5) == []


def test_an_empty_prompt_and_limits_below_one_are_refused(model):
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[1], []], max_new=2)
    for limit in ("batch", "piece"):
        with pytest.raises(ValueError, match=f"{limit} -1"):
            generate(model, [[1]], max_new=2, **{limit: -1})


@pytest.mark.parametrize(
    "setting,value",
    [
        *[("top_p", value) for value in (0.0, -0.1, 1.1, float("nan"))],
        *[("temperature", value) for value in (-1.0, float("nan"), float("inf"))],
        ("max_new", -1),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(model, setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}: expected"):
        generate(model, [[1]], **{"max_new": 2, "temperature": 1.0, setting: value})


def test_batches_that_are_done_are_told(model):
    told = []
    generate(model, [[1], [2], [3]], max_new=2, batch=2, done=told.append)
    assert told == [2, 1]


def test_sampling_repeats_with_its_seed_and_changes_with_it(model):
    def draw(seed):
        return generate(model, PROMPTS, max_new=16, stop_id=None, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_what_a_prompt_draws_does_not_depend_on_the_prompts_beside_it(model):
    how = {"stop_id": None, "temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    limits, seeds = [9, 0, 16, 12, 5], [5, 6, 7, 8, 9]
    together = generate(model, PROMPTS, max_new=limits, seed=seeds, **how)
    assert [len(answer) for answer in together] == limits
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], max_new=limits[i], seed=[seeds[i]], **how) == [together[i]]
    assert generate(model, PROMPTS, max_new=limits, seed=seeds, batch=2, **how) == together
    # Of one seed the same prompt draws different numbers in each place.
    first, second = generate(model, [PROMPTS[0]] * 2, max_new=12, seed=5, **how)
    assert first != second


def test_on_a_processor_the_model_itself_reads_nothing_but_prompts(model, monkeypatch):
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **how: read.append(ids.numel()) or forward(ids, **how))
    answers = generate(model, PROMPTS, max_new=[4, 1, 6, 3, 5], stop_id=None, batch=3)
    assert [len(answer) for answer in answers] == [4, 1, 6, 3, 5]
    assert read == [sum(map(len, PROMPTS[:3])), sum(map(len, PROMPTS[3:]))]


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("piece", [7, 64])
def test_what_prompts_begin_with_and_equal_prompts_are_read_once(version, piece):
    model, read = random_model(seed=3, version=version).eval(), []
    model.add_time_state()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_(generator=torch.Generator().manual_seed(0))
    [examples] = prompts_of(20)
    # The third is nothing but what the others begin with, so its last token is read with the rest of each.
    prompts = [examples + rest for rest in ([5, 6, 7], [9], [], [5, 6, 7], [1, 2, 3, 4, 5, 6])]
    expected = [slowly(model, prompt, 6, None) for prompt in prompts]
    assert len(set(map(tuple, expected))) > 2

    def counted(ids, **how):
        read.append(ids.numel())
        return model(ids, **how)

    assert generate(counted, prompts, max_new=6, stop_id=None, piece=piece) == expected
    assert sum(read) == 19 + (4 + 2 + 1 + 7) + 5 * 5
    # One that several calls share.
    known = read_beginning(model, prompts, piece=piece)
    read.clear()
    assert generate(counted, prompts, max_new=6, stop_id=None, piece=piece, batch=2, known=known) == expected
    assert sum(read) == (4 + 2) + (1 + 4) + 7 + 5 * 5
    with pytest.raises(ValueError, match="begin with its 19 tokens"):
        generate(model, [prompts[0], examples[:19]], max_new=1, known=known)
    with pytest.raises(ValueError, match="begin with its 19 tokens"):
        generate(model, [prompts[0], [*examples[:18], 0, 1]], max_new=1, known=known)


def test_a_beginning_that_is_short_gets_no_pass_of_its_own(model):
    assert read_beginning(model, [[1] * 15 + [2, 3], [1] * 15 + [4, 5]]) is None
    assert read_beginning(model, [[1] * 17 + [2]]) is None


def test_a_stop_text_ends_the_answer_that_holds_it_and_no_other(model):
    tokenizer = Letters()
    free = [tokenizer.decode(answer) for answer in generate(model, PROMPTS, max_new=14, stop_id=None)]
    stop = free[0][5:8]
    found = generate(model, PROMPTS, max_new=14, stop_id=None, stop_texts=[stop], tokenizer=tokenizer, batch=3)
    assert [tokenizer.decode(answer) for answer in found] == [text.partition(stop)[0] for text in free]
    assert len(free[0]) > len(found[0]) < max(map(len, found))
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return model(*args, **kwargs)

    generate(counting, PROMPTS[:1], max_new=14, stop_id=None, stop_texts=[stop], tokenizer=tokenizer)
    # The prompt gives the first letter; what would come after the stop text is not computed.
    assert len(calls) == free[0].index(stop) + len(stop) < 14


def test_why_each_answer_ended_is_told_in_order_and_nothing_is_written_after(model):
    tokenizer, passes = Letters(), []

    def counted(*arguments, **how):
        passes.append(how)
        return model(*arguments, **how)

    free = generate(model, PROMPTS, max_new=14, stop_id=None)
    texts = [tokenizer.decode(answer) for answer in free]
    stop = texts[0][5:8]
    for how, expected in (
        ({"stop_id": None, "stop_texts": [stop]}, ["text" if stop in text else "length" for text in texts]),
        ({"stop_id": free[0][5]}, ["end" if free[0][5] in answer else "length" for answer in free]),
    ):
        found: list[str] = []
        generate(model, PROMPTS, max_new=14, tokenizer=tokenizer, ended=found.append, **how)
        assert found == expected and len(set(found)) == 2
    generate(counted, PROMPTS[:1], max_new=14, stop_id=None, stop_texts=[stop], tokenizer=tokenizer)
    assert len(passes) == texts[0].index(stop) + len(stop)  # a token is a letter; the first is of the prompt's pass


def test_each_prompt_needs_its_own_number(model):
    for given in ({"max_new": [1, 2]}, {"max_new": 1, "seed": [1]}):
        with pytest.raises(ValueError, match="expected one for each of the 5 prompts"):
            generate(model, PROMPTS, **given)
    with pytest.raises(ValueError, match="stop_texts need the tokenizer"):
        generate(model, PROMPTS, max_new=1, stop_texts=["x"])


def test_a_small_top_p_leaves_only_the_likeliest_token(model):
    greedy = generate(model, PROMPTS, max_new=8, stop_id=None)
    assert generate(model, PROMPTS, max_new=8, stop_id=None, temperature=1.0, top_p=1e-6) == greedy


def test_tokens_outside_top_p_are_never_drawn():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def fixed(ids, state=None, return_state=False, last_only=False, cu_seqlens=None):
        return logits, []

    drawn = set()
    for seed in range(40):
        drawn.update(generate(fixed, [[0]], max_new=5, stop_id=None, temperature=1.0, top_p=0.7, seed=seed)[0])
    assert drawn == {0, 1}


def test_no_gradient_is_recorded(model):
    calls = []

    def spy(ids, **kwargs):
        result = model(ids, **kwargs)
        calls.append(result[0].requires_grad)
        return result

    generate(spy, PROMPTS, max_new=3, stop_id=None)
    assert calls and not any(calls)


def test_each_token_waits_for_the_device_once(monkeypatch):
    """To know who has stopped; nothing else is fetched, drawing included."""
    fetched, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: fetched.append("tolist") or tolist(tensor))

    class Fetches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                fetched.append(str(func))
            return func(*args, **(kwargs or {}))

    def even(ids, state=None, return_state=False, last_only=False, cu_seqlens=None):
        return torch.zeros(len(ids) if cu_seqlens is None else len(cu_seqlens) - 1, 4), []

    with Fetches():
        answers = generate(even, PROMPTS, max_new=7, stop_id=3, temperature=1.0, top_p=0.9)
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < max(lengths) == 7  # some stop, some do not
    assert fetched == ["tolist"] * 7


def peak_bytes(model, prompts, **options) -> int:
    with LiveBytes() as live:
        generate(model, prompts, max_new=3, stop_id=None, **options)
    return live.peak


@pytest.fixture(scope="module")
def wide_model():
    """The vocabulary of released models, beside which everything else is small."""
    return random_model(n_embd=16, vocab_size=65536).eval()


def test_memory_does_not_grow_with_the_number_of_prompts(wide_model):
    lengths = [5 + n % 7 for n in range(8)]
    few, many = (peak_bytes(wide_model, prompts_of(*lengths * times), batch=8) for times in (3, 12))
    assert many <= 1.01 * few
    # Nor do states pile up where they are large and the vocabulary is not.
    model = random_model(n_embd=128, head_size=64).eval()
    # (The vectors of a token stay from batch to batch.)
    assert peak_bytes(model, prompts_of(*[3] * 4 * BATCH)) <= 1.03 * peak_bytes(model, prompts_of(*[3] * BATCH))


def test_memory_does_not_grow_with_the_length_of_a_prompt(wide_model):
    """Nor do the logits of its other positions take any: one row has 256 kB."""
    short, long, longer = (peak_bytes(wide_model, prompts_of(length)) for length in (PIECE, 2676, 8 * PIECE))
    assert longer <= 1.1 * short and long <= 1.1 * short
    assert peak_bytes(wide_model, prompts_of(300)) < 300 * 65536 * 4 / 10


def test_memory_does_not_grow_with_the_length_of_many_prompts(wide_model):
    short, long = (peak_bytes(wide_model, prompts_of(*[length] * 24), piece=128) for length in (16, 160))
    assert long <= 1.05 * short


def test_the_states_of_prompts_are_held_twice_at_most():
    """Once as they were before a token, once after it; also where prompts end within pieces."""
    model = random_model(n_layer=12, n_embd=64, head_size=64).eval()
    for block in model.blocks:
        block.att.op = "cpu"  # which needs little beside
    with torch.no_grad():
        _, state = model(torch.tensor([[1]]), return_state=True)
    states = 16 * sum(part.nbytes for layer in state for part in layer)
    for length, piece in ((3, 64), (3, 4), (20, 16)):
        assert 2 * states <= peak_bytes(model, prompts_of(*[length] * 16), piece=piece) < 2.3 * states
