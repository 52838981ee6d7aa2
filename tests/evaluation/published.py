"""Rules as others have written them: lm_eval's filters, and its copy of MATH's script; skips where it is missing."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def gsm8k_filters() -> tuple[Callable[[str], str | None], Callable[[str], str | None]]:
    """strict-match and flexible-extract, with the patterns of lm_eval's gsm8k.yaml; None for "[invalid]"."""
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm_eval is not installed")
    tasks = Path(sys.modules["lm_eval"].__file__ or "").parent / "tasks"
    patterns = re.findall(r'regex_pattern: "(.*)"', (tasks / "gsm8k" / "gsm8k.yaml").read_text())

    def finder(pattern: str, group: int) -> Callable[[str], str | None]:
        found = extraction.RegexFilter(regex_pattern=json.loads(f'"{pattern}"'), group_select=group)
        return lambda text: None if (answer := found.apply([[text]], [])[0][0]) == "[invalid]" else answer

    return finder(patterns[0], 0), finder(patterns[1], -1)


def hendrycks() -> ModuleType:
    """lm_eval's hendrycks_math: last_boxed_only_string, remove_boxed, is_equiv."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # It names a class of datasets, which takes seconds to import, and needs nothing of it here.
        patch.setitem(sys.modules, "datasets", sys.modules.get("datasets") or SimpleNamespace(Dataset=object))
        return importlib.import_module("lm_eval.tasks.hendrycks_math.utils")
