"""The page as one self-contained HTML document, and as Markdown."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path
from typing import Any

from analysis.chapters.page import Page
from analysis.figures.inline import has_points, svg_element
from analysis.figures.style import png
from analysis.text.layout import clean

TEMPLATES = Path(__file__).with_name("templates")


def _environment(autoescape: bool) -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_html(page: Page) -> str:
    """One self-contained document: no request, figures embedded, and our script alone may run."""
    from markupsafe import Markup

    images, drawings = {}, {}
    for key, drawn in page.figures.items():
        if has_points(drawn):
            drawings[key] = Markup(svg_element(drawn))
        elif drawn.figure is not None:
            images[key] = base64.b64encode(png(drawn)).decode("ascii")
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    template = _environment(True).get_template("report.html.j2")
    return str(
        template.render(
            page=page,
            images=images,
            drawings=drawings,
            script=Markup(script),
            digest=digest,
        )
    )


def render_markdown(page: Page) -> str:
    """The same as text; figures are the files beside it."""
    environment = _environment(False)
    environment.filters["md"] = escape_markdown
    return str(environment.get_template("report.md.j2").render(page=page))


def escape_markdown(text: str) -> str:
    """``text`` so that neither Markdown nor the HTML it allows sees anything special in it."""
    safe = html.escape(clean(str(text)), quote=False)
    for letter in "\\`*[]|":
        safe = safe.replace(letter, f"\\{letter}")
    return safe
