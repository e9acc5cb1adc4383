"""A figure as SVG inside the page, whose points tell what they are when pointed at."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from analysis.figures.style import Drawn, svg
from analysis.text.layout import clean

MOST_POINTS = 600
"""Beyond these a figure is lighter as an image, and its points are too close to be pointed at."""
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def has_points(drawn: Drawn) -> bool:
    """Whether the figure is shown with points that tell something."""
    count = sum(map(len, drawn.tips.values()))
    return drawn.figure is not None and 0 < count <= MOST_POINTS


def svg_element(drawn: Drawn) -> str:
    """The figure as an ``<svg>`` element for an HTML document, safe beside others.

    Texts are text, every id is the figure's own, and each point of ``tips`` has a ``<title>``.
    Raises ``ValueError`` when an artist does not have as many points as it has tips.
    """
    root = ElementTree.fromstring(svg(drawn))
    _tell(root, drawn)
    _own(root, drawn.key)
    root.set("role", "img")
    root.set("aria-label", clean(f"{drawn.title}. {drawn.caption}"))
    return _as_html(root)


def _tell(root: ElementTree.Element, drawn: Drawn) -> None:
    """A ``<title>`` into each marker of the artists that have tips."""
    for gid, tips in drawn.tips.items():
        artist = root.find(f".//{_SVG}g[@id='{gid}']")
        marks = [] if artist is None else list(artist.iter(f"{_SVG}use"))
        # A marker that is filled by half is drawn in two passes over all points.
        if not tips or not marks or len(marks) % len(tips):
            raise ValueError(f"figure {drawn.key}: {len(marks)} marks of {gid}, {len(tips)} tips")
        for number, mark in enumerate(marks):
            mark.set("class", "point")
            ElementTree.SubElement(mark, f"{_SVG}title").text = clean(tips[number % len(tips)])


def _own(root: ElementTree.Element, key: str) -> None:
    """No style for the whole document, and no id that another figure has as well."""
    links = (value for e in root.iter() for name, value in e.attrib.items() if name != "style")
    used = {name for value in links for name in re.findall(r"#([\w.-]+)", value)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{key}-{name}")
        if _LINK in element.attrib:
            element.set(_LINK, f"#{key}-{element.attrib[_LINK].removeprefix('#')}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{key}-"))


def _as_html(root: ElementTree.Element) -> str:
    """HTML knows no namespaces: plain names, ``href`` for the links."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        element.tail = None
        if element.tag not in ("text", "tspan", "title"):
            element.text = None
    return ElementTree.tostring(root, encoding="unicode")
