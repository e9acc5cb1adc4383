"""The chapters on the trials, on the methods, and on where all comes from."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.chapters import search
from analysis.findings.findings import Findings
from analysis.statistics.cells import varying
from analysis.text.layout import Cell, Section, Table, count, size, table_of, text
from analysis.text.wording import MISSING, kilojoules, number, percent, plural, seconds, short
from tune_study.folder import schema
from tune_study.folder.files import mapping
from tune_study.folder.names import field_in_words


def trials(found: Findings) -> Section:
    frame = found.study.trials
    good = int(frame["status"].isin(schema.GOOD_STATUSES).sum())
    paragraphs = [f"{good} of {plural(len(frame), 'planned trial')} ended well."]
    statuses = [name for name in schema.STATUSES if name in found.counts]
    cells: dict[str, Cell] = {"mode": text("quantization")}
    for status in statuses:
        cells[status.replace("_", " ")] = count(status)
    cells["planned"] = count("planned")
    per_mode = found.counts.reset_index(names="quantization")
    tables = [table_of("trials", "What became of the trials", per_mode, cells)]
    bad = frame[frame["status"].isin(("diverged", "oom", "error"))]
    if len(bad):
        tables.append(
            table_of(
                "failures",
                "Trials that failed",
                bad.head(50),
                {
                    "trial": text("trial_id"),
                    "configuration": text("configuration"),
                    "mode": text("quantization"),
                    "status": text("status"),
                    "epochs": text("epochs_completed"),
                    "reason": text("error"),
                },
                wide=(0, 1, 5),
                note="" if len(bad) <= 50 else f"The first 50 of {len(bad)}.",
            )
        )
    if found.problems:
        paragraphs.append("While reading the study folder, these problems were found:")
        rows = [[problem] for problem in found.problems[:50]]
        note = "" if len(found.problems) <= 50 else f"The first 50 of {len(found.problems)}."
        tables.append(Table("problems", "Problems", ("problem",), rows, note, (0,)))
    tables.append(every_trial(frame))
    return Section("trials", "Trials", paragraphs, tables)


MOST_TRIALS = 1000
_HEADINGS = {"lora_r": "LoRA r", "lora_alpha": "LoRA alpha"}


def every_trial(frame: pd.DataFrame) -> Table:
    """A row per trial: what sets it apart, what became of it, and where it lies."""
    cells: dict[str, Cell] = {
        _HEADINGS.get(name, field_in_words(name)): _brief(name) for name in varying(frame)
    }
    cells["mode"] = text("quantization")
    picks = len(cells) - 1
    cells |= {"seed": text("seed"), "status": text("status")}
    measured: dict[str, tuple[str, Cell]] = {
        "test_accuracy": ("test accuracy", lambda r: percent(r["test_accuracy"], 2)),
        "val_accuracy": ("validation accuracy", lambda r: percent(r["val_accuracy"], 2)),
        "epochs_completed": ("epochs", text("epochs_completed")),
        "weights_bytes": ("base weights", size("weights_bytes")),
        "peak_train_bytes": ("peak", size("peak_train_bytes")),
        "images_per_s": ("images per s", lambda r: number(r["images_per_s"], 1)),
        "train_time_s": ("training", lambda r: seconds(r["train_time_s"])),
        "train_energy_j": ("energy", lambda r: kilojoules(r["train_energy_j"])),
    }
    cells |= {title: cell for name, (title, cell) in measured.items() if frame[name].notna().any()}
    if (frame["trials_on_device"] > 1).any():
        cells["on the device"] = count("trials_on_device")
    cells["trial"] = text("trial_id")
    more = len(frame) - MOST_TRIALS
    return table_of(
        "every_trial",
        "Every trial",
        frame.head(MOST_TRIALS),
        cells,
        note=f"The first {MOST_TRIALS} of {len(frame)}; all are in trials.csv." if more > 0 else "",
        sortable=True,
        picks=(picks, picks + 2),
    )


def _brief(name: str) -> Cell:
    return lambda row: MISSING if pd.isna(row[name]) else short(row[name], 40)


def methods(found: Findings) -> Section:
    paragraphs = [
        "Unit of inference: the configuration. Differences are paired on seed, averaged within "
        "each configuration, and carry a t-interval over configuration means; a bootstrap over "
        "configurations, sign flips and Wilcoxon's test check it. Seeds of one configuration get "
        "an interval and no p-value.",
        "What the intervals do not cover: other model families, other data, settings that this "
        "study did not vary, and the sampling of the test images, which all modes share.",
        "Test images never influenced a choice: the test accuracy is read once, at the epoch "
        "with the best validation accuracy.",
    ]
    if found.search is not None:
        paragraphs = [search.METHODS, paragraphs[-1]]
    rows = [[name, value] for name, value in provenance(found.study.manifest)]
    table = Table("provenance", "Where this comes from", ("what", "value"), rows, "", (1,))
    return Section("methods", "Methods and provenance", paragraphs, [table])


def provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Command, time, commit, hardware and versions of a study.json, as far as it has them."""
    recorded = mapping(manifest, "provenance")
    rows = [
        (key, str(manifest[key])) for key in ("command", "created", "grid") if manifest.get(key)
    ]
    if recorded.get("commit"):
        rows.append(("commit", str(recorded["commit"])))
    for key in ("hardware", "versions"):
        part = mapping(recorded, key)
        rows += [(f"{key}: {name}", str(value)) for name, value in part.items() if value]
    for name in mapping(recorded, "data"):
        entry = mapping(recorded, "data", name)
        if digest := entry.get("sha256"):
            rows.append((f"data: {name}", f"sha256 {str(digest)[:16]}"))
        if found := entry.get("images"):
            rows.append((f"images: {name}", str(found)))
        if isinstance(left_out := entry.get("left_out"), list) and left_out:
            rows.append((f"left out: {name}", _listed(left_out)))
    for name in mapping(recorded, "code"):
        entry = mapping(recorded, "code", name)
        if entry.get("models"):
            rows.append((f"code: {name}", f"sha256 {str(entry.get('sha256'))[:16]}"))
    return rows


def _listed(names: list[Any], most: int = 50) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
