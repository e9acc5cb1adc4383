"""The tables behind the figures and the report: pure functions of the two tables of a study.

Fractions stay fractions here; figures and text turn them into percent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.folder.contents import read_json
from analysis.pairs import CONFIGURATION
from tune_study import schema

LEDGER = {
    "weights_bytes": "base weights",
    "adapter_bytes": "adapters and head",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activation_bytes": "activations",
}
"""Parts of a training step's memory, in the order they are stacked."""


def modes_of(trials: pd.DataFrame) -> list[str]:
    """The study's quantization modes in the schema's order, unknown ones last."""
    present = [str(mode) for mode in trials["quantization"].dropna().unique()]
    known = [mode for mode in schema.MODES if mode in present]
    return known + sorted(set(present) - set(known))


def finished(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that ended well."""
    return trials[trials["status"].isin(schema.GOOD_STATUSES)]


def cells(trials: pd.DataFrame, metric: str = "test_accuracy") -> pd.DataFrame:
    """One row per (configuration, mode): n, mean, sd, min and max of ``metric`` over its seeds."""
    keys = [*_studies(trials), *CONFIGURATION, "quantization"]
    good = finished(trials)
    good = good.assign(_value=good[metric].astype("float64")).dropna(subset=["_value"])
    grouped = good.groupby(keys, observed=True, sort=False)["_value"]
    table = grouped.agg(n="size", mean="mean", sd="std", min="min", max="max").reset_index()
    return table


def _studies(trials: pd.DataFrame) -> list[str]:
    return [name for name in ("study", "machine") if name in trials]


def pareto_front(
    trials: pd.DataFrame, *, cost: str = "weights_bytes", metric: str = "test_accuracy"
) -> pd.DataFrame:
    """Cells (configuration x mode) with their mean ``metric`` and mean ``cost``.

    ``on_front`` marks, within each data set (and machine: bytes and times of different hardware
    are never ranked together), the cells that no other cell beats: none is at most as costly and
    at least as accurate, and better in one of the two. Cells without a cost are left out.
    """
    good = finished(trials)
    good = good.assign(
        _cost=good[cost].astype("float64"), _score=good[metric].astype("float64")
    ).dropna(subset=["_cost", "_score"])
    scope = [*_studies(good), "dataset"]
    keys = list(dict.fromkeys([*_studies(good), *CONFIGURATION, "quantization"]))
    grouped = good.groupby(keys, observed=True, sort=False, dropna=False)
    table = grouped.agg(score=("_score", "mean"), cost=("_cost", "mean"), n=("_score", "size"))
    table = table.reset_index()
    table["on_front"] = False
    for _, group in table.groupby(scope, observed=True, dropna=False):
        costs = np.column_stack([group["cost"], -group["score"]])
        table.loc[group.index, "on_front"] = pareto(costs)
    return table


def pareto(costs: np.ndarray) -> np.ndarray:
    """Which rows of (n, 1 or 2) costs no other row beats, as booleans; equal rows stand together.

    A row beats another when it is at most as large in each column and smaller in one.
    """
    on_front = np.zeros(len(costs), dtype=bool)
    pairs = np.column_stack([costs[:, 0], costs[:, -1]])
    best = (math.inf, math.inf)
    for row in np.lexsort((pairs[:, 1], pairs[:, 0])):
        point = tuple(pairs[row])
        if point[1] < best[1] or point == best:
            on_front[row], best = True, point
    return on_front


def curve_bands(
    epochs: pd.DataFrame, trials: pd.DataFrame, *, metric: str = "val_accuracy"
) -> pd.DataFrame:
    """Mean and standard deviation of ``metric`` over trials, per (model, data set, mode, epoch).

    ``n`` is the number of trials that reached the epoch. Epochs that fewer than half of the
    group's trials reached are left out: there the mean would be that of the survivors.
    """
    axes = trials.loc[:, ["trial_id", *_studies(trials), "model", "dataset", "quantization"]]
    on = ["trial_id", "study"] if "study" in epochs and "study" in axes else ["trial_id"]
    joined = epochs.loc[:, [*on, "epoch", metric]].merge(axes, on=on, how="inner")
    joined["value"] = joined[metric].astype("float64")
    joined = joined[np.isfinite(joined["value"])]
    keys = ["model", "dataset", "quantization"]
    table = joined.groupby([*keys, "epoch"], observed=True)["value"].agg(
        n="size", mean="mean", sd="std"
    )
    table = table.reset_index()
    most = table.groupby(keys, observed=True)["n"].transform("max")
    return table[table["n"] * 2 >= most].reset_index(drop=True)


def curve_gaps(
    epochs: pd.DataFrame,
    trials: pd.DataFrame,
    *,
    metric: str = "val_accuracy",
    baseline: str = "none",
) -> pd.DataFrame:
    """Like :func:`curve_bands`, but of each mode's difference to ``baseline`` at the same epoch.

    Paired on configuration and seed, so that what the pair shares (seed, data order) cancels.
    """
    on = [*(["study"] if "study" in trials and "study" in epochs else []), *CONFIGURATION, "seed"]
    keys = ["trial_id", *(["study"] if "study" in on else [])]
    axes = trials.loc[:, list(dict.fromkeys([*keys, *on, "quantization"]))]
    joined = epochs.loc[:, [*keys, "epoch", metric]].merge(axes, on=keys, how="inner")
    base = joined[joined["quantization"] == baseline].drop(columns=["trial_id", "quantization"])
    ours = joined[joined["quantization"] != baseline]
    pairs = ours.merge(base, on=[*on, "epoch"], suffixes=("", "_base"), how="inner")
    pairs["value"] = pairs[metric] - pairs[f"{metric}_base"]
    return curve_bands(
        pairs.loc[:, ["trial_id", *keys[1:], "epoch", "value"]], trials, metric="value"
    )


def memory_ledger(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean bytes of each part of a training step, per (machine, model, batch, mode).

    Columns: the parts of ``LEDGER``, ``peak_train_bytes``, ``peak_source``, ``n``. A part that no
    trial measured is NaN. Averaged over data sets and LoRA settings, never over hardware.
    """
    parts = [*LEDGER, "peak_train_bytes"]
    ran = trials[trials[list(LEDGER)].notna().any(axis=1)]
    keys = [*_studies(ran), "model", "batch_size", "quantization"]
    values = ran.assign(**{name: ran[name].astype("float64") for name in parts})
    grouped = values.groupby(keys, observed=True, sort=False, dropna=False)
    table = grouped[parts].mean()
    table["n"] = grouped.size()
    table["peak_source"] = grouped["peak_source"].agg(
        lambda sources: "; ".join(sorted(set(sources.dropna()))[:3])
    )
    table = table.reset_index()
    table["_order"] = table["quantization"].map({m: i for i, m in enumerate(modes_of(trials))})
    return table.sort_values(["model", "_order"], kind="stable").drop(columns="_order")


def seed_spread(trials: pd.DataFrame, metric: str = "test_accuracy") -> pd.DataFrame:
    """Each finished trial's deviation from the mean of its cell, for cells of two seeds or more.

    Columns: the configuration, ``quantization, seed, deviation`` (fraction) and ``n``, the seeds of
    its cell.
    """
    good = finished(trials)
    good = good.assign(_value=good[metric].astype("float64")).dropna(subset=["_value"])
    keys = [*_studies(good), *CONFIGURATION, "quantization"]
    grouped = good.groupby(keys, observed=True, dropna=False)["_value"]
    table = good.loc[:, [*keys, "seed"]].assign(
        deviation=good["_value"] - grouped.transform("mean"), n=grouped.transform("size")
    )
    return table[table["n"] >= 2].reset_index(drop=True)


def pooled_sd(spread: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over seeds per mode, pooled over cells, with its degrees of freedom."""
    rows = []
    for mode, group in spread.groupby("quantization", observed=True, sort=False):
        # Each trial carries 1/n of its cell's one lost degree of freedom.
        freedom = len(group) - float((1 / group["n"]).sum())
        squares = float((group["deviation"] ** 2).sum())
        rows.append({"quantization": mode, "sd": (squares / freedom) ** 0.5, "df": round(freedom)})
    return pd.DataFrame(rows, columns=["quantization", "sd", "df"])


def layer_gradients(
    study_path: Path | None, trials: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """Mean gradient norm per (mode, layer, epoch) over the trials of one model, and problems.

    Read from each trial's gradients.json. Models have different layers: the one with the most
    trials is taken. Columns ``model, quantization, layer`` (position), ``name, epoch, norm, n``.
    """
    stacks: dict[tuple[str, tuple[str, ...]], dict[str, list[np.ndarray]]] = {}
    problems: list[str] = []
    ran = trials[trials["epochs_completed"].fillna(0) > 0]
    for row in ran[["trial_id", "model", "quantization"]].to_dict("records"):
        trial_id = str(row["trial_id"])
        if study_path is None or Path(trial_id).name != trial_id:
            continue
        path = study_path / trial_id / "gradients.json"
        if not path.exists():
            continue
        try:
            names, norms = _gradients(read_json(path, study_path))
        except (OSError, ValueError) as error:
            problems.append(f"{trial_id}/gradients.json is not used: {str(error)[:120]}")
            continue
        by_mode = stacks.setdefault((str(row["model"]), names), {})
        by_mode.setdefault(str(row["quantization"]), []).append(norms)
    columns = ["model", "quantization", "layer", "name", "epoch", "norm", "n"]
    if not stacks:
        return pd.DataFrame(columns=columns), problems
    (model, names), by_mode = max(stacks.items(), key=lambda kv: sum(map(len, kv[1].values())))
    frames = [_mean_norms(mode, names, by_mode[mode]) for mode in by_mode]
    table = pd.concat(frames, ignore_index=True).assign(model=model)
    return table[columns], problems


def _gradients(document: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Layer names and norms [epoch, layer] of a gradients.json. Raises ``ValueError``."""
    if not isinstance(document, dict) or not {"layers", "epochs"} <= document.keys():
        raise ValueError("it has no layers and epochs")
    try:
        names = tuple(str(name) for name in document["layers"])
        rows = [[np.nan if v is None else v for v in epoch] for epoch in document["epochs"]]
        norms = np.array(rows, dtype="float64")
    except (TypeError, ValueError):
        raise ValueError("its layers or epochs are not lists of names and numbers") from None
    if norms.ndim != 2 or norms.shape[1] != len(names):
        raise ValueError("its epochs do not have one number per layer")
    return _layers(names, norms)


def _layers(names: Sequence[str], norms: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Tensors joined to the layer they belong to: the root of the sum of their squared norms.

    A layer has two LoRA matrices, and B's gradients dwarf A's in the first epochs: apart they
    make stripes, together the layer's gradient.
    """
    layers = [layer_of(name) for name in names]
    order = list(dict.fromkeys(layers))
    member = np.array([[layer == own for own in layers] for layer in order], dtype="float64")
    missing = ~np.isfinite(norms)
    squares = np.where(missing, 0.0, norms**2) @ member.T
    joined = np.sqrt(squares)
    joined[(missing.astype("float64") @ member.T) > 0] = np.nan
    return tuple(order), joined


def layer_of(name: str) -> str:
    """A parameter's layer, without what peft puts around each name."""
    return re.sub(
        r"^base_model\.model\.|\.modules_to_save|\.lora_[AB]|\.default|\.(weight|bias)$", "", name
    )


def _mean_norms(mode: str, names: Sequence[str], stack: list[np.ndarray]) -> pd.DataFrame:
    """Mean over trials of [epoch, layer]; trials that stopped early count while they ran."""
    longest = max(len(norms) for norms in stack)
    full = np.full((len(stack), longest, len(names)), np.nan)
    for i, norms in enumerate(stack):
        full[i, : len(norms)] = norms
    counted = np.isfinite(full).sum(axis=0)
    total = np.where(np.isfinite(full), full, 0.0).sum(axis=0)
    mean = np.divide(total, counted, out=np.full(total.shape, np.nan), where=counted > 0)
    epoch, layer = np.indices(mean.shape)
    return pd.DataFrame(
        {
            "quantization": mode,
            "layer": layer.ravel(),
            "name": np.array(names, dtype=object)[layer.ravel()],
            "epoch": epoch.ravel() + 1,
            "norm": mean.ravel(),
            "n": counted.ravel(),
        }
    )
