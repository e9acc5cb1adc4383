"""Findings -> the page: banners, scope, the answer, all modes at a glance, the chapters.

The report's three forms (HTML, Markdown, LaTeX tables) are made from the same sections, so that
they can't disagree. A section that has nothing to show says why.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pandas as pd

from analysis.chapters import search
from analysis.chapters.accuracy import accuracy
from analysis.chapters.costs import memory, speed
from analysis.chapters.dependence import dependence
from analysis.chapters.literature import literature
from analysis.chapters.search import front_table
from analysis.chapters.training import convergence, gradients
from analysis.chapters.trials import methods, trials
from analysis.figures.gallery import draw_all
from analysis.figures.style import Drawn
from analysis.findings import decisions, summary
from analysis.findings.decisions import Decision, meaning
from analysis.findings.findings import Findings
from analysis.statistics.cells import machines_of, modes_of
from analysis.text.layout import Section, Table, clean, cleaned
from analysis.text.wording import (
    MISSING,
    between,
    either,
    listing,
    number,
    plural,
    points,
    short,
    span_of,
)
from tune_study.folder import names

QUESTION = (
    "LoRA trains small matrices beside a frozen network. Quantization stores the frozen weights in "
    "fewer bits: what does that save, and what does it cost?"
)


class Page(NamedTuple):
    """What the templates show. ``verdict`` has a line per answer: what to do, if what, decided or
    not; ``picture`` the keys of the figures beside it."""

    title: str
    simulated: bool
    banners: list[str]
    question: str
    scope: str
    verdict: list[tuple[str, str, bool]]
    picture: tuple[str, ...]
    decisions: list[Decision]
    modes: list[tuple[str, str]]
    glance: Table
    sections: list[Section]
    figures: dict[str, Drawn]


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
        verdict=_verdict(found),
        picture=_picture(found),
        decisions=[_cleaned(line) for line in found.decisions],
        modes=_modes(trials),
        glance=glance(found) if found.search is None else _of_search(found),
        sections=[cleaned(section) for section in sections(found)],
        figures=draw_all(found),
    )


def sections(found: Findings) -> list[Section]:
    """The chapters after the decision table, in the order of the report."""
    if found.search is not None:
        chapter = memory(found)
        about_memory = chapter._replace(
            paragraphs=chapter.paragraphs[:1], figures=("memory_ledger",)
        )
        of_search = search.section(found.search, found.study.trials)
        return [of_search, about_memory, trials(found), methods(found)]
    return [
        accuracy(found),
        *dependence(found),
        memory(found),
        speed(found),
        convergence(found),
        gradients(found),
        literature(found),
        trials(found),
        methods(found),
    ]


def _verdict(found: Findings) -> list[tuple[str, str, bool]]:
    """The answer in a line or two: of a search every line, of a grid the tolerances."""
    lines = [_cleaned(line) for line in found.decisions]
    if found.search is not None:
        return [(line.answer, f"if y{line.question[1:]}", line.decided) for line in lines]
    amounts: dict[tuple[str, bool], list[str]] = {}
    for line in lines:
        if line.question.startswith(decisions.ACCEPT):
            answer = (line.answer.partition(":")[0], line.decided)
            amounts.setdefault(answer, []).extend(re.findall(r"\d[\d.]*", line.question))
    return [
        (answer, f"if you accept a loss of {either(several)} pp of accuracy", decided)
        for (answer, decided), several in amounts.items()
    ]


def _picture(found: Findings) -> tuple[str, ...]:
    if found.search is None:
        return ("accuracy_difference", "pareto_weights")
    several = len(found.search.objectives) > 1
    return ("search_front", "search_progress") if several else ("search_progress",)


def _modes(trials: pd.DataFrame) -> list[tuple[str, str]]:
    """Each mode in words; of a treatment that is more, its mode."""
    treatments = modes_of(trials["quantization"])
    modes = dict.fromkeys(names.mode_in(treatment) or treatment for treatment in treatments)
    return [(clean(mode), meaning(mode)) for mode in modes]


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
    machines = [clean(name) for name in machines_of(trials)]
    batches = sorted({int(size) for size in ran["batch_size"].dropna()})
    where = f" on {listing(machines)}" if machines else ""
    batch = f", batch {listing([str(size) for size in batches])}" if batches else ""
    return (
        f"LoRA fine-tuning of {models} on {data}{where}{batch}: "
        f"{progress['good']} of {plural(progress['planned'], 'trial')} ended well."
    )


def glance(found: Findings) -> Table:
    """One row per mode: accuracy, weights, peak, speed."""
    compared = {str(row["quantization"]): row for row in found.comparison.to_dict("records")}
    rows = []
    for mode in modes_of(found.study.trials["quantization"]):
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
                span_of(memory["of_fp32"] - 1, sign=True),
                span_of(memory["of_16bit"] - 1, sign=True),
                span_of(peaks["ratio"] - 1, sign=True) if row else "baseline",
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
