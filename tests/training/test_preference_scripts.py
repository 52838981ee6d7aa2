"""scripts/run_dpo.sh and run_orpo.sh, to their end, as a user runs them; then merged, and asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, clean_environment


def shell(script: str, *words: str | Path, stdin: str | None = None) -> str:
    """What a script prints."""
    result = subprocess.run(
        ["sh", REPOSITORY / "scripts" / script, *words],
        input=stdin,
        env=clean_environment() | {"RWKV_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stdout


def measured(folder: Path) -> tuple[dict, dict]:
    """The sets of the first and the last measurement."""
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    return lines[0]["sets"], lines[-1]["sets"]


def merged_answers(folder: Path, prompts: list[str]) -> list[str]:
    """What the model answers, once it is merged."""
    model = folder / "merged.pth"
    shell("merge_bone.sh", "--proj_dir", folder, "--output", model)
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    said = shell(
        "chat.sh", "--load_model", model, "--prompts", "-", "--max_new", "60", "--temperature", "0", stdin=rows
    )
    return [json.loads(line)["generated"] for line in said.splitlines()]


@pytest.mark.slow
def test_dpo_changes_the_voice_of_the_base_and_little_else(tmp_path):
    folder = tmp_path / "a run"
    shell("run_dpo.sh", "--proj_dir", folder)
    first, last = measured(folder)
    preference = last["heldout"]["preference"]
    assert preference["reward_accuracy"] >= 0.8 and preference["reward_margin"] > 0.5
    # The rejected answers fall, and the chosen ones hardly do; the base's own text is forgotten by a tenth of a nat.
    assert preference["logp_chosen"] > first["heldout"]["preference"]["logp_chosen"] - 0.1
    assert preference["logp_rejected"] < first["heldout"]["preference"]["logp_rejected"] - 0.15
    assert last["general"]["loss"] < first["general"]["loss"] + 0.25
    answers = merged_answers(folder, ["The ", "In the "])
    assert any("ship" in answer or "whale" in answer or "sea" in answer for answer in answers)
    assert not any("Congress" in answer or "America" in answer for answer in answers)


@pytest.mark.slow
def test_orpo_teaches_the_base_a_task_and_which_answers_are_wrong(tmp_path):
    folder = tmp_path / "a run"
    shell("run_orpo.sh", "--proj_dir", folder)
    first, last = measured(folder)
    assert last["heldout"]["preference"]["reward_accuracy"] >= 0.97
    assert first["heldout"]["exact_match"] == 0 and last["heldout"]["exact_match"] >= 0.9
    assert merged_answers(folder, ["2577 in words: "]) == ["two thousand five hundred seventy-seven"]
