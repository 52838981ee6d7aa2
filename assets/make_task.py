"""Write numbers_train.jsonl and numbers_heldout.jsonl: numbers written out in English words.

    python assets/make_task.py

One row is {"prompt": "4207 in words: ", "response": "four thousand two hundred seven"}. Every number below 100 is in
the training rows; the rest of them and all held-out rows are drawn without repetition from 100 to 9999, so no number is
in both files. The seed is fixed: the script always writes the same bytes.
"""

import json
import random
from pathlib import Path

TRAIN_ROWS = 3000
HELDOUT_ROWS = 200
SEED = 20

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """The usual American form, without `and`: 4207 -> four thousand two hundred seven. For 0 <= number < 10000."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, rest, separator = TENS[number // 10 - 2], number % 10, "-"
    elif number < 1000:
        tens, rest, separator = UNITS[number // 100] + " hundred", number % 100, " "
    else:
        tens, rest, separator = UNITS[number // 1000] + " thousand", number % 1000, " "
    return tens + separator + in_words(rest) if rest else tens


def write(path: Path, numbers: list[int]) -> None:
    rows = ({"prompt": f"{number} in words: ", "response": in_words(number)} for number in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii", newline="\n")


def main() -> None:
    draw = random.Random(SEED)
    large = draw.sample(range(100, 10_000), TRAIN_ROWS - 100 + HELDOUT_ROWS)
    train = [*range(100), *large[HELDOUT_ROWS:]]
    draw.shuffle(train)
    folder = Path(__file__).parent
    write(folder / "numbers_train.jsonl", train)
    write(folder / "numbers_heldout.jsonl", large[:HELDOUT_ROWS])


if __name__ == "__main__":
    main()
