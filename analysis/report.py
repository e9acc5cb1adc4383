"""A study folder -> report.html, report.md, figures, LaTeX tables and two JSON files.

``python -m analysis.report STUDY`` on the command line; :func:`write_report` from a program.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.figures import search
from analysis.figures.gallery import KEYS, draw_all
from analysis.figures.style import Drawn, png, save
from analysis.findings import summary
from analysis.findings.decisions import WORDS, Decision
from analysis.findings.findings import Findings, compute
from analysis.folder import places
from analysis.folder.tables import write_whole
from analysis.load import StudyError, read_study
from analysis.search_section import front_table
from analysis.sections import sections
from analysis.statistics.cells import modes_of
from analysis.text import latex
from analysis.text.layout import Section, Table, clean, cleaned
from analysis.text.wording import MISSING, between, listing, number, plural, points, short, signed
from tune_study import remote

QUESTION = (
    "A large frozen network is adapted to a new task by training small LoRA matrices beside it. "
    "Quantization stores the frozen weights in fewer bits. What does that save, and what does it "
    "cost?"
)
TEMPLATES = Path(__file__).with_name("templates")


class Page(NamedTuple):
    """What the templates show. ``images`` maps a figure's key to its place in the document."""

    title: str
    simulated: bool
    banners: list[str]
    question: str
    scope: str
    decisions: list[Decision]
    modes: list[tuple[str, str]]
    glance: Table
    sections: list[Section]
    figures: dict[str, Drawn]


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
    data = text.encode("utf-8", errors="replace")
    write_whole(path, lambda temporary: _put(temporary, data))


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


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
        written.add(f"{table.key}.tex")
        _write(folder / f"{table.key}.tex", latex.render(table, caption_prefix=prefix))
    for stale in folder.glob("*.tex"):
        if stale.name not in written:
            stale.unlink()


def make_page(found: Findings) -> Page:
    """Findings put into words, with all figures drawn."""
    manifest, trials = found.study.manifest, found.study.trials
    progress = summary.progress(trials)
    marks = ["simulated"] if found.simulated else []
    complete = progress["complete"] and not _unsuggested(found)
    marks += [] if complete else ["unfinished"]
    subject = "What quantization costs" if found.search is None else "A search"
    title = f"{subject}: {clean(str(manifest.get('study')))}"
    return Page(
        title=f"{title} ({', '.join(marks)})" if marks else title,
        simulated=found.simulated,
        banners=[clean(banner) for banner in _banners(found, progress)],
        question=QUESTION,
        scope=_scope(trials, progress),
        decisions=[_cleaned(line) for line in found.decisions],
        modes=[(clean(mode), WORDS.get(mode, "unknown mode")) for mode in modes_of(trials)],
        glance=glance(found) if found.search is None else _of_search(found),
        sections=[cleaned(section) for section in sections(found)],
        figures=draw_all(found),
    )


def _cleaned(line: Decision) -> Decision:
    question, answer, evidence, sample = (clean(text) for text in line[:4])
    return line._replace(question=question, answer=answer, evidence=evidence, sample=sample)


def _of_search(found: Findings) -> Table:
    assert found.search is not None
    return cleaned(Section("", "", [], [front_table(found.search)])).tables[0]


def _unsuggested(found: Findings) -> int:
    """Trials that a search is still to suggest."""
    if found.search is None:
        return 0
    return max(0, found.search.num_samples - len(found.study.trials))


def _banners(found: Findings, progress: dict[str, Any]) -> list[str]:
    """What a reader must know before anything else."""
    banners = []
    if found.simulated:
        banners.append(
            "SIMULATED. The numbers were drawn from a model of learning curves; nothing was "
            "trained. They say nothing about real models and are compared with no publication."
        )
    by_status = progress["by_status"]
    if (unsuggested := _unsuggested(found)) or not progress["complete"]:
        waiting = by_status["pending"] + by_status["interrupted"] + unsuggested
        planned = plural(progress["planned"] + unsuggested, "trial")
        banners.append(
            f"UNFINISHED. {progress['finished']} of {planned} have "
            f"ended, {waiting} are still to run. Everything below can change."
        )
    failed = [(name, by_status[name]) for name in ("diverged", "oom", "error") if by_status[name]]
    if failed:
        parts = ", ".join(f"{count} {name}" for name, count in failed)
        banners.append(
            f"{plural(sum(count for _, count in failed), 'trial')} of {progress['planned']} failed "
            f"({parts}); their pairs are missing from the comparisons."
        )
    if found.problems:
        banners.append(
            f"{plural(len(found.problems), 'problem')} in the study folder: see the chapter Trials."
        )
    return banners


def _scope(trials: pd.DataFrame, progress: dict[str, Any]) -> str:
    """One sentence on what was run, and where."""
    models, data = (
        listing([short(clean(str(name)), 60) for name in trials[column].dropna().unique()])
        for column in ("model", "dataset")
    )
    ran = trials[trials["status"] != "pending"]
    machines = [clean(str(name)) for name in ran["machine"].dropna().unique()]
    batches = sorted({int(size) for size in ran["batch_size"].dropna()})
    where = f" on {listing(machines)}" if machines else ""
    batch = f", batch {listing([str(size) for size in batches])}" if batches else ""
    return (
        f"{models} fine-tuned with LoRA on {data}{where}{batch}: "
        f"{progress['good']} of {plural(progress['planned'], 'trial')} ended well."
    )


def glance(found: Findings) -> Table:
    """One row per mode: accuracy, weights, peak, speed."""
    compared = {str(row["quantization"]): row for row in found.comparison.to_dict("records")}
    rows = []
    for mode in modes_of(found.study.trials):
        memory = found.memory[found.memory["quantization"] == mode]
        peaks = found.peaks[found.peaks["quantization"] == mode]
        speed = found.speed[found.speed["quantization"] == mode]
        row = compared.get(mode)
        accuracy, verdict = "baseline", MISSING
        if row is not None:
            interval = between(row["ci_low"], row["ci_high"], scale=100)
            accuracy = points(row["mean_difference"])
            accuracy += f" ({interval})" if interval != MISSING else ""
            verdict = str(row["verdict"])
        rows.append(
            [
                clean(mode),
                accuracy,
                verdict,
                _range(memory["of_fp32"] - 1),
                _range(memory["of_16bit"] - 1),
                _range(peaks["ratio"] - 1) if row else "baseline",
                number(speed["ratio"].mean()) if row else "baseline",
            ]
        )
    columns = (
        "mode", "accuracy against none (95 % interval)", "verdict", "weights against fp32",
        "weights against 16 bit", "training peak against none", "speed against none",
    )  # fmt: skip
    note = "Where models differ, the range over them. A dash: not measured. Speed 0.8 means 20 % "
    note += "fewer images per second."
    return Table("glance", "All modes at a glance", columns, rows, note)


def _range(changes: pd.Series) -> str:
    """``−85 to −83 %`` over models and machines, or a dash."""
    known = changes.astype("float64").dropna() * 100
    if known.empty:
        return MISSING
    digits = 0 if known.abs().max() >= 10 else 1
    low, high = signed(known.min(), digits), signed(known.max(), digits)
    return f"{low} %" if low == high else f"{low} to {high} %"


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
    """One self-contained document: no script, no request, figures embedded."""
    images = {
        key: base64.b64encode(png(drawn)).decode("ascii")
        for key, drawn in page.figures.items()
        if drawn.figure is not None
    }
    template = _environment(True).get_template("report.html.j2")
    return str(template.render(page=page, images=images))


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


def _report(study: str, to: Path | None) -> str:
    """Where report.html is. That of a study behind a URI is put back, unless it goes ``to``."""
    if not remote.is_uri(study):
        if to is not None:
            raise StudyError(f"--to {to}: it is for a study behind a URI; leave it out")
        return str(write_report(study))
    if to is not None:
        if to.exists():
            raise StudyError(f"--to {to}: it is there already; name a new folder")
        places.fetch(study, to)
        return str(write_report(to))
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
    try:
        path = _report(options.study, options.to)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the report can't be written: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
