"""How much memory quantization saves: exact bytes of the weights, parts of a step, peaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.folder.configurations import SHORT
from analysis.folder.contents import read_json
from analysis.statistics.cells import modes_of, named, units, varying
from analysis.statistics.pairs import PAIR, matched
from tune_study.folder import names

BITS = {"int8": 8.0, "nf4": 4.5, "nf4-dq": 4.127, "fp4": 4.5, "fp4-dq": 4.127}
"""Bits per quantized weight: 4 plus 32/64 for one fp32 constant per block of 64, or plus
8/64 + 32/(64 x 256) after double quantization (QLoRA, section 3). int8 adds one fp32 constant per
output row, 32/in_features bits, counted where the layers' shapes are known."""
LEDGER = {
    "weights_bytes": "base weights",
    "adapter_bytes": "adapters and head",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activation_bytes": "activations",
}
"""Parts of a training step's memory, in the order they are stacked."""
_MOVES_NO_MEMORY = (
    "pretrained",
    "data.train_size",
    "data.val_size",
    "data.test_size",
    "data.augment",
    "data.image_column",
    "training.num_train_epochs",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.per_device_eval_batch_size",
    "training.learning_rate",
    "training.weight_decay",
    "training.warmup_steps",
    "training.max_grad_norm",
    "training.early_stopping_patience",
    "training.step",
)
"""Settings over which a step's memory may be averaged; the batch has a column of its own."""


def quantized_parameters(study_path: Path | None, trials: pd.DataFrame) -> pd.DataFrame:
    """Weights inside quantized layers, per (model, treatment), from quantization_analysis.json.

    Columns ``model, quantization, quantized_parameters, quantized_bits`` (in theory, each layer by
    its own mode, constants included). Empty when no file holds the layers' shapes; one trial per
    model and treatment is read.
    """
    rows = []
    if study_path is not None:
        for (model, name), group in trials.groupby(["model", "quantization"], observed=True):
            layers = _first_layers(study_path, group["trial_id"].tolist(), str(name))
            if layers:
                count: Counter[str] = Counter()
                for rows_out, columns_in, mode in layers:
                    count[mode] += rows_out * columns_in
                constants = 32.0 * sum(out for out, _, mode in layers if mode == "int8")
                bits = sum(weights * BITS[mode] for mode, weights in count.items()) + constants
                rows.append((model, name, sum(count.values()), bits))
    columns = ["model", "quantization", "quantized_parameters", "quantized_bits"]
    return pd.DataFrame(rows, columns=columns)


def _first_layers(study_path: Path, trial_ids: list[Any], name: str) -> list[tuple[int, int, str]]:
    """(out, in, mode) of each quantized layer of the first trial whose file has them."""
    for trial_id in map(str, trial_ids):
        path = study_path / trial_id / "quantization_analysis.json"
        if Path(trial_id).name != trial_id or not path.is_file():
            continue
        try:
            document = read_json(path, study_path)
            layers = [
                _layer(layer, document.get("mode", name)) for layer in document.get("layers", [])
            ]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            continue  # another trial of the same model and treatment has the same layers
        if layers:
            return layers
    return []


def _layer(layer: Mapping[str, Any], mode: Any) -> tuple[int, int, str]:
    """Raises ``ValueError`` or ``KeyError`` for a layer without two sides or a known mode."""
    out, columns = layer["shape"]
    own = str(layer.get("mode", mode))
    if own not in BITS:
        raise ValueError(own)
    return int(out), int(columns), own


def memory_ratios(trials: pd.DataFrame, layers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Exact base-weight bytes per model and mode, against fp32, 16 bit and theory.

    ``layers`` is the table of :func:`quantized_parameters`. One row per (model, mode); where data
    sets differ in bytes (another head) a row per data set. Columns: ``weights_bytes, of_fp32,
    of_16bit`` (ratios), ``bits_per_parameter`` (8 x bytes over the base's parameters),
    ``theoretical_bits`` (of the whole base, unquantized layers at fp32, or of the quantized weights
    alone where the layers are unknown), ``measured_over_theoretical`` and ``note``.
    """
    sizes = ["weights_bytes", "weights_bytes_fp32", "weights_bytes_16bit"]
    keys = ["model", "dataset", "quantization"]
    whole = trials.dropna(subset=sizes).astype(dict.fromkeys(sizes, "float64"))
    grouped = whole.groupby(keys, observed=True, sort=False)[sizes]
    least = grouped.min()
    table = least.assign(differ=(grouped.max() > least).any(axis=1)).reset_index()
    alike = table.groupby(["model", "quantization", *sizes], sort=False)
    table["dataset"] = table["dataset"].where(alike["dataset"].transform("size") == 1, "all")
    distinct = table.drop_duplicates([*keys, *sizes])
    rows = [entry | _bits(entry, layers) for entry in distinct.to_dict("records")]
    columns = [*keys, *sizes, "of_fp32", "of_16bit"]
    columns += ["bits_per_parameter", "theoretical_bits", "measured_over_theoretical", "note"]
    out = pd.DataFrame(rows, columns=columns)
    return out.sort_values(["model", "dataset"], kind="stable").reset_index(drop=True)


def _bits(entry: dict[Any, Any], layers: pd.DataFrame | None) -> dict[str, Any]:
    """Measured and theoretical bits per base parameter, and their ratio."""
    mode, parameters = str(entry["quantization"]), entry["weights_bytes_fp32"] / 4
    notes = []
    if entry["differ"]:
        notes.append("trials of this model and mode differ in bytes; the smallest is shown")
    measured = 8 * entry["weights_bytes"] / parameters
    theory = 32.0 if mode == "none" else BITS.get(mode, np.nan)
    known = None
    if layers is not None and len(layers):
        match = (layers["model"] == entry["model"]) & (layers["quantization"] == mode)
        known = layers[match].iloc[0] if match.any() else None
    if mode != "none" and known is not None:
        inside, bits = float(known["quantized_parameters"]), float(known["quantized_bits"])
        theory = (bits + 32 * (parameters - inside)) / parameters
    elif mode not in ("none", *BITS):
        notes.append("theory needs the quantized layers, and which they are is not recorded")
    elif mode != "none":
        notes.append(
            "theory counts every weight as quantized: which ones are is not recorded, "
            "and the full-precision rest counts against it"
        )
    if mode == "none" and measured < 31.5:
        theory = 16.0
        notes.append("none holds the weights of the block layers at 16 bit, in which it computes")
    elif measured < 0.99 * theory:
        notes.append("layers left unquantized are held at 16 bit, which theory counts at fp32")
    return {
        "of_fp32": entry["weights_bytes"] / entry["weights_bytes_fp32"],
        "of_16bit": entry["weights_bytes"] / entry["weights_bytes_16bit"],
        "bits_per_parameter": measured,
        "theoretical_bits": theory,
        "measured_over_theoretical": measured / theory,
        "note": "; ".join(notes),
    }


def why_no_peak(ledger: pd.DataFrame) -> str:
    """Why no mode's peak can be set against the baseline's."""
    if ledger.empty:
        return "no trial recorded its memory"
    if ledger["peak_train_bytes"].notna().any():
        return "no unquantized trial measured its peak beside a quantized one"
    reasons = sorted({str(source) for source in ledger["peak_source"] if source})
    return "; ".join(reasons) or "no trial recorded a peak"


def peak_ratios(ledger: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Peak of each mode over that of ``none``, per machine, model and batch size.

    Over the matched pairs of ``trials``: the sum of the mode's peaks over that of the baseline's.
    Columns: the scope of ``ledger``, ``quantization, ratio, activation_share, peak_source, n``.
    """
    scope = _scope(ledger)
    columns = [*scope, "quantization", "ratio", "activation_share", "peak_source", "n"]
    measured = with_setting(named(trials))
    measured = measured[measured["peak_train_bytes"].notna()]
    if ledger.empty or measured.empty:
        return pd.DataFrame(columns=columns)
    keys = [*PAIR, *(name for name in scope if name != "model")]
    pairs = matched(measured, units(trials), "peak_train_bytes", "none", keys)
    sums = pairs.groupby([*scope, "quantization"], dropna=False)[["value", "base"]].sum()
    ratios = (sums["value"] / sums["base"]).rename("ratio").reset_index()
    table = ledger.merge(ratios, on=[*scope, "quantization"], how="inner")
    table["activation_share"] = table["activation_bytes"] / table["peak_train_bytes"]
    return table[columns]


def _scope(table: pd.DataFrame) -> list[str]:
    """What memory is never averaged over."""
    return [name for name in ("machine", "model", "batch_size", "setting") if name in table]


def with_setting(trials: pd.DataFrame) -> pd.DataFrame:
    """``trials`` with what else varies and moves memory, such as ``image size 48``, in ``setting``.

    Without the column where nothing else varies.
    """
    fields = [name for name in varying(trials) if name not in (*SHORT, *_MOVES_NO_MEMORY)]
    if not fields:
        return trials
    distinct = trials[fields].drop_duplicates()
    words = {
        key: ", ".join(
            names.words_of(field, None if pd.isna(value) else value)
            for field, value in zip(fields, key, strict=True)
        )
        for key in distinct.astype(object).itertuples(index=False, name=None)
    }
    rows = trials[fields].astype(object).itertuples(index=False, name=None)
    return trials.assign(setting=pd.array([words[row] for row in rows], dtype="string"))


def memory_ledger(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean bytes of each part of a training step, per (machine, model, batch, mode).

    Columns: the parts of ``LEDGER``, ``peak_train_bytes``, ``peak_source``, ``n``, and ``setting``
    where anything else varies that moves memory. A part that no trial measured is NaN. Averaged
    over data sets and LoRA settings, never over hardware.
    """
    parts = [*LEDGER, "peak_train_bytes"]
    trials = with_setting(trials)
    ran = trials[trials[list(LEDGER)].notna().any(axis=1)]
    keys = [*_scope(ran), "quantization"]
    values = ran.assign(**{name: ran[name].astype("float64") for name in parts})
    grouped = values.groupby(keys, observed=True, sort=False, dropna=False)
    table = grouped[parts].mean()
    table["n"] = grouped.size()
    table["peak_source"] = grouped["peak_source"].agg(
        lambda sources: "; ".join(sorted(set(sources.dropna()))[:3])
    )
    table = table.reset_index()
    places = {mode: place for place, mode in enumerate(modes_of(trials["quantization"]))}
    table["_order"] = table["quantization"].map(places)
    order = [name for name in ("model", "setting", "_order") if name in table]
    return table.sort_values(order, kind="stable").drop(columns="_order")
