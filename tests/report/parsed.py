"""A page as a browser without JavaScript reads it: its elements, its text, and the JSON in it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "br", "input", "circle", "path", "line"}


class Page(HTMLParser):
    """elements: (tag, attributes) in order; texts: (tags around it, text) of everything but scripts and styles."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.tables: list[list[list[str]]] = []  # rows of cells of each table, its head first
        self._open: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)
        self.close()
        assert self._open == []

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tags = tuple(tag for tag, _ in self._open)
        if tags and tags[-1] == "script":
            self.scripts.append((self._open[-1][1], data))
        elif tags and tags[-1] != "style":
            self.texts.append((tags, data))
            if {"th", "td"} & set(tags):
                self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.texts)

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """{id: chart} as page.js is given them."""
        (content,) = (text for attributes, text in self.scripts if attributes.get("type") == "application/json")
        return {chart["id"]: chart for chart in json.loads(content)["charts"]}

    def series(self, chart: str) -> dict[str, dict[int, float]]:
        """{name: {step: value}} of a chart."""
        return {one["name"]: dict(zip(one["x"], one["y"], strict=True)) for one in self.charts[chart]["series"]}
