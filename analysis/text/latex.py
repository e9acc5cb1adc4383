"""Tables as LaTeX; a document needs ``\\usepackage{booktabs,graphicx}`` and nothing else."""

from __future__ import annotations

import unicodedata

from analysis.text.layout import Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "−": r"$-$", "–": "--", "—": "---", "×": r"$\times$", "…": r"\ldots{}", "±": r"$\pm$",
    "’": "'", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip
_LINE = 85
"""Characters that fit a line in footnote size; a wider table is scaled down to the line."""
_MOST_ROWS = 50
"""More rows do not fit a page."""


def escape(text: str) -> str:
    """``text`` so that LaTeX prints it and runs nothing. Letters it lacks become ``?``."""
    # Two hyphens would be set as a dash, and a command line would read wrong.
    parts = str(text).split("--")
    return "-{}-".join("".join(_SPECIAL.get(c) or _letter(c) for c in part) for part in parts)


def _letter(letter: str) -> str:
    if letter.isascii():
        return letter if letter.isprintable() else " "
    base = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return "".join(_SPECIAL.get(part, part) for part in base if part.isprintable()) or "?"


def render(table: Table, *, caption_prefix: str = "") -> str:
    """A ``table`` environment; words are aligned left, numbers right, long text is a paragraph."""
    shown = table.rows[:_MOST_ROWS]
    narrow = [i for i in range(len(table.columns)) if i not in table.wide]
    taken = sum(max(len(row[i]) for row in [table.columns, *shown]) + 2 for i in narrow)
    share = (1 - taken / _LINE) / max(len(table.wide), 1) - 0.03
    if table.wide and share < 0.25:
        share = 0.5  # of a table that is scaled down afterwards
    share = min(max(share, 0.25), 0.9)
    kinds = [
        rf"p{{{share:.2f}\linewidth}}" if i in table.wide else ("l" if table.is_text(i) else "r")
        for i in range(len(table.columns))
    ]
    scaled = taken + (share + 0.03) * _LINE * len(table.wide) > _LINE + 1
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering\footnotesize\sloppy\setlength{\belowcaptionskip}{4pt}",
        rf"\caption{{{escape(caption_prefix + table.caption)}}}",
        rf"\label{{tab:{table.key.replace('_', '-')}}}",
        *([r"\resizebox{\linewidth}{!}{%"] if scaled else []),
        rf"\begin{{tabular}}{{{''.join(kinds)}}}",
        r"\toprule",
        " & ".join(escape(name) for name in table.columns) + r" \\",
        r"\midrule",
        # \relax: a row that begins with a bracket would be read as an argument of \\.
        *(r"\relax " + " & ".join(escape(cell) for cell in row) + r" \\" for row in shown),
        r"\bottomrule",
        r"\end{tabular}" + ("}" if scaled else ""),
    ]
    notes = [table.note] if table.note else []
    if len(shown) < len(table.rows):
        notes.append(f"The first {len(shown)} of {len(table.rows)} rows.")
    if notes:
        lines.append(rf"\par\smallskip {escape(' '.join(notes))}")
    return "\n".join([*lines, r"\end{table}", ""])
