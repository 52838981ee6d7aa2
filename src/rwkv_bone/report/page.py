"""`report.html`: one file that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rwkv_bone import __version__
from rwkv_bone.report import charts, preferences, sections
from rwkv_bone.report.html import Html, embedded, join, tag
from rwkv_bone.report.run import Run, read

PAGE = "report.html"
HERE = Path(__file__).parent
# By this a file is known to be one of ours, which may be replaced.
MARK = "<!doctype html>\n<!-- rwkv-bone report -->\n"


def write(folder: Path) -> None:
    """Make `folder/report.html` of the files in the results folder alone, whole or not at all."""
    save(folder / PAGE, of_run(read(folder), time.time()))


def save(path: Path, page: str) -> None:
    """UserError where the disk refuses it."""
    # Late: it brings PyTorch along, which a run has loaded and a reader of runs need not wait for before --help.
    from rwkv_bone.checkpoints import atomic_path

    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(page, encoding="utf-8")


def of_run(run: Run, now: float) -> str:
    """The page of one run. now: seconds since 1970, which the page tells."""
    drawn = charts.charts_of([run], [""])
    body = [
        sections.section("numbers", "Results", sections.numbers(run), sections.lacking(run.problems)),
        sections.following(run),
        sections.warnings(run),
        sections.section("preferences", "Preferences", *preferences.content(run)),
        sections.curves(drawn, sections.curve_tables(run)),
        sections.forgetting(run),
        sections.samples(run),
        sections.trained(run),
        sections.settings(run),
        sections.environment(run),
    ]
    return html(sections.what(run), sections.head(run, moment(now)), body, drawn)


def moment(now: float) -> Html:
    """A point in time, in UTC; page.js adds how long ago that is."""
    parts = time.gmtime(now)
    return tag("time", time.strftime("%Y-%m-%d %H:%M UTC", parts), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", parts))


def html(title: str, head: Html, body: Sequence[Html], drawn: Sequence[dict[str, Any]]) -> str:
    """A whole page. head: its first lines; body: its sections; drawn: its charts."""
    style, script, licence = parts()
    # Nothing but this very script runs, and nothing is loaded: whatever a prompt or an answer holds.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{hashed(script)}'; base-uri 'none'"
    top = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} \N{MIDDLE DOT} rwkv-bone"),
        tag("style", style),
    )
    links = [tag("a", "Skip to the results", href="#main", class_="skip")]
    button = tag("button", "Dark or light", type="button", id="theme", class_="with-script")
    about = tag("p", f"rwkv-bone {__version__}. Curves by uPlot 1.6.32; its licence:", class_="muted")
    content = join(
        *links,
        tag("header", tag("div", head), button),
        tag("main", *body, id="main", tabindex=-1),
        tag("footer", about, sections.details("MIT licence of uPlot", tag("pre", licence))),
        tag("div", id="live", class_="hidden", aria_live="polite"),
        tag("script", embedded({"charts": drawn}), type="application/json", id="content"),
        tag("script", script),
    )
    return f'{MARK}<html lang="en" class="plain">\n{tag("head", top)}\n{tag("body", content)}\n</html>\n'


def hashed(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def parts() -> tuple[Html, Html, str]:
    """(the style, the script, the licence of what is not ours in them)."""

    def text_of(name: str) -> str:
        return (HERE / name).read_text(encoding="utf-8").strip()

    style = f"{text_of('uplot/uPlot.min.css')}\n{text_of('page.css')}"
    script = f"{text_of('uplot/uPlot.iife.min.js')}\n{text_of('page.js')}"
    return Html(style), Html(script), text_of("uplot/LICENSE")
