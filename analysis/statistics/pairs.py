"""Trials -> matched differences, and the tables of means that need no test."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.folder.configurations import SHORT
from analysis.folder.contents import StudyError
from analysis.statistics.cells import TIMED, apart_by, finished, modes_of, named, units
from tune_study.folder import schema

PAIR = ["configuration", "seed"]
"""What a quantized trial and the baseline that it is set against share."""
EXACT = {
    "total_parameters",
    "trainable_parameters",
    "quantized_layers",
    "weights_bytes",
    "weights_bytes_fp32",
    "weights_bytes_16bit",
    "adapter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
}
"""Counted from the tensors: the same in every run, so there is nothing to infer about."""
MACHINE_BOUND = TIMED | {"activation_bytes", "peak_train_bytes", "rss_peak_bytes"}
"""Measured on the hardware, so never paired or averaged across different machines."""


def check(trials: pd.DataFrame, metric: str, baseline: str | None, confidence: float) -> None:
    """Raises ``StudyError`` for a metric, baseline or confidence that can't be meant."""
    for column in [*SHORT, "quantization", "seed"]:
        if column not in trials:
            raise StudyError(f"the table lacks the column {column!r}: pass the trials table")
    if metric not in trials:
        close = difflib.get_close_matches(metric, [str(c) for c in trials.columns], n=1)
        meant = f"did you mean {close[0]}?" if close else "choose a column of the trials table"
        raise StudyError(f"metric {metric!r} is no column of the trials table: {meant}")
    if not pd.api.types.is_numeric_dtype(trials[metric].dtype):
        raise StudyError(f"metric {metric!r} holds no numbers: choose a numeric column")
    if baseline is not None and baseline not in {*schema.MODES, *modes_of(trials["quantization"])}:
        raise StudyError(
            f"baseline {baseline!r} is no quantization mode: choose of {', '.join(schema.MODES)}"
        )
    if not 0.5 <= confidence < 1:
        raise StudyError(f"confidence {confidence} is not within 0.5 to 1: use e.g. 0.95")


def modes_beside(trials: pd.DataFrame, baseline: str) -> list[str]:
    """The modes that are planned, in the schema's order, without ``baseline``."""
    return [mode for mode in modes_of(trials["quantization"]) if mode != baseline]


def why_unlike(trials: pd.DataFrame, metric: str) -> str:
    """Why the trials that ``metric`` would be compared over are not comparable; "" if they are.

    A clause, such as ``on 2 machines``.
    """
    if metric not in MACHINE_BOUND:
        return ""
    good = finished(trials, metric)
    words = {
        "machine": "on {} machines",
        "trials_on_device": "with {} counts of trials on a device",
    }
    found = {name: good[name].nunique(dropna=False) for name in apart_by(trials, metric)}
    return " and ".join(words[name].format(count) for name, count in found.items() if count > 1)


def _require_alike(trials: pd.DataFrame, metric: str) -> None:
    if why := why_unlike(trials, metric):
        raise StudyError(
            f"metric {metric!r} was measured {why}, across which it is not comparable: select the "
            "trials of one"
        )


def cell_values(table: pd.DataFrame, metric: str, keys: list[str]) -> pd.DataFrame:
    """``metric`` with a row per value of ``keys``, such as ``PAIR``, a column per mode.

    Rows that agree on all of these are the same trial, repeated: they are averaged.
    """
    by_mode = [*keys, "quantization"]
    grouped = table.groupby(by_mode, observed=True, dropna=False, sort=False)[metric].mean()
    return grouped.unstack("quantization").sort_index(axis=0)


def duplicates(trials: pd.DataFrame, metric: str) -> int:
    """Trials beyond the first of a configuration, mode and seed: nothing tells them apart."""
    good = finished(named(trials), metric)
    return int(good.duplicated([*PAIR, "quantization"]).sum())


def matched(
    table: pd.DataFrame,
    about: pd.DataFrame,
    metric: str,
    baseline: str,
    keys: Sequence[str] = PAIR,
) -> pd.DataFrame:
    """Every mode's rows beside those of ``baseline`` that agree on ``keys``: the one pairing.

    ``table`` has the ``keys``, which begin with ``configuration``, ``quantization`` and
    ``metric``; ``about`` are the ``units`` of its trials. One row per pair, the modes one after
    another, each in the order of ``about``: its columns, ``keys``, ``quantization``, ``base`` and
    ``value`` (the metric of the two), and ``difference``, value minus base, in the metric's unit.
    """
    wide = cell_values(table, metric, list(keys))
    frames = []
    for mode in modes_beside(table, baseline):
        if baseline not in wide or mode not in wide:
            continue
        pair = wide[[baseline, mode]].dropna()
        pair.columns = pd.Index(["base", "value"])
        frames.append(about.merge(pair.reset_index(), on="configuration").assign(quantization=mode))
    columns = [*about, *(key for key in keys if key not in about), "quantization", "base", "value"]
    pairs = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    pairs = pairs[columns].astype({"base": "float64", "value": "float64"})
    difference = (pairs["value"] - pairs["base"]).to_numpy()
    # Rounding alone must not look like a spread, from which a test would then infer.
    rounding = 1e-12 * pairs[["base", "value"]].abs().max(axis=1).to_numpy()
    return pairs.assign(difference=np.where(np.abs(difference) <= rounding, 0.0, difference))


def paired_differences(
    trials: pd.DataFrame,
    *,
    metric: str = "test_accuracy",
    baseline: str = "none",
    same_machine: bool = False,
) -> pd.DataFrame:
    """Each mode against ``baseline``, matched on configuration and seed.

    :func:`matched` over the trials that ended well, each with a finite ``metric``.
    ``same_machine`` pairs within one machine only, and what takes time among as many trials on a
    device. Raises ``StudyError``, also for a measure of the hardware that would be paired across.
    """
    check(trials, metric, baseline, 0.95)
    keys = list(PAIR)
    if not same_machine:
        _require_alike(trials, metric)
    else:
        keys += apart_by(trials, metric)
    trials = named(trials)
    return matched(finished(trials, metric), units(trials), metric, baseline, keys)


def planned_pairs(trials: pd.DataFrame, mode: str, baseline: str) -> int:
    """Pairs that the plan holds, whatever became of their trials."""
    trials = named(trials)
    ours, theirs = (
        pd.MultiIndex.from_frame(trials.loc[trials["quantization"] == name, PAIR]).unique()
        for name in (mode, baseline)
    )
    return int(ours.isin(theirs).sum()) if len(ours) and len(theirs) else 0


def cell_means(trials: pd.DataFrame, *, metric: str = "test_accuracy") -> pd.DataFrame:
    """Mean of ``metric`` over the seeds: a row per configuration, a column per mode.

    Raises ``StudyError`` like :func:`paired_differences`.
    """
    check(trials, metric, None, 0.95)
    _require_alike(trials, metric)
    trials = named(trials)
    wide = cell_values(finished(trials, metric), metric, PAIR)
    means = wide.groupby("configuration").mean()
    known = [mode for mode in modes_of(trials["quantization"]) if mode in means]
    return units(trials).merge(means[known].reset_index(), on="configuration")


def seed_intervals(trials: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """Per configuration and mode: the difference to ``none`` over its seeds. No p-value.

    The t-interval is about seeds of this very configuration and says nothing of others. Columns:
    those that tell the configuration, quantization, n_seeds, mean, sd, ci_low, ci_high, note.
    """
    pairs = paired_differences(trials)
    grouped = pairs.groupby(["configuration", "quantization"])["difference"]
    table = grouped.agg(n_seeds="size", mean="mean", sd="std").reset_index()
    table = units(trials).merge(table, on="configuration")
    n = table["n_seeds"].to_numpy("float64")
    reach = stdtrit(np.maximum(n - 1, 1), 0.5 + confidence / 2) * table["sd"] / np.sqrt(n)
    constant = (table["sd"] <= 1e-12 * table["mean"].abs()) | (table["sd"] == 0)
    reach = reach.where(~constant)
    notes = np.where(constant, "the seeds agree exactly: no spread to make an interval of", "")
    return table.assign(
        ci_low=table["mean"] - reach,
        ci_high=table["mean"] + reach,
        note=np.where(n < 2, "one seed: nothing tells how much another would differ", notes),
    )


def margin_of(trials: pd.DataFrame, metric: str) -> float | None:
    """The margin of DESIGN.md: 1 pp of accuracy, 0.5 pp when all data are CIFAR-10, else none."""
    if not metric.endswith("accuracy"):
        return None
    return 0.005 if set(trials["dataset"].dropna().unique()) == {"cifar10"} else 0.01
