"""JSON that is sealed tells of any change of what it says, and of none of how it is written."""

import json

import pytest

from rwkv_bone.config.checksum import is_intact, sealed
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import from_json, to_json

CONTENT = {"step": 3, "loss": 0.1, "text": "é\ud800", "more": [1, {"a": None}]}


def test_any_change_of_a_value_or_name_is_noticed_and_spaces_are_not():
    written = json.dumps(sealed(CONTENT))
    assert is_intact(json.loads(written), CONTENT) and is_intact(
        json.loads(json.dumps(json.loads(written), indent=9)), ()
    )
    changed = 0
    for bit in range(8 * len(written)):
        flipped = bytearray(written.encode())
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = json.loads(flipped)
        except ValueError:
            continue
        # White space may become another kind of it.
        assert is_intact(found, CONTENT) == (found == sealed(CONTENT)), flipped
        changed += found != sealed(CONTENT)
    assert changed > 100


def test_what_an_earlier_version_wrote_has_no_checksum_and_is_taken_unless_a_name_is_unknown():
    assert is_intact(CONTENT, CONTENT)
    assert not is_intact({**CONTENT, "brc32": "00000000"}, CONTENT)


@pytest.mark.parametrize("flags", [["--config"], ["--resume", "1", "--proj_dir"]])
def test_settings_that_were_changed_after_a_run_wrote_them_are_used_and_that_is_said(tmp_path, capsys, flags):
    config = parse_train(["--load_model", "a.pth", "--data_file", "a.jsonl", "--max_lost", "0.5"])
    assert from_json(to_json(config)) == config
    path = tmp_path / "config.json"
    given = [*flags, str(path if flags == ["--config"] else tmp_path)]
    path.write_text(to_json(config))
    assert parse_train(given).data == config.data and "was changed" not in capsys.readouterr().out
    path.write_text(to_json(config).replace('"max_lost": 0.5', '"max_lost": 0.7'))
    assert parse_train(given).data.max_lost == 0.7
    assert (
        f"{path} was changed after a run wrote it: the settings are those that it holds now" in capsys.readouterr().out
    )
