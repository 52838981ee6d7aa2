"""What fits into the line of a terminal, and what it says of the held-out data."""

import io
import os
import pty
import struct
from fcntl import ioctl
from termios import TIOCSWINSZ
from types import SimpleNamespace

import pytest

from rwkv_bone.training.module import Window
from rwkv_bone.training.progress import IMPORTANT, SHOWN, ProgressLines, answer_words, fitted, heldout_words

WORDS = {
    "step": "step 340/752",
    "loss": "loss 0.0123",
    "held-out": "held-out 0.0140 ^",
    "best": "best 0.0123 at 300",
    "general": "general 1.2404 ^",
    "left": "0:35 left",
    "speed": "9,123 tokens/s",
    "epoch": "epoch 2/4",
    "lr": "lr 1.00e-03",
    "accuracy": "accuracy 71%",
    "margin": "margin 0.52",
}
ANSWERS = ("accuracy", "margin")  # what only preference tuning shows


def measured(step, loss, general=None):
    sets = {"mine": {"loss": loss}} | ({"prose": {"loss": general}} if general else {})
    return {"step": step, "sets": sets, "main": "mine", "general": "prose" if general else None}


def words(*points):
    return heldout_words([measured(*point) for point in points])


@pytest.mark.parametrize(
    "width, line",
    [
        (39, "step 340/752  loss 0.0123  0:35 left"),
        (10, ""),
        (79, "step 340/752  loss 0.0123  accuracy 71%  held-out 0.0140 ^  0:35 left"),
        (
            119,
            "step 340/752  loss 0.0123  accuracy 71%  margin 0.52  held-out 0.0140 ^  best 0.0123 at 300  0:35 left  "
            "9,123 tokens/s",
        ),
        (199, "  ".join(WORDS[name] for name in SHOWN)),
    ],
)
def test_a_terminal_shows_the_most_important_words_that_fit(width, line):
    found, free = fitted(WORDS, width)
    assert found == line and len(found) + free == width + (2 if not line else 0)


def test_every_word_has_a_place():
    assert sorted(IMPORTANT) == sorted(SHOWN) == sorted(WORDS)


def test_eighty_columns_have_room_for_the_best_of_a_run_without_preferences():
    rest = {name: word for name, word in WORDS.items() if name not in ANSWERS}
    assert fitted(rest, 79)[0] == "step 340/752  loss 0.0123  held-out 0.0140 ^  best 0.0123 at 300  0:35 left"


def test_preference_tuning_shows_accuracy_and_margin_of_the_last_steps_and_of_held_out_pairs():
    assert answer_words([{"loss": 1.0}]) == {}
    steps = [{"reward_accuracy": share, "reward_margin": margin} for share, margin in ((0.5, 0.1), (0.75, 0.4))]
    none = dict.fromkeys(("reward_accuracy", "reward_margin"))  # of a step that was skipped
    assert answer_words([*steps, none]) == {"accuracy": "accuracy 62%", "margin": "margin 0.25"}
    assert answer_words([{"reward_accuracy": None, "reward_margin": -0.1}]) == {"margin": "margin -0.10"}
    line = measured(5, 1.5)
    line["sets"]["mine"]["preference"] = {"reward_accuracy": 0.712}
    assert heldout_words([measured(0, 2.0), line])["held-out"] == "held-out 1.5000 v, 71%"
    progress = begun(Lines())
    progress.step_log.records.append({"tokens": 1, "seconds": 1.0, "loss": 0.7} | steps[1])
    step(progress, 5)
    assert "  loss 0.8500  accuracy 75%  margin 0.40  lr 1.00e-03  " in progress.stream.getvalue()


def test_without_held_out_data_the_rest_fits_into_eighty_columns():
    rest = {name: word for name, word in WORDS.items() if name not in ("held-out", "best", "general", *ANSWERS)}
    assert fitted(rest, 79)[0] == "step 340/752  loss 0.0123  0:35 left  9,123 tokens/s  epoch 2/4  lr 1.00e-03"


def test_a_measurement_is_shown_with_its_trend_and_the_best_while_that_is_an_older_one():
    assert words() == {}
    assert words((0, 2.0)) == {"held-out": "held-out 2.0000"}
    assert words((0, 2.0), (10, 1.5)) == {"held-out": "held-out 1.5000 v"}
    assert words((0, 2.0), (10, 1.5), (20, 1.6)) == {"held-out": "held-out 1.6000 ^", "best": "best 1.5000 at 10"}
    assert words((0, 2.0), (10, 1.5), (20, 1.6), (30, 1.6001))["held-out"] == "held-out 1.6001 ="
    # What was measured before training is the best of nothing that was saved.
    assert words((0, 2.0), (10, 2.5), (20, 2.6))["best"] == "best 2.5000 at 10"
    assert words((0, 2.0, 1.2), (10, 1.5, 1.3)) == {"held-out": "held-out 1.5000 v", "general": "general 1.3000 ^"}


class Lines(io.StringIO):
    """Standard output that is no terminal."""


def step(progress, number, total=100, loss=1.0):
    progress.step_log.records.append({"step": number, "loss": loss, "tokens": 100, "seconds": 0.1})
    window = Window(number, 0, loss, 1e-3, 100, 60, 0.5)
    module = SimpleNamespace(window=window, window_finished=lambda: True, total_steps=total, first_step=0, epochs=1)
    progress.on_train_batch_end(SimpleNamespace(is_global_zero=True), module, None, None, number)


def begun(stream, **options):
    progress = ProgressLines(SimpleNamespace(records=[]), stream, **options)
    progress.on_train_start(SimpleNamespace(is_global_zero=True), SimpleNamespace(total_steps=100, first_step=0))
    return progress


def test_plain_lines_have_the_held_out_loss_once_it_is_measured_also_by_an_earlier_process():
    progress = begun(Lines())
    step(progress, 1)
    progress.measured(measured(0, 2.0))
    progress.measured(measured(5, 1.5))
    step(progress, 5)
    first, second = progress.stream.getvalue().splitlines()
    assert "held-out" not in first and "  loss 1.0000  held-out 1.5000 v  lr 1.00e-03  " in second
    progress = begun(Lines(), measurements=[measured(0, 2.0), measured(5, 1.5)])
    step(progress, 1)
    assert "  held-out 1.5000 v  " in progress.stream.getvalue()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal_also_when_that_becomes_narrower(columns):
    main, other = pty.openpty()
    sizes = [columns, columns // 2, columns]
    with os.fdopen(other, "w") as stream, os.fdopen(main, "rb", buffering=0) as screen:
        ioctl(other, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        progress = begun(stream, measurements=[measured(0, 2.0), measured(5, 1.5), measured(10, 1.6)])
        progress._bar.mininterval = 0
        for size in sizes:
            ioctl(other, TIOCSWINSZ, struct.pack("HHHH", 24, size, 0, 0))
            screen_of(screen)
            step(progress, 50)
            stream.flush()
            drawn = screen_of(screen).split("\r")[-1].replace("\033[A", "")
            assert "step 50/100"[: size - 1] in drawn or size < 12
            assert len(drawn.rstrip()) < size
            assert ("0:00 left" in drawn) == (size >= 40), "what matters less takes its place"
            assert ("held-out 1.6000 ^" in drawn) == (size >= 80) and ("best 1.5000 at 5" in drawn) == (size >= 80)
        progress._close()


def screen_of(screen) -> str:
    """What was written to a terminal and not read yet."""
    os.set_blocking(screen.fileno(), False)
    return (screen.read(65536) or b"").decode()
