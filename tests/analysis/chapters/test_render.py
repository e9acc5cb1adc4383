"""Markdown sees nothing special in a name."""

from __future__ import annotations

import pytest

from analysis.chapters import render


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("a|b", "a\\|b"), ("<b>", "&lt;b&gt;"), ("[x](y)", "\\[x\\](y)"), ("a\nb", "a b"),
     ("deit_tiny", "deit_tiny"), ("`c`*", "\\`c\\`\\*")],
)  # fmt: skip
def test_markdown_is_escaped(text: str, escaped: str) -> None:
    assert render.escape_markdown(text) == escaped
