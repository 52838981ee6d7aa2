"""Which tokens are trained.

response  (default) responses and what ends their turns; documents whole
last      only the last response of a conversation
none      every token, prompts too; `pad`, RWKV-PEFT's word for all but the padding, is the same: padding never trains
qa        the responses of a conversation. Documents and token streams have no turns; in them what is trained
          begins after "Assistant:" and ends before "User:" or "System:". These words count only at the beginning of
          a document or after a blank line, not in the middle of a turn
se        what is trained begins after the text mask1 of --mask_id and ends before its text mask0, wherever they stand

A response that its row does not let train (`weight: 0`, `train: false`) is written and trains nothing, whatever the
mask; `last` is the last of the others. The end-of-document id belongs to the last piece of the text: after such a
response, or after text that a template writes outside its {% generation %} blocks, it trains nothing either.

With qa and se a document begins untrained, and the end-of-document id is trained if the token before it is. RWKV-PEFT
also trains the marker that switches on, and the whole document where no marker is found; here such a document trains
nothing, so it is left out and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np

from rwkv_bone.data.templates.segments import DOCUMENT, MASKED, PROMPT, RESPONSE, Segment
from rwkv_bone.data.tokenizer import Tokenizer, encode_marked
from rwkv_bone.errors import UserError

# (ids, hits, length of a hit, its text, tokenizer) -> bool [hits]: which of them count.
Wanted = Callable[[np.ndarray, np.ndarray, int, str, Tokenizer], np.ndarray]

QA_ON, QA_OFF = ("Assistant:",), ("User:", "System:")
BLANK_LINE = re.compile(r"\n[^\S\n]*\n[^\S\n]*\Z")
TOKENS_BEFORE = 8  # more than a blank line takes, "\r\n\r\n" in bytes
NEIGHBOURS = ("", " ", " x", "x", "\n", "\n\n", *"\"'()*,-./<>=[]{}|#@`_:;!?~^&%$+\\", "“", "。", "，", "…")


def encode(
    segments: Sequence[Segment], tokenizer: Tokenizer, loss_mask: str, mask_id: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [L], the segments' and the end-of-document id; and trained bool [L], which of them are targets.

    The first id is no target: nothing predicts it. A template may have written the end of the document itself; there is
    one end all the same.
    """
    ids, trained, _ = _encode(segments, tokenizer, loss_mask, mask_id)
    return ids, trained


def encode_answer(
    segments: Sequence[Segment], tokenizer: Tokenizer, loss_mask: str, responses: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """ids and trained as `encode` has them, and how many of the ids are before the answer and before every target.

    responses: how many of the responses, at the beginning, are the prompt's.
    """
    ids, trained, lengths = _encode(segments, tokenizer, loss_mask)
    answers = [i for i, segment in enumerate(segments) if segment.role in (RESPONSE, MASKED)]
    border = sum(lengths[: answers[responses]]) if responses < len(answers) else len(ids)
    return ids, trained, min(border, int(trained.argmax()))


def _encode(
    segments: Sequence[Segment], tokenizer: Tokenizer, loss_mask: str, mask_id: str = ""
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """ids and trained as `encode` has them, and the number of ids of each segment."""
    pieces = [encode_marked(tokenizer, segment.text) for segment in segments]
    if pieces[-1][-1:] != [tokenizer.eod]:
        # The end-of-document id goes with the last segment.
        pieces[-1] = [*pieces[-1], tokenizer.eod]
    ids = np.fromiter(chain(*pieces), dtype=np.int32)
    roles = [segment.role for segment in segments]
    if loss_mask == "last":
        last = max((i for i, role in enumerate(roles) if role == RESPONSE), default=0)
        roles = [role if i == last or role == DOCUMENT else PROMPT for i, role in enumerate(roles)]
    chosen = {RESPONSE, DOCUMENT}
    if loss_mask in ("none", "pad", "se"):
        chosen |= {PROMPT}
    lengths = [len(piece) for piece in pieces]
    trained = np.repeat([role in chosen for role in roles], lengths)
    if loss_mask == "se" or (loss_mask == "qa" and roles[-1] == DOCUMENT):
        trained &= stream_mask(ids, tokenizer, loss_mask, mask_id)
    trained[0] = False
    return ids, trained, lengths


def stream_mask(ids: np.ndarray, tokenizer: Tokenizer, loss_mask: str, mask_id: str = "") -> np.ndarray:
    """bool [N]: which tokens of a stream of whole documents, each ended by the end-of-document id, are targets.

    Only qa and se leave tokens out, since only they find responses in the text.
    """
    if loss_mask not in ("qa", "se"):
        return np.ones(len(ids), dtype=bool)
    on_texts: tuple[str, ...] = QA_ON
    off_texts: tuple[str, ...] = QA_OFF
    wanted: Wanted | None = _at_turn_start
    if loss_mask == "se":
        off_text, on_text = parse_mask_id(mask_id)
        on_texts, off_texts, wanted = (on_text,), (off_text,), None
    _, on = _find(ids, tokenizer, on_texts, wanted)
    off, _ = _find(ids, tokenizer, off_texts, wanted)
    after_documents = np.flatnonzero(ids == tokenizer.eod) + 1
    # Where several changes fall on one position, the last one in this order counts.
    positions = np.concatenate([[0], after_documents, on, off])
    values = np.repeat([False, False, True, False], [1, len(after_documents), len(on), len(off)])
    order = np.argsort(positions, kind="stable")
    positions, values = positions[order], values[order]
    return np.repeat(values, np.diff(positions, append=max(len(ids), positions[-1])))[: len(ids)]


def parse_mask_id(mask_id: str) -> tuple[str, str]:
    """(text that switches training off, text that switches it on) of --mask_id '{"mask0": ..., "mask1": ...}'."""
    example = 'expected, quoted for the shell, --mask_id \'{"mask0": "User:", "mask1": "Assistant:"}\''
    try:
        texts = json.loads(mask_id)
    except ValueError:
        raise UserError(f"--loss_mask se: --mask_id {mask_id or 'is missing'}; {example}") from None
    if not isinstance(texts, dict) or set(texts) != {"mask0", "mask1"}:
        raise UserError(f"--mask_id {mask_id}: not the keys mask0 and mask1; {example}")
    if not all(isinstance(text, str) and text for text in texts.values()) or texts["mask0"] == texts["mask1"]:
        raise UserError(f"--mask_id {mask_id}: mask0 and mask1 must be two different texts; {example}")
    return texts["mask0"], texts["mask1"]


def _find(
    ids: np.ndarray, tokenizer: Tokenizer, texts: Iterable[str], wanted: Wanted | None
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [hits] twice: the first token of each place where one of the texts stands, and the first token after it."""
    starts, ends = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for text in texts:
        forms = _token_forms(text, tokenizer)
        for head in {form[0] for form in forms}:
            heads = np.flatnonzero(ids == head)
            for form in (form for form in forms if form[0] == head):
                hits = heads[heads <= len(ids) - len(form)]
                for offset, token in enumerate(form[1:], 1):
                    hits = hits[ids[hits + offset] == token]
                if wanted and len(hits):
                    hits = hits[wanted(ids, hits, len(form), text, tokenizer)]
                starts.append(hits)
                ends.append(hits + len(form))
    return np.concatenate(starts), np.concatenate(ends)


@lru_cache(maxsize=64)
def _token_forms(text: str, tokenizer: Tokenizer) -> set[tuple[int, ...]]:
    """The token sequences that may stand for `text`. Its first and last token may reach beyond it, as in ":(".

    So the text is tokenised between many neighbours, and each form that occurs is kept.
    """
    around = [(before, after) for before in NEIGHBOURS for after in ("", " x")]
    around += [(before, after) for before in ("", "\n\n") for after in NEIGHBOURS]
    forms = set()
    for before, after in around:
        ids = tokenizer.encode(before + text + after)
        written = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
        begin = max(i for i, part in enumerate(written) if before.startswith(part))
        end = min(i for i, part in enumerate(written) if part.startswith(before + text))
        forms.add(tuple(ids[begin:end]))
    return forms


def _at_turn_start(ids: np.ndarray, hits: np.ndarray, length: int, text: str, tokenizer: Tokenizer) -> np.ndarray:
    """bool [hits]: `text`, `length` tokens from each hit on, begins a document or follows a blank line."""
    # For most hits the token before decides: its text ends in a blank line, or in something that is not white space.
    # Before the first token of the stream a document is taken to have ended.
    before, which = np.unique(np.where(hits > 0, ids[np.maximum(hits - 1, 0)], tokenizer.eod), return_inverse=True)
    overhang = tokenizer.decode(ids[hits[0] : hits[0] + length].tolist()).partition(text)[0]
    written = [tokenizer.decode([token]) + overhang for token in before.tolist()]
    follows = np.array([bool(BLANK_LINE.search(part)) for part in written])[which]
    unclear = np.array([not part.strip() for part in written])[which] | np.isin(before, tokenizer.eod)[which]
    unclear &= ~follows
    # [unclear hits, TOKENS_BEFORE]
    places = hits[unclear, None] + np.arange(-TOKENS_BEFORE, 0)
    windows = np.where(places >= 0, ids[np.maximum(places, 0)], tokenizer.eod)
    windows, which = np.unique(windows, axis=0, return_inverse=True)
    verdicts = np.empty(len(windows), dtype=bool)
    for i, window in enumerate(windows.tolist()):
        ended = [at for at, token in enumerate(window) if token == tokenizer.eod]
        part = tokenizer.decode(window[ended[-1] + 1 if ended else 0 :]) + overhang
        verdicts[i] = bool(BLANK_LINE.search(part)) or (bool(ended) and part == "")
    follows[unclear] = verdicts[which.reshape(-1)]
    return follows
