"""The page as headless Chromium shows it: no errors, the log's values, keys, both schemes, a phone's width."""

import json

import pytest

from rwkv_bone.report import compare, page
from tests.report.browser import Browser, found
from tests.report.made import HOSTILE, make

LIVE = "document.getElementById('live').textContent"
FOCUS = "document.activeElement.id || document.activeElement.getAttribute('class') || document.activeElement.tagName"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = found()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("browser") / "a run", steps=120, every=20)
    page.write(folder)
    return folder


def records(run, name: str) -> dict[int, dict]:
    return {one["step"]: one for one in map(json.loads, (run / name).read_text(encoding="utf-8").splitlines())}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_opens_without_errors_asks_for_nothing_and_is_as_wide_as_the_screen(browser, run, width, scheme):
    browser.open(run / "report.html", width=width, scheme=scheme)
    assert browser.wrong == []
    assert browser.asked == [(run / "report.html").resolve().as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('.chart canvas').length") == 5
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (
        sum(map(int, back[4:-1].split(","))) > 600 if scheme == "light" else sum(map(int, back[4:-1].split(","))) < 150
    )


def test_arrow_keys_tell_the_values_of_the_log(browser, run):
    log, measured = records(run, "train_log.jsonl"), records(run, "measurements.jsonl")
    browser.open(run / "report.html")
    for _ in range(20):
        browser.press("Tab")
        if browser.value(FOCUS) == "chart-loss":
            break
    assert browser.value(FOCUS) == "chart-loss"
    browser.press("Home")
    said = browser.value(LIVE)
    assert said.startswith("step 0: ")
    assert f"heldout {measured[0]['sets']['heldout']['loss']:.5g}" in said
    assert f"general {measured[0]['sets']['general']['loss']:.5g}" in said
    for step in (1, 2, 3):
        browser.press("ArrowRight")
        said = browser.value(LIVE)
        assert said.startswith(f"step {step}: each step {log[step]['loss']:.5g}, moving average ")
        assert f"heldout {measured[0]['sets']['heldout']['loss']:.5g} at step 0" in said
    browser.press("End", "ArrowLeft")
    assert browser.value(LIVE).startswith(f"step 119: each step {log[119]['loss']:.5g}, ")
    browser.press("ArrowRight")
    assert f"heldout {measured[120]['sets']['heldout']['loss']:.5g}, " in browser.value(LIVE)
    browser.press("Tab", "Home")
    assert browser.value(LIVE) == f"step 1: learning rate {log[1]['lr']:.4g}".replace("0.0002", "2e-4")
    assert browser.wrong == []


def test_keys_zoom_and_every_curve_can_be_reached(browser, run):
    browser.open(run / "report.html")
    reached = []
    for _ in range(60):
        browser.press("Tab")
        reached.append(browser.value(FOCUS))
        if reached[-1] == "chart-lr":
            browser.press("End", "+", "Home")
            assert browser.value(LIVE).startswith("step 61:")
            browser.press("0", "Home")
            assert browser.value(LIVE).startswith("step 1:")
    charts = ["chart-loss", "chart-lr", "chart-grad_norm", "chart-tokens_per_s", "chart-peak_memory_mb"]
    assert [name for name in reached if name.startswith("chart-")][:5] == charts
    assert reached[:2] == ["skip", "theme"]
    outline = "(box => (box.focus({focusVisible: true}), getComputedStyle(box).outlineStyle))"
    assert browser.value(f"{outline}(document.getElementById('chart-lr'))") == "solid"


def test_what_was_learnt_and_forgotten_is_told_point_by_point(browser, run):
    measured = records(run, "measurements.jsonl")
    browser.open(run / "report.html")
    for _ in range(30):
        browser.press("Tab")
        if browser.value("document.activeElement.classList.contains('plane')"):
            break
    for step in (0, 20):
        browser.press("ArrowRight")
        sets = measured[step]["sets"]
        assert browser.value(LIVE) == (
            f"step {step}: held-out {sets['heldout']['loss']:.4f}, general {sets['general']['loss']:.4f}"
        )
    browser.press("End")
    assert browser.value(LIVE).startswith("step 120: ") and browser.value(LIVE).endswith(", best")


def test_buttons_change_colours_and_scale_and_the_choice_of_colours_stays(browser, run):
    browser.open(run / "report.html", scheme="light")
    grid = "getComputedStyle(document.documentElement).getPropertyValue('--back')"
    light = browser.value(grid)
    browser.press("Tab", "Tab", "Enter")
    dark = browser.value(grid)
    assert dark != light and browser.value("document.getElementById('theme').textContent") == "Light"
    browser.open(run / "report.html", scheme="light")
    assert browser.value(grid) == dark
    browser.value("localStorage.clear()")
    browser.open(run / "report.html", scheme="light")
    assert browser.value(grid) == light
    browser.value("document.querySelector('figcaption button').click()")
    assert browser.value("document.querySelector('figcaption button').getAttribute('aria-pressed')") == "true"
    assert browser.value("document.querySelectorAll('.chart canvas').length") == 5 and browser.wrong == []


def test_without_javascript_there_are_tables_and_no_empty_curves(browser, run):
    browser.open(run / "report.html", scripts=False)
    nodes = browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
    (content,) = browser.call("DOM.querySelectorAll", nodeId=nodes, selector="body")["nodeIds"]
    whole = browser.call("DOM.getOuterHTML", nodeId=content)["outerHTML"]
    assert "<canvas" not in whole and "The curves need JavaScript" in whole and whole.count("<table") >= 6
    (hidden,) = browser.call("DOM.querySelectorAll", nodeId=nodes, selector=".figures")["nodeIds"]
    browser.call("CSS.enable")
    style = browser.call("CSS.getComputedStyleForNode", nodeId=hidden)["computedStyle"]
    assert {"name": "display", "value": "none"} in style


def test_what_anybody_wrote_runs_nowhere(browser, tmp_path):
    folder = make(tmp_path / "run", steps=20, every=5, prompt=HOSTILE)
    page.write(folder)
    browser.open(folder / "report.html")
    assert browser.value("typeof window.broken") == "undefined" and browser.wrong == []
    assert browser.value("document.images.length") == 0
    assert browser.value("document.querySelector('.sample .said').textContent") == HOSTILE.replace("\x07", "\\x07")


def test_even_markup_that_got_into_the_page_would_not_run(browser, run, tmp_path):
    """The policy alone stops it: this page is made wrong on purpose."""
    wrong = (run / "report.html").read_text(encoding="utf-8")
    wrong = wrong.replace("</h1>", "</h1><script>window.broken=1</script><img src=x onerror='window.broken=1'>")
    (tmp_path / "wrong.html").write_text(wrong, encoding="utf-8")
    browser.open(tmp_path / "wrong.html")
    assert browser.value("typeof window.broken") == "undefined"


def test_a_comparison_opens_without_errors(browser, run, tmp_path):
    other = make(tmp_path / "other", steps=3000, every=300)
    output = tmp_path / "compare.html"
    compare.compare(compare.CompareConfig(runs=(str(run), str(other)), output=str(output)))
    for width in (360, 1280):
        browser.open(output, width=width)
        assert browser.wrong == [] and browser.value("document.documentElement.scrollWidth") <= width
    names = browser.value("[...document.querySelectorAll('#chart-lr + .legend li')].map(item => item.textContent)")
    assert names[:2] == ["a run", "other"]
