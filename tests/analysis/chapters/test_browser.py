"""The page in a real browser: sorted, filtered, told at a tap, and deaf to any other script."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from analysis import report
from tests import synthetic
from tests.analysis.pages import without_rendering

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no Chromium is installed"),
]
EVIL = "</title></script><script>document.body.id='ran'</script><img src=x onerror='a()'>"
ASK = """
const found = {};
document.querySelector("#table-every_trial").open = true;
const column = name => [...document.querySelectorAll("table.sortable thead th")]
  .findIndex(head => head.textContent.trim() === name);
const values = name => [...document.querySelectorAll("table.sortable tbody tr")]
  .filter(row => !row.hidden).map(row => row.cells[column(name)].textContent);
const sort = name => document.querySelectorAll("table.sortable thead button")[column(name)].click();
sort("test accuracy"); found.rising = values("test accuracy");
sort("test accuracy"); found.falling = values("test accuracy");
sort("trial"); found.trials = values("trial");
const [words, mode] = document.querySelectorAll(".filter input, .filter select");
words.value = "R8 S2-"; mode.value = "nf4";
words.dispatchEvent(new Event("input", {bubbles: true}));
found.filtered = values("trial");
found.shown = document.querySelector(".filter output").value;
const mark = document.querySelector("#figure-pareto_weights .point");
mark.scrollIntoView();
const at = mark.getBoundingClientRect();
mark.dispatchEvent(new PointerEvent("pointerdown", {
  bubbles: true, clientX: at.x + at.width / 2, clientY: at.y + at.height / 2}));
found.told = document.querySelector("#figure-pareto_weights .told").value;
found.ran = document.body.id;
found.wide = document.documentElement.scrollWidth - innerWidth;
document.body.setAttribute("data-found", JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    cells = synthetic.plan(
        models=synthetic.MODELS[:1], datasets=(EVIL,), lora=((4, 8), (8, 16)), seeds=(1, 2, 3)
    )
    folder = tmp_path_factory.mktemp("page") / "study"
    path = synthetic.write_study(folder, cells, failures={0: "pending"})
    with pytest.MonkeyPatch.context() as patch:
        without_rendering(patch, but_inline=True)
        return report.write_report(path).read_text(encoding="utf-8")


def _dump(text: str, folder: Path) -> str:
    """The document as the browser has it after its scripts."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'user'}",
               "--window-size=500,800", "--dump-dom"]  # fmt: skip
    ran = subprocess.run(
        [BROWSER, *options, f"file://{folder / 'page.html'}"],
        capture_output=True, text=True, errors="replace", check=True, timeout=120,
    )  # fmt: skip
    return ran.stdout


@pytest.fixture(scope="module")
def asked(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert free != page
    dumped = _dump(
        free.replace("</body>", f"<script>{ASK}</script></body>"), tmp_path_factory.mktemp("asked")
    )
    (found,) = re.findall(r'data-found="([^"]*)"', dumped)
    return dict(json.loads(html.unescape(found)))


def test_a_column_is_sorted_by_its_numbers(asked: dict[str, Any]) -> None:
    rising = [text for text in asked["rising"] if text != "–"]
    assert len(rising) == 23
    assert rising == sorted(rising, key=lambda text: float(text.split()[0]))
    assert [text for text in asked["falling"] if text != "–"] == rising[::-1]
    assert asked["rising"][-1] == asked["falling"][-1] == "–"
    assert len(set(asked["trials"])) == 24


def test_rows_are_filtered_by_words_and_by_mode(asked: dict[str, Any]) -> None:
    assert len(asked["filtered"]) == 1
    assert "-r8-nf4-s2-" in asked["filtered"][0]
    assert asked["shown"] == "1 of 24 shown"


def test_a_point_tells_its_cell_at_a_tap(asked: dict[str, Any]) -> None:
    assert re.search(r"int8: [\d.]+ %, 6.26 MB", asked["told"])


def test_the_page_is_no_wider_than_its_window(asked: dict[str, Any]) -> None:
    assert asked["wide"] <= 0


def test_names_run_nothing_even_without_the_policy(page: str, asked: dict[str, Any]) -> None:
    assert html.escape(EVIL) in page.replace("&#39;", "&#x27;")
    assert asked["ran"] == ""


def test_no_other_script_runs(page: str, tmp_path: Path) -> None:
    planted = '<script>document.body.id = "ran"</script><img src="x" onerror="document.body.id=1">'
    dumped = _dump(page.replace("</main>", f"{planted}</main>"), tmp_path)
    assert 'class="filter"' in dumped
    assert "<body>" in dumped
