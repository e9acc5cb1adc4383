"""A study folder -> report.html, report.md, figures, LaTeX tables and two JSON files.

``python -m analysis.report STUDY`` on the command line; :func:`write_report` from a program.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.chapters.page import Page, make_page
from analysis.chapters.render import render_html, render_markdown
from analysis.figures import search
from analysis.figures.gallery import KEYS
from analysis.figures.style import save
from analysis.findings import summary
from analysis.findings.findings import compute
from analysis.folder import places
from analysis.load import StudyError, read_study, told
from analysis.text import latex
from tune_study.folder import remote
from tune_study.folder.files import write_bytes


def write_report(study_path: str | Path) -> Path:
    """Everything under ``study_path/report`` and the two JSON files; returns report.html.

    Each file is written whole or not at all. Raises ``StudyError`` when the folder is no study,
    ``OSError`` when it can't be written to.
    """
    folder = Path(study_path)
    found = compute(read_study(folder))
    page = make_page(found)
    report = folder / "report"
    (report / "figures").mkdir(parents=True, exist_ok=True)
    (report / "tables").mkdir(exist_ok=True)
    for name, content in (
        (summary.SUMMARY_FILE, summary.experiments_summary(found)),
        (summary.DETAILS_FILE, summary.detailed_analysis(found)),
    ):
        _write(folder / name, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False))
    _write_figures(page, report / "figures")
    _write_latex(page, report / "tables")
    _write(report / "report.md", render_markdown(page))
    path = report / "report.html"
    _write(path, render_html(page))
    return path


def _write(path: Path, text: str) -> None:
    # A lone surrogate from a stranger's JSON can't be encoded; "?" stands in for it.
    write_bytes(path, text.encode("utf-8", errors="replace"))


def _write_figures(page: Page, folder: Path) -> None:
    """Print-quality files; those of a figure that is now empty are removed."""
    for key in (*KEYS, *search.KEYS):
        if key not in page.figures or not save(page.figures[key], folder):
            for kind in ("png", "pdf"):
                (folder / f"{key}.{kind}").unlink(missing_ok=True)


def _write_latex(page: Page, folder: Path) -> None:
    prefix = "Simulated. " if page.simulated else ""
    tables = [page.glance, *(table for part in page.sections for table in part.tables)]
    written = set()
    for table in tables:
        if table.key == "every_trial":
            continue  # trials.csv, not a table that a paper prints
        written.add(f"{table.key}.tex")
        _write(folder / f"{table.key}.tex", latex.render(table, caption_prefix=prefix))
    for stale in folder.glob("*.tex"):
        if stale.name not in written:
            stale.unlink()


def _report(study: str, to: Path | None) -> str:
    """Where report.html is. That of a study behind a URI is put back, unless it goes ``to``."""
    if not remote.is_uri(study):
        if to is not None:
            raise StudyError(f"--to {to}: it is for a study behind a URI; leave it out")
        return shlex.quote(str(write_report(study)))
    if to is not None:
        if to.exists():
            raise StudyError(f"--to {to}: it is there already; name a new folder")
        places.fetch(study, to)
        return shlex.quote(str(write_report(to)))
    with places.near(study) as folder:
        path = write_report(folder)
        places.put_back(study, folder)
        return remote.masked(remote.join(study, path.relative_to(folder).as_posix()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 and one sentence for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", description="Write the report of a study."
    )
    parser.add_argument("study", help="folder that holds study.json, or its URI")
    parser.add_argument(
        "--to",
        type=Path,
        help="with a URI: fetch the study into this new folder, and leave it there",
    )
    options = parser.parse_args(arguments)
    to = options.to and Path(os.path.expanduser(options.to))  # the shell leaves --to=~/x as it is
    return told(lambda: _report(options.study, to), "the report can't be written")


if __name__ == "__main__":
    sys.exit(main())
