"""Curves over epochs, and gradients per layer, as the figures draw them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.folder.contents import read_json
from analysis.statistics.cells import named, units
from analysis.statistics.pairs import PAIR, matched


def curve_bands(
    epochs: pd.DataFrame, trials: pd.DataFrame, *, metric: str = "val_accuracy"
) -> pd.DataFrame:
    """Mean and standard deviation of ``metric`` over trials, per (model, data set, mode, epoch).

    ``n`` is the number of trials that reached the epoch. Epochs that fewer than half of the
    group's trials reached are left out: there the mean would be that of the survivors.
    """
    return _bands(_joined(epochs, metric, trials, ["model", "dataset"]), metric)


def _joined(
    epochs: pd.DataFrame, metric: str, trials: pd.DataFrame, columns: list[str]
) -> pd.DataFrame:
    """``metric`` of every epoch as a float, beside ``columns`` of its trial and the mode."""
    values = epochs[["trial_id", "epoch", metric]].astype({metric: "float64"})
    return values.merge(trials[["trial_id", *columns, "quantization"]], on="trial_id")


def _bands(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    rows = rows[np.isfinite(rows[value])]
    keys = ["model", "dataset", "quantization"]
    grouped = rows.groupby([*keys, "epoch"], observed=True)[value]
    table = grouped.agg(n="size", mean="mean", sd="std").reset_index()
    most = table.groupby(keys, observed=True)["n"].transform("max")
    return table[table["n"] * 2 >= most].reset_index(drop=True)


def curve_gaps(epochs: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Of the validation accuracy, like :func:`curve_bands`: each mode's difference to ``none``.

    Paired on configuration, seed and epoch, so that what the pair shares (data order) cancels.
    """
    metric, trials = "val_accuracy", named(trials)
    joined = _joined(epochs, metric, trials, PAIR)
    pairs = matched(joined, units(trials), metric, "none", [*PAIR, "epoch"])
    return _bands(pairs, "difference")


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
        r"^base_model\.model\.|\.modules_to_save|\.lora_([AB]|magnitude_vector)|\.default"
        r"|\.(weight|bias)$",
        "",
        name,
    )


def _mean_norms(mode: str, names: Sequence[str], stack: list[np.ndarray]) -> pd.DataFrame:
    """Mean over trials of [epoch, layer]; trials that stopped early count while they ran."""
    longest = max(len(norms) for norms in stack)
    full = np.full((len(stack), longest, len(names)), np.nan)
    for i, norms in enumerate(stack):
        full[i, : len(norms)] = norms
    known = np.ma.masked_invalid(full)
    mean = known.mean(axis=0).filled(np.nan)
    epoch, layer = np.indices(mean.shape)
    return pd.DataFrame(
        {
            "quantization": mode,
            "layer": layer.ravel(),
            "name": np.array(names, dtype=object)[layer.ravel()],
            "epoch": epoch.ravel() + 1,
            "norm": mean.ravel(),
            "n": known.count(axis=0).ravel(),
        }
    )
