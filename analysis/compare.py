"""The same cells under two versions, machines or settings: study B against study A.

``python -m analysis.compare STUDY_A STUDY_B``. Trials are paired on configuration, quantization
mode and seed; the inference is that of ``comparison.compare_modes``, with A in the role of the
baseline, per mode and over all modes together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.chapters.trials import provenance
from analysis.folder.configurations import FIELDS, SHORT
from analysis.folder.places import near
from analysis.load import Study, StudyError, read_study, told
from analysis.statistics.cells import counts_on_device, machines_of, modes_of, named, varying
from analysis.statistics.comparison import compare_modes
from analysis.statistics.pairs import paired_differences
from analysis.text.layout import clean
from analysis.text.wording import between, known, listing, number, p_value, plural, points, signed
from tune_study.folder import names
from tune_study.folder.remote import masked

METRICS = (
    "test_accuracy", "val_accuracy", "weights_bytes", "peak_train_bytes", "rss_peak_bytes",
    "images_per_s", "train_time_s", "train_energy_j",
)  # fmt: skip
CELL = ["configuration", "quantization", "seed"]


class Comparison(NamedTuple):
    """What B changes against A.

    ``table`` has a row per metric and mode (``all`` for every mode together): the columns of
    ``comparison.compare_modes`` with ``quantization`` the mode, ``mean_a``, ``mean_b``,
    ``relative`` (mean_b over mean_a - 1) and ``identical``, pairs that agree to the last bit.
    ``differences`` are (what, in A, in B) of command, hardware and versions.
    """

    table: pd.DataFrame
    differences: list[tuple[str, str, str]]
    only_a: list[str]
    only_b: list[str]
    changed_status: list[str]
    n_pairs: int
    notes: list[str]


def compare(a: Study, b: Study) -> Comparison:
    """Pair the trials of two studies. Raises ``StudyError`` when nothing can be paired."""
    kinds = (bool(a.manifest.get("simulated")), bool(b.manifest.get("simulated")))
    if kinds[0] != kinds[1]:
        raise StudyError("one study is simulated and the other is not: compare like with like")
    trials_a, trials_b = _alike(a.trials, b.trials)
    cells_a, cells_b = _cells(trials_a), _cells(trials_b)
    shared = cells_a.index.intersection(cells_b.index)
    if shared.empty:
        raise StudyError(
            "the two studies share no cell (model, data set, LoRA, what else varies, quantization "
            "and seed): compare studies that planned the same trials"
        )
    hardware = {*machines_of(a.trials), *machines_of(b.trials)}
    notes = ["The studies are simulated."] if kinds[0] else []
    if len(hardware) > 1:
        notes.append(
            f"The machines differ ({listing(sorted(hardware))}): memory and time compare the "
            "machines as much as the versions."
        )
    beside = [listing(counts_on_device(trials, "images_per_s")) for trials in (a.trials, b.trials)]
    if beside[0] != beside[1] and all(beside):
        notes.append(
            f"Trials on a device at a time: {beside[0]} in A, {beside[1]} in B; time compares that "
            "as much as the versions."
        )
    both = cells_a.loc[shared, ["trial_id", "status"]].assign(b=cells_b.loc[shared, "status"])
    moved = both[both["status"] != both["b"]].to_dict("records")
    return Comparison(
        table=_table(trials_a, trials_b, shared),
        differences=_differences(a.manifest, b.manifest)
        + _settings((a, b), (cells_a, cells_b), shared),
        only_a=_named(cells_a, cells_a.index.difference(cells_b.index)),
        only_b=_named(cells_b, cells_b.index.difference(cells_a.index)),
        changed_status=[
            f"{row['trial_id']}: {row['status']} in A, {row['b']} in B" for row in moved
        ],
        n_pairs=len(shared),
        notes=notes,
    )


def _alike(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables with configurations by the same names: those of what varies within a study.

    A setting that is one in all of A and another in all of B is what is compared, and no part of a
    cell's name.
    """
    axes = {*SHORT, *varying(a), *varying(b)}
    own = [[name for name in FIELDS if name in table and name in axes] for table in (a, b)]
    both = pd.concat([table[names] for table, names in zip((a, b), own, strict=True)])
    texts = named(both.reset_index(drop=True))["configuration"].to_numpy()
    other = [name for name in FIELDS if name not in axes]
    a, b = (table.drop(columns=other, errors="ignore") for table in (a, b))
    return a.assign(configuration=texts[: len(a)]), b.assign(configuration=texts[len(a) :])


def _cells(trials: pd.DataFrame) -> pd.DataFrame:
    """One trial of each cell; what repeats a cell tells no more about which there are."""
    return trials.drop_duplicates(CELL).set_index(CELL).sort_index()


def _named(cells: pd.DataFrame, keys: pd.Index) -> list[str]:
    return [str(name) for name in cells.loc[keys, "trial_id"]]


def _table(a: pd.DataFrame, b: pd.DataFrame, shared: pd.Index) -> pd.DataFrame:
    """Rows of ``compare_modes`` for every metric and mode, A being the baseline."""
    stacked = pd.concat(
        [frame.assign(_study=name) for name, frame in (("A", a), ("B", b))],
        ignore_index=True,
    )
    stacked = stacked[pd.MultiIndex.from_frame(stacked[CELL]).isin(shared)]
    # The pairs are across machines on purpose; compare_modes would refuse them.
    stacked = stacked.drop(columns=["machine", "trials_on_device"], errors="ignore")
    modes = modes_of(stacked["quantization"])
    rows = []
    for metric in METRICS:
        if not stacked[metric].notna().any():
            continue
        for mode in [*modes, "all"] if len(modes) > 1 else modes:
            own = stacked if mode == "all" else stacked[stacked["quantization"] == mode]
            rows.append(_row(own, metric, mode))
    return pd.DataFrame(rows)


def _row(own: pd.DataFrame, metric: str, mode: str) -> dict[Any, Any]:
    """One metric of one mode, B against A. Over all modes, a seed's modes count as its repeats."""
    if mode == "all":
        seeds = own["seed"].astype("string") + "/" + own["quantization"].astype("string")
        own = own.assign(seed=seeds)
    renamed = own.assign(quantization=own["_study"].astype("string"))
    rng = np.random.default_rng(0)
    found = compare_modes(renamed, metric=metric, baseline="A", rng=rng)
    pairs = paired_differences(renamed, metric=metric, baseline="A")
    row: dict[Any, Any] = found.to_dict("records")[0]
    mean_a, mean_b = pairs["base"].mean(), pairs["value"].mean()
    identical = int((pairs["difference"] == 0).sum())
    if len(pairs) and identical == len(pairs):
        row |= {"verdict": "identical", "note": ""}
    return row | {
        "quantization": mode,
        "mean_a": mean_a,
        "mean_b": mean_b,
        "relative": mean_b / mean_a - 1 if mean_a else np.nan,
        "identical": identical,
        "n_pairs": len(pairs),
    }


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, in A, in B) of what differs between two flat records."""
    pairs = [
        (name, str(a.get(name, "not recorded")), str(b.get(name, "not recorded")))
        for name in dict.fromkeys([*a, *b])
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    unlike = _unlike(dict(provenance(a)), dict(provenance(b)))
    return [difference for difference in unlike if difference[0] != "created"]


def _settings(
    studies: Sequence[Study], cells: Sequence[pd.DataFrame], shared: pd.Index
) -> list[tuple[str, str, str]]:
    """Settings of the planned configurations that differ in a shared cell, each pair once."""
    plans = [
        {str(entry["trial_id"]): names.settings(entry) for entry in study.manifest["plan"]}
        for study in studies
    ]
    ids = zip(*(own.loc[shared, "trial_id"].astype(str) for own in cells), strict=True)
    found = dict.fromkeys(
        (f"setting: {name}", in_a, in_b)
        for one, other in ids
        for name, in_a, in_b in _unlike(plans[0].get(one, {}), plans[1].get(other, {}))
    )
    return list(found)[:50]


def in_words(found: Comparison, places: tuple[str, str]) -> str:
    """The comparison as text for a terminal."""
    lines = [f"A: {places[0]}", f"B: {places[1]}", *found.notes]
    lines.append(f"{plural(found.n_pairs, 'cell')} in both.")
    for label, missing in (("A", found.only_a), ("B", found.only_b)):
        if missing:
            lines.append(f"Only in {label}: {listing(missing)}")
    if found.changed_status:
        lines.append("Another status: " + listing(found.changed_status, 6))
    if found.differences:
        lines += ["", "What differs between the studies:"]
        lines += [f"  {name}: {one} -> {other}" for name, one, other in found.differences]
    header = ("metric", "mode", "A", "B", "B - A", "95 % interval", "p", "verdict", "pairs", "same")
    body = [_cells_of(row) for row in found.table.to_dict("records")]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines.append("")
    for line in [header, *body]:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    lines += [
        "",
        "B - A is over configurations; a relative change stands in brackets. 'same' counts pairs "
        "that agree to the last bit. A p that is not small is no proof of no difference.",
    ]
    notes = {str(row.get("note")) for row in found.table.to_dict("records") if row.get("note")}
    lines += [f"Note: {note}" for note in sorted(notes)[:6]]
    return "\n".join(line.rstrip() for line in lines)


def _cells_of(row: dict[Any, Any]) -> tuple[str, ...]:
    accuracy = str(row["metric"]).endswith("accuracy")
    size = str(row["metric"]).endswith("_bytes")
    scale, unit = (100.0, " %") if accuracy else (1e-6, " MB") if size else (1.0, "")
    means = tuple(f"{number(row[key] * scale)}{unit}" for key in ("mean_a", "mean_b"))
    change = points(row["mean_difference"])
    if not accuracy:
        relative = f"{signed(row['relative'] * 100, 1)} %"
        change = f"{signed(row['mean_difference'] * scale)} ({relative})"
    return (
        str(row["metric"]).removesuffix("_bytes"),
        str(row["quantization"]),
        *means,
        change if known(row["mean_difference"]) else "–",
        between(row["ci_low"], row["ci_high"], scale=scale),
        p_value(row["p_t"]),
        str(row.get("verdict") or "–"),
        str(row["n_pairs"]),
        str(row["identical"]),
    )


def _told(study_a: str, study_b: str) -> str:
    """The comparison in words; what is wrong with the folders goes to stderr."""
    with near(study_a) as folder_a, near(study_b) as folder_b:
        a, b = read_study(folder_a), read_study(folder_b)
    found = compare(a, b)
    for name, study in (("A", a), ("B", b)):
        for problem in study.problems:
            print(clean(f"{name}: {problem}"), file=sys.stderr)
    words = in_words(found, (masked(study_a), masked(study_b)))
    return "\n".join(clean(line) for line in words.split("\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 and one sentence for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare", description="Compare the same cells of two studies."
    )
    parser.add_argument("study_a", help="folder or URI of the study to compare with")
    parser.add_argument("study_b", help="folder or URI of the study that changed something")
    options = parser.parse_args(arguments)
    return told(lambda: _told(options.study_a, options.study_b), "a study can't be read")


if __name__ == "__main__":
    sys.exit(main())
