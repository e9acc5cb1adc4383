"""A report, written and read back. No test module."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import report
from analysis.chapters import render
from analysis.figures import style


def without_rendering(patch: pytest.MonkeyPatch, *, but_inline: bool = False) -> None:
    patch.setattr(render, "png", lambda drawn: b"\x89PNG")
    patch.setattr(report, "save", _touch)
    if not but_inline:
        patch.setattr(render, "svg_element", lambda drawn: "<svg></svg>")


def _touch(drawn: style.Drawn, folder: Path) -> list[Path]:
    if drawn.figure is None:
        return []
    files = [folder / f"{drawn.key}.{kind}" for kind in ("png", "pdf")]
    for file in files:
        file.write_bytes(b"x")
    return files


class Document(HTMLParser):
    """Tags, attributes and text of a page; scripts and styles are no text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.code: dict[str, list[str]] = {"script": [], "style": []}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.code.get(self.inside, self.words).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def written(path: Path) -> tuple[Path, Document]:
    html = report.write_report(path)
    return html, Document(html.read_text(encoding="utf-8"))
