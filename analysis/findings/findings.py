"""Everything the report says, computed once from a study: tables only, nothing formatted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.findings import decisions, search_decisions
from analysis.literature import claims, qlora, vision
from analysis.load import Study
from analysis.measures import convergence, curves
from analysis.measures.memory import memory_ledger, memory_ratios, peak_ratios, quantized_parameters
from analysis.measures.pareto import pareto_front
from analysis.measures.search import Searched, searched
from analysis.statistics import ratios
from analysis.statistics.cells import (
    cells,
    finished,
    modes_of,
    named,
    pooled_sd,
    seed_spread,
    units,
)
from analysis.statistics.comparison import compare_modes, leave_one_out
from analysis.statistics.dependence import AxisEffects, axis_effects
from analysis.statistics.exploration import friedman
from analysis.statistics.pairs import paired_differences
from tune_study.folder import schema

GRADIENT_METRICS = (
    "grad_norm_mean",
    "grad_norm_cv",
    "stability_score",
    "grad_explosions",
    "grad_vanishing_layers",
    "loss_spikes",
    "gradient_cosine",
    "gradient_norm_ratio",
)


class Findings(NamedTuple):
    """The tables behind one report. Fractions are 0..1, sizes bytes, times seconds."""

    study: Study
    simulated: bool
    counts: pd.DataFrame
    comparison: pd.DataFrame
    differences: pd.DataFrame
    by_dataset: pd.DataFrame
    cells: pd.DataFrame
    seed_spread: pd.DataFrame
    seed_sds: pd.DataFrame
    friedman: pd.DataFrame
    leave_one_out: pd.DataFrame
    axes: AxisEffects
    memory: pd.DataFrame
    ledger: pd.DataFrame
    peaks: pd.DataFrame
    speed: pd.DataFrame
    energy: pd.DataFrame
    energy_front: pd.DataFrame
    convergence: pd.DataFrame
    convergence_comparison: pd.DataFrame
    early_stopping: pd.DataFrame
    gradients: pd.DataFrame
    gradient_comparison: pd.DataFrame
    layers: pd.DataFrame
    ours: pd.DataFrame
    qlora: pd.DataFrame
    vision: pd.DataFrame
    literature: claims.Literature
    decisions: list[decisions.Decision]
    problems: list[str]
    search: Searched | None = None
    """Of a search; its trials differ in more than mode and seed, so nothing is paired."""


def compute(study: Study) -> Findings:
    """All tables of the report. Deterministic: resampling starts from a fixed generator."""
    if isinstance(study.manifest.get("search"), Mapping):
        study = _by_mode(study)
    trials, epochs, asked = study.trials, study.epochs, searched(study)
    # What a search tried differs in more than mode and seed: no comparison gets to see it.
    paired = trials if asked is None else trials.assign(status="pending")
    layers = quantized_parameters(study.path, trials)
    memory = memory_ratios(trials, layers)
    ledger = memory_ledger(trials)
    speed = ratios.metric_ratios(paired, metric="images_per_s")
    comparison = _compare(paired, "test_accuracy")
    spread = seed_spread(paired)
    per_trial = convergence.convergence_table(epochs, paired)
    heat, problems = curves.layer_gradients(study.path, trials)
    published = claims.load()
    return Findings(
        study=study,
        simulated=bool(study.manifest.get("simulated")),
        counts=counts(trials),
        comparison=comparison,
        differences=configuration_differences(paired),
        by_dataset=_by_dataset(paired),
        cells=cells(trials),
        seed_spread=spread,
        seed_sds=pooled_sd(spread),
        friedman=friedman(paired),
        leave_one_out=leave_one_out(paired),
        axes=axis_effects(paired if asked is None else paired.iloc[:0]),
        memory=memory,
        ledger=ledger,
        peaks=peak_ratios(ledger if asked is None else ledger[:0], trials),
        speed=speed,
        energy=ratios.metric_ratios(paired, metric="train_energy_j"),
        energy_front=pareto_front(paired, cost="train_energy_j"),
        convergence=per_trial,
        convergence_comparison=convergence.compare_convergence(per_trial),
        early_stopping=convergence.early_stopping(per_trial),
        gradients=means_per_mode(trials, GRADIENT_METRICS),
        gradient_comparison=_comparisons(paired, GRADIENT_METRICS[:3]),
        layers=heat,
        ours=ratios.our_ratios(paired),
        qlora=qlora.qlora_ratios(paired, published),
        vision=vision.vision_references(paired, published),
        literature=published,
        decisions=decisions.decide(trials, epochs, comparison, memory, ledger, speed)
        if asked is None
        else search_decisions.decide(asked),
        problems=[*study.problems, *problems],
        search=asked,
    )


def _by_mode(study: Study) -> Study:
    """A search draws skipped layers too: its treatments are as many as its trials."""
    mode = study.trials["quantization.mode"].fillna(study.trials["quantization"])
    return study._replace(trials=study.trials.assign(quantization=mode))


def _compare(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    return compare_modes(trials, metric=metric, rng=np.random.default_rng(0))


def _comparisons(trials: pd.DataFrame, metrics: tuple[str, ...]) -> pd.DataFrame:
    frames = [_compare(trials, metric) for metric in metrics if trials[metric].notna().any()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def counts(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials per mode and status: a row per mode in the schema's order, a column per status."""
    table = pd.crosstab(trials["quantization"], trials["status"])
    order = [status for status in schema.STATUSES if status in table]
    table = table.reindex(modes_of(trials["quantization"]))[order]
    return table.assign(planned=table.sum(axis=1)).rename_axis(columns=None)


def configuration_differences(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean paired difference of the test accuracy per (configuration, mode), as a fraction."""
    pairs = paired_differences(trials)
    grouped = pairs.groupby(["configuration", "quantization"])["difference"]
    table = grouped.agg(difference="mean", n="size").reset_index()
    return units(trials).merge(table, on="configuration")


def _by_dataset(trials: pd.DataFrame) -> pd.DataFrame:
    """``compare_modes`` within each data set; empty when there is only one."""
    names = sorted(str(name) for name in trials["dataset"].dropna().unique())
    if len(names) < 2:
        return pd.DataFrame()
    frames = [
        _compare(trials[trials["dataset"] == name], "test_accuracy").assign(dataset=name)
        for name in names
    ]
    return pd.concat(frames, ignore_index=True)


def means_per_mode(trials: pd.DataFrame, metrics: tuple[str, ...]) -> pd.DataFrame:
    """Mean of each metric over configuration means, per mode; ``n`` trials that ended well."""
    good, order = finished(named(trials)), units(trials)["configuration"]
    rows: list[dict[str, Any]] = []
    for mode in modes_of(trials["quantization"]):
        own = good[good["quantization"] == mode]
        row: dict[str, Any] = {"quantization": mode, "n": len(own)}
        for metric in metrics:
            values = own[metric].astype("float64")
            grouped = values.groupby(own["configuration"], sort=False)
            means = grouped.mean()
            row[metric] = float(means.reindex(order[order.isin(means.index)]).mean())
        rows.append(row)
    return pd.DataFrame(rows, columns=["quantization", "n", *metrics])
