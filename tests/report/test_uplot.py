"""The charting library in the package is the one that its README names, and its licence is in every page."""

import re
from hashlib import sha256

from rwkv_bone.report import page
from rwkv_bone.report.run import Run

FOLDER = page.HERE / "uplot"
# Of dist/ and LICENSE in the npm package uplot 1.6.32.
SUMS = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def test_the_library_is_unmodified():
    files = {path.name: sha256(path.read_bytes()).hexdigest() for path in FOLDER.iterdir() if path.name != "README.md"}
    assert files == SUMS


def test_its_readme_names_version_licence_and_sums():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"\| `(\S+)` \| ([0-9a-f]{64}) \|", text)) == SUMS
    assert "1.6.32" in text and "MIT" in text and b"(v1.6.32)" in (FOLDER / "uPlot.iife.min.js").read_bytes()[:100]


def test_every_page_holds_the_library_and_its_licence(tmp_path):
    shown = page.of_run(Run(tmp_path), 0.0)
    assert (FOLDER / "uPlot.iife.min.js").read_text(encoding="utf-8").strip() in shown
    assert "Copyright (c) 2022 Leon Sorokin" in shown and "WITHOUT WARRANTY OF ANY KIND" in shown
