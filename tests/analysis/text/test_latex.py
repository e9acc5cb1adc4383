"""LaTeX runs nothing of what a table says."""

from __future__ import annotations

from analysis.text import latex
from analysis.text.layout import Table


def test_latex_escapes_what_latex_would_run() -> None:
    table = Table("k", "50 % of $x$", ("a_b", "c"), [["\\input{x}", "[1] & −2 × 3 \u4e2d é"]])
    text = latex.render(table)
    assert r"50 \% of \$x\$" in text
    assert latex.escape("run --grid – x") == "run -{}-grid -- x"
    assert r"\textbackslash{}input\{x\}" in text
    assert r"\relax \textbackslash{}" in text
    assert r"[1] \& $-$2 $\times$ 3 ? e \\" in text
