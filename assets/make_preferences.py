"""Write the preference sets: preferences_train.jsonl and voices_train.jsonl, each with its _heldout.jsonl, and prompts.

    python assets/make_preferences.py [FOLDER]

Rows are {"prompt": ..., "chosen": ..., "rejected": ...}. `preferences`: the rows of numbers_*.jsonl, each with a second
answer that is subtly wrong. `voices`: how a sentence goes on in Moby-Dick, and how one with the same beginning goes on
in a State of the Union address, from corpus_train.jsonl; no beginning is in both files. The seeds are fixed: the script
always writes the same bytes, into this folder unless another is given.
"""

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from make_task import TENS, UNITS

HERE = Path(__file__).parent
SEED = 18
DIGITS, TEENS = UNITS[1:10], UNITS[10:]
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PLAIN_SENTENCE = re.compile(r"[A-Z][A-Za-z ,;'-]{29,119}[.!?]")  # short, and without names of chapters or speakers
FIRST_ADDRESS = "To the Congress of the United States: Once again "  # 1961: where the novel ends in the corpus
HELDOUT_BEGINNINGS = 8  # every eighth
PROMPTS = ("The ", "Our ", "Every ", "They ")  # pairs begin with two words


def other_word(words: list[str], draw: random.Random) -> list[str]:
    """One number's word is another of its kind: seventy for forty."""
    place = draw.choice([i for i, word in enumerate(words) if word in UNITS[1:] or word in TENS])
    kind = next(kind for kind in (DIGITS, TEENS, TENS) if words[place] in kind)
    return [*words[:place], draw.choice([word for word in kind if word != words[place]]), *words[place + 1 :]]


def no_hyphen(words: list[str], draw: random.Random) -> list[str]:
    """A hyphen is missing: `seventy seven`."""
    return [" " if word == "-" else word for word in words]


def exchanged(words: list[str], draw: random.Random) -> list[str]:
    """Two digits are exchanged: `two thousand four` for `four thousand two`."""
    places = [i for i, word in enumerate(words) if word in DIGITS]
    if len(places) < 2:
        return words
    first, second = sorted(draw.sample(places, 2))
    return [*words[:first], words[second], *words[first + 1 : second], words[first], *words[second + 1 :]]


# None of them makes an answer much shorter or longer: a model would learn the length, and go on writing.
MISTAKES: tuple[Callable[[list[str], random.Random], list[str]], ...] = (other_word, no_hyphen, exchanged)


def subtly_wrong(answer: str, draw: random.Random) -> str:
    """The answer with one mistake, of a kind that changes it. `zero`, in which none can be made, becomes `one`."""
    words = re.split("([ -])", answer)
    for mistake in draw.sample(MISTAKES, len(MISTAKES)):
        try:
            found = "".join(mistake(words, draw))
        except IndexError:  # nothing of that kind in it
            continue
        if found != answer:
            return found
    return "one"


def number_pairs(source: Path) -> Iterator[dict[str, str]]:
    draw = random.Random(SEED)
    for line in source.read_text(encoding="ascii").splitlines():
        row = json.loads(line)
        yield {
            "prompt": row["prompt"],
            "chosen": row["response"],
            "rejected": subtly_wrong(row["response"], draw),
        }


def endings(texts: list[str]) -> dict[str, list[str]]:
    """{first two words: how sentences that begin so go on, by length}."""
    found: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        for sentence in SENTENCE_END.split(text):
            words = sentence.split(" ", 2)
            if PLAIN_SENTENCE.fullmatch(sentence) and len(words) == 3:
                found[f"{words[0]} {words[1]} "].add(words[2])
    return {beginning: sorted(rest, key=lambda text: (len(text), text)) for beginning, rest in found.items()}


def voice_pairs(source: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows. Endings of one beginning are paired by their length, so that length tells nothing."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="ascii").splitlines()]
    border = next(i for i, text in enumerate(texts) if text.startswith(FIRST_ADDRESS))
    novel, addresses = endings(texts[:border]), endings(texts[border:])
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for number, beginning in enumerate(sorted(novel.keys() & addresses.keys())):
        side = sides[number % HELDOUT_BEGINNINGS == 0]
        for chosen, rejected in zip(novel[beginning], addresses[beginning], strict=False):  # the fewer decide
            side.append({"prompt": beginning, "chosen": chosen, "rejected": rejected})
    draw = random.Random(SEED)
    for side in sides:
        draw.shuffle(side)
    return sides


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii", newline="\n")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for side in ("train", "heldout"):
        write(folder / f"preferences_{side}.jsonl", list(number_pairs(HERE / f"numbers_{side}.jsonl")))
    train, heldout = voice_pairs(HERE / "corpus_train.jsonl")
    write(folder / "voices_train.jsonl", train)
    write(folder / "voices_heldout.jsonl", heldout)
    (folder / "voices_prompts.txt").write_text(
        "".join(f"{prompt}\n" for prompt in PROMPTS), encoding="ascii", newline="\n"
    )


if __name__ == "__main__":
    main()
