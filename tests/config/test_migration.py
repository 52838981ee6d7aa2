"""docs/migrating.md says of every flag of RWKV-PEFT what the command line does with it."""

from pathlib import Path

import pytest

from rwkv_bone.config import field_flags, flags, migration, pages
from rwkv_bone.errors import UserError
from tests.config.test_field_scripts import ARGUMENTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"
TABLES = {
    *migration.SAME_FLAGS,
    *migration.MERGE_SAME_FLAGS,
    *field_flags.TRAIN_FLAGS,
    *field_flags.MERGE_FLAGS,
}


def test_the_page_has_the_tables_that_the_settings_make_today():
    page = PAGE.read_text(encoding="utf-8")
    renew = "renew it: PYTHONPATH=src python -m rwkv_bone.config.migration docs/migrating.md"
    assert migration.renewed(page) == page, renew


def test_renewing_changes_only_what_is_between_the_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{migration.BEGIN}\nold\n{pages.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["migration", str(page)])
    migration.main()
    assert page.read_text() == f"before\n{migration.BEGIN}\n\n{migration.tables()}\n\n{pages.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(UserError, match="the page has no lines"):
        migration.main()


def test_every_argument_of_rwkv_peft_has_its_row():
    rows = [line.split(" | ")[0] for line in migration.tables().splitlines()]
    for argument in ARGUMENTS:
        assert f"| `--{argument.split('=')[0]}`" in rows
    assert len(rows) > len(ARGUMENTS) and TABLES >= migration.ERAS.keys()


def test_the_same_name_is_a_flag_here_and_a_translated_one_is_not():
    shown = {spec for section in flags.SECTIONS.values() for spec in section.__dataclass_fields__}
    shown |= set(flags.ALIASES.values())
    assert migration.SAME_FLAGS.keys() <= shown
    assert not shown & set(field_flags.TRAIN_FLAGS)
    assert set(field_flags.VALUES) <= migration.SAME_FLAGS.keys()


def test_a_bar_in_a_cell_does_not_end_it():
    assert pages.table("flag | here", [("`a|b`", "c")]).splitlines()[-1] == r"| `a\|b` | c |"
