"""A model class for EleutherAI's lm_eval, registered as `rwkv-bone`.

lm_eval looks for model classes only among its own, so this module must be imported first: scripts/lm_eval.sh does that,
or in Python

    import rwkv_bone.evaluation.harness
    lm_eval.simple_evaluate("rwkv-bone", model_args={"pretrained": "my-model.pth"}, tasks=["lambada_openai"])

A context and its continuation become tokens as in lm_eval's own class for Hugging Face models: white space at the end
of the context moves to the continuation, both are tokenised together, and the continuation is what follows the tokens
of the context alone. Where that would lose text, because one token reaches over the border, the continuation begins
with that token. A document begins with the end-of-document token, which is the context of an empty context too.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from rwkv_bone.console import progress_bar
from rwkv_bone.data.conversations import thinking
from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.devices import select_device
from rwkv_bone.errors import UserError
from rwkv_bone.inference.generate import BATCH, generate
from rwkv_bone.inference.likelihood import log_likelihoods, rolling
from rwkv_bone.inference.voice import Voice, enough_memory, load_voice, trained_with
from rwkv_bone.inference.wording import LATER, PROBES

NAME = "rwkv-bone"
MAX_NEW = 256  # tokens of an answer where a task does not say, as in lm_eval's own classes
KEPT = 16  # batches after which results go to lm_eval's cache (--use_cache)
# Arguments of generation that ask for nothing at these values. All others but those of `_sampling` are refused.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "use_cache": True}

log = logging.getLogger("rwkv_bone")


class _Prompt(NamedTuple):
    """ids: of the context. chat: whether `apply_chat_template` has written its end. after: what that ended with, with
    which the template begins an answer. opening: of a think block that the context leaves open, or nothing."""

    ids: list[int]
    chat: bool
    after: str
    opening: str


@register_model(NAME)
class RWKVBone(LM):
    """A model for lm_eval, in any form that --load_model takes, with an adapter on it if one is named.

    pretrained, peft: as --load_model and --adapter, under lm_eval's names, by which it names its results. quant to
    template: as the flags of these names. batch_size: texts at a time; auto = 32. device: cpu, cuda or
    cuda:N; None = a GPU if there is one. trust_remote_code: lm_eval passes it on; no model here has code of its own.
    UserError for all that is wrong with the files.
    """

    def __init__(
        self,
        pretrained: str,
        peft: str = "",
        quant: str = "auto",
        precision: str = "auto",
        tokenizer: str = "auto",
        template: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        self._device = torch.device(device or select_device("auto", 'device="cpu"'))
        self.batch_size = _batch(batch_size, max_batch_size)
        data, chosen = trained_with(peft, tokenizer, template)
        with enough_memory("while the model was loaded"):
            self.voice: Voice = load_voice(
                pretrained,
                peft,
                quant=quant,
                precision=precision,
                device=str(self._device),
                data=data,
                chosen=chosen,
            )
        log.info("%s", self.voice.header)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is what greedy generation writes) of each continuation."""
        cut = [self._cut(str(request.args[0]), str(request.args[1])) for request in requests]
        pairs, spanned = [pair for pair, _ in cut], sum(spans for _, spans in cut)
        if spanned:
            log.warning(
                "%d of %d continuations begin within a token that begins in their context: they are read from that "
                "token on, where lm_eval's own models would lose its text",
                spanned,
                len(pairs),
            )

        def measured(some: slice, done: Callable[[int], object]) -> list[tuple[float, bool]]:
            found = log_likelihoods(self.voice.model, pairs[some], done=done, **self._how)
            return [(one.total, one.greedy) for one in found]

        return self._in_parts("loglikelihood", requests, measured, "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability in nats of each text, from the end-of-document token on, whole however long it is."""
        texts = [self.voice.encode(request.args[0]) for request in requests]

        def measured(some: slice, done: Callable[[int], object]) -> list[float]:
            eod = self.voice.tokenizer.eod
            found = rolling(self.voice.model, texts[some], eod=eod, done=done, **self._how)
            return [one.total for one in found]

        return self._in_parts("loglikelihood_rolling", requests, measured, "log-likelihoods of texts")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each context, up to the first text of `until` or the end of the document, without it.

        gen_kwargs: until, max_gen_toks (256) or one of its other names, do_sample, temperature, top_p, top_k; UserError
        for any other. What an answer draws follows from lm_eval's seed of torch, its task and its document alone. A
        think block at the beginning of an answer is no part of it, and nothing in it ends the answer.
        """
        answers: dict[int, str] = {}
        seeds = self._seeds(requests)
        groups: dict[str, list[int]] = {}
        prompts = [self._prompt(request.args[0]) for request in requests]
        for number, request in enumerate(requests):
            prompt = prompts[number]
            key = json.dumps([request.args[1], prompt.chat, prompt.opening], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        with progress_bar(len(requests), "writing answers") as bar, enough_memory("while answers were written"):
            for numbers in groups.values():
                kwargs = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_NEW)
                first = prompts[numbers[0]]
                how: dict[str, Any] = {**_sampling(kwargs), "stop_texts": self._stops(kwargs["until"], first.chat)}
                for start in range(0, len(numbers), self.batch_size):
                    some = numbers[start : start + self.batch_size]
                    how["seed"] = [seeds[number] for number in some]
                    written = generate(
                        self.voice.model,
                        [prompts[number].ids for number in some],
                        max_new=kwargs["max_gen_toks"],
                        stop_id=self.voice.tokenizer.eod,
                        opening=first.opening,
                        tokenizer=self.voice.tokenizer,
                        batch=self.batch_size,
                        device=self._device,
                        **how,
                    )
                    for number, answer in zip(some, written, strict=True):
                        answers[number] = self._answer(answer, prompts[number])
                        self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                    bar.update(len(some))
        return [answers[number] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as --template writes them, up to where an answer begins.

        add_generation_prompt: False = the last message is the beginning of the answer. UserError where the template
        cannot write these messages.
        """
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        begun = ""
        if not add_generation_prompt:
            *turns, last = turns
            begun = last.text
        before, begins = self._before(turns, begun)
        return before + begins

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm_eval writes into its results about the template; UserError for the name of another one."""
        if chat_template is False or chat_template is None:
            return None
        template = self.voice.wording.template
        if not self.voice.wording.several:
            raise UserError(
                f"--apply_chat_template: --template {template.name} has no turns: give --template world, g1, alpaca or "
                "a file"
            )
        if isinstance(chat_template, str) and chat_template != template.name:
            raise UserError(
                f"--apply_chat_template {chat_template}: the template is {template.name}; another one is chosen with "
                f"--template {chat_template}"
            )
        return f"{template.name}: {template.identity()}"

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval tells its cached requests apart by: the template too, which has written them."""
        voice = self.voice
        return re.sub(r"[^\w.-]+", "_", f"{voice.tokenizer.identity()} {voice.wording.template.identity()}")

    @property
    def eot_token_id(self) -> int:
        return self.voice.tokenizer.eod

    @cached_property
    def _how(self) -> dict[str, Any]:
        return {"batch": self.batch_size, "device": self._device}

    def _in_parts(
        self, kind: str, requests: list[Instance], measured: Callable[..., list[Any]], doing: str
    ) -> list[Any]:
        """What `measured` finds for all requests, with a bar; lm_eval's cache gets the results as they come."""
        found: list[Any] = []
        size = KEPT * self.batch_size
        with progress_bar(len(requests), doing) as bar, enough_memory(f"while {doing} were computed"):
            for start in range(0, len(requests), size):
                results = measured(slice(start, start + size), bar.update)
                for request, result in zip(requests[start : start + size], results, strict=True):
                    self.cache_hook.add_partial(kind, request.args, result)
                found += results
        return found

    def _cut(self, context: str, continuation: str) -> tuple[tuple[list[int], list[int]], bool]:
        """((the ids of a context, those of its continuation), whether a token reaches over the border).

        Each has at least one id.
        """
        if not continuation:
            raise UserError(
                f"lm_eval asks how likely an empty continuation is, after {context[-40:]!r}: an empty choice would "
                "always be the likeliest; look at doc_to_choice or doc_to_target of the task"
            )
        encode, start = self.voice.encode, [self.voice.tokenizer.eod]
        border = len(context.rstrip())
        before, whole = encode(context[:border]), encode(context + continuation)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        return (whole[:same] or start, whole[same:]), same < len(before)

    def _prompt(self, context: str) -> _Prompt:
        """A context as `generate` reads it.

        What `apply_chat_template` has written ends with what the template begins an answer with, such as a space. That
        is the model's to write, as in training, and no part of the answer.
        """
        opening = self.voice.wording.opening
        chat = bool(opening) and context.endswith(opening + self._begins)
        if chat:
            context = context.removesuffix(self._begins)
        opened = context.rfind(thinking.BEGIN[:-1]) > context.rfind(thinking.END[:-1])
        ids = self.voice.encode(context) or [self.voice.tokenizer.eod]
        return _Prompt(ids, chat, self._begins if chat else "", thinking.BEGIN if opened else "")

    def _answer(self, ids: Sequence[int], prompt: _Prompt) -> str:
        text = self.voice.tokenizer.decode(list(ids))
        if (prompt.opening or text.lstrip().startswith(thinking.BEGIN)) and thinking.END in text:
            return text.partition(thinking.END)[2].lstrip()
        return text.removeprefix(prompt.after)

    def _stops(self, until: Sequence[Any], chat: bool) -> tuple[str, ...]:
        """Texts that end an answer: the task's, and in a chat what ends a turn."""
        texts = [str(text) for text in until] + [*(self.voice.wording.stops if chat else ())]
        return tuple(dict.fromkeys(text for text in texts if text))

    def _seeds(self, requests: Sequence[Instance]) -> list[str]:
        """One for each answer. The request of a document is there as many times as the task asks for answers."""
        asked: Counter[str] = Counter()
        seeds = []
        for request in requests:
            name = f"{torch.initial_seed()} {request.task_name} {request.doc_id}"
            seeds.append(f"{name} {asked[name]}")
            asked[name] += 1
        return seeds

    @cached_property
    def _begins(self) -> str:
        """What the template begins every answer with: a space in world."""
        return self._before([Turn("user", PROBES[0])])[1] if self.voice.wording.several else ""

    def _before(self, turns: Sequence[Turn], begun: str = "") -> tuple[str, str]:
        """(the text before the answer to these turns, what the template begins the answer with, and `begun`)."""
        talk = Conversation("the messages", (*turns, Turn("assistant", begun + LATER)))
        segments = self.voice.wording.template.render(talk)
        before = "".join(s.text for s in takewhile(lambda segment: LATER not in segment.text, segments))
        return before, next(s.text for s in segments if LATER in s.text).partition(LATER)[0]


def _batch(batch_size: int | str, largest: int | None) -> int:
    word = str(batch_size)
    if word.startswith("auto"):
        return min(BATCH, largest or BATCH)
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise UserError(f"--batch_size {batch_size}: expected at least 1, or auto")
    return int(word)


def _sampling(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of lm_eval's generation, normalised, as `Sampling` takes them."""
    other = {
        name: value
        for name, value in kwargs.items()
        if name not in ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
        and value is not None
        and value != NEUTRAL.get(name)
    }
    if other:
        raise UserError(
            f"--gen_kwargs, or the task: {', '.join(f'{name}={value}' for name, value in other.items())}: there is no "
            "such setting here; expected until, max_gen_toks, do_sample, temperature, top_p and top_k"
        )
    if not kwargs["do_sample"]:
        return {}
    if kwargs.get("temperature") is None:
        raise UserError("--gen_kwargs, or the task: do_sample without a temperature: give --gen_kwargs temperature=1.0")
    how = {"temperature": float(kwargs["temperature"])}
    how |= {name: kind(kwargs[name]) for name, kind in (("top_p", float), ("top_k", int)) if kwargs.get(name)}
    return how
