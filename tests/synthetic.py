"""Study folders made of invented numbers, for the tests of ``analysis``.

``study_frames`` makes the two tables in memory, ``write_study`` the whole folder: study.json, one
folder of JSON per trial, gradients.json and the tables. The numbers follow a small documented model
so that a test can plant an effect and look for it:

    test accuracy = base(model, dataset, r) + u[configuration, seed] + effect[mode]
                    + v[configuration, mode] + e[configuration, mode, seed]

with u ~ N(0, shared_sd), v ~ N(0, configuration_sd), e ~ N(0, seed_sd). Not a test module.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tune_study.folder import schema
from tune_study.folder.results import axes

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
DATASETS = ("cifar10", "cifar100")
LORA = ((4, 8), (8, 16), (16, 32))
MODES = ("none", "int8", "nf4", "nf4-dq")
SEEDS = (42, 123, 456)

# Whole-model bytes at fp32, int8, nf4, nf4-dq: DESIGN.md, "Memory". Others reuse the tiny model's.
_BYTES = {
    "deit_tiny_patch16_224": (22_105_384, 6_263_080, 3_860_776, 3_662_632),
    "deit_small_patch16_224": (86_678_056, 23_142_952, 13_690_408, 12_749_608),
}
_ERROR = {"int8": 0.007, "nf4": 0.092, "nf4-dq": 0.092, "fp4": 0.122, "fp4-dq": 0.122}


def plan(
    models: Sequence[str] = MODELS,
    datasets: Sequence[str] = DATASETS,
    lora: Sequence[tuple[int, int]] = LORA,
    modes: Sequence[str] = MODES,
    seeds: Sequence[int] = SEEDS,
) -> list[dict[str, Any]]:
    """The planned trials, nested as study.json holds them."""
    cells = []
    for model, dataset, (r, alpha), mode, seed in itertools.product(
        models, datasets, lora, modes, seeds
    ):
        cell: dict[str, Any] = {
            "model": model,
            "dataset": dataset,
            "lora": {
                "r": r,
                "lora_alpha": alpha,
                "lora_dropout": 0.1,
                "target_modules": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
            },
            "quantization": {"mode": mode},
            "training": {
                "num_train_epochs": 15,
                "learning_rate": 1e-4,
                "per_device_train_batch_size": 32,
            },
            "seed": seed,
        }
        digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{model}-{dataset}-r{r}-{mode.replace('-', '_')}-s{seed}-{digest}"
        keep = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        cells.append({"trial_id": keep[-120:].lstrip(".-"), **cell})
    return cells


def study_frames(
    cells: Sequence[Mapping[str, Any]] | None = None,
    *,
    effects: Mapping[str, float] | None = None,
    failures: Mapping[int, str] | None = None,
    seed_sd: float = 0.002,
    configuration_sd: float = 0.002,
    shared_sd: float = 0.003,
    epochs: int = 15,
    simulated: bool = False,
    missing: Iterable[str] = (),
    rng_seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trials and epochs tables of a study with planted ``effects`` (fractions, by mode).

    ``failures`` maps a position in the plan to a status that is not good; ``missing`` names
    columns of the trials table that no trial could measure.
    """
    cells = plan() if cells is None else cells
    rng = np.random.default_rng(rng_seed)
    effects, failures = dict(effects or {}), dict(failures or {})
    shared: dict[tuple[Any, ...], float] = {}
    interaction: dict[tuple[Any, ...], float] = {}
    trial_rows, epoch_rows = [], []
    for position, cell in enumerate(cells):
        r, mode, seed = cell["lora"]["r"], cell["quantization"]["mode"], cell["seed"]
        key = (cell["model"], cell["dataset"], r, cell["lora"]["lora_alpha"])
        if (*key, seed) not in shared:
            shared[(*key, seed)] = rng.normal(0, shared_sd)
        if (*key, mode) not in interaction:
            interaction[(*key, mode)] = 0.0 if mode == "none" else rng.normal(0, configuration_sd)
        base = 0.93 if cell["dataset"] == "cifar10" else 0.80
        base += (0.02 if "small" in cell["model"] else 0.0) + 0.002 * np.log2(r)
        accuracy = base + shared[(*key, seed)] + effects.get(mode, 0.0)
        accuracy += interaction[(*key, mode)] + rng.normal(0, seed_sd)
        status = failures.get(position, "completed")
        row = _trial_row(cell, status, float(np.clip(accuracy, 0.01, 0.999)), epochs, simulated)
        curve = _epoch_rows(row, epochs, rng)
        if curve:
            for name in ("grad_norm_mean", "grad_norm_std", "grad_norm_cv", "stability_score"):
                row[name] = float(np.mean([point[name] for point in curve]))
        row.update(dict.fromkeys(missing))
        trial_rows.append(row)
        epoch_rows += curve
    return _frame(trial_rows, schema.TRIALS), _frame(epoch_rows, schema.EPOCHS)


def _frame(rows: list[dict[str, Any]], table: tuple[schema.Column, ...]) -> pd.DataFrame:
    names = [column.name for column in table]
    return pd.DataFrame(rows, columns=names).astype(schema.dtypes(table))


def _trial_row(
    cell: Mapping[str, Any], status: str, accuracy: float, epochs: int, simulated: bool
) -> dict[str, Any]:
    """One row of the trials table; a trial that did not end well has no accuracy."""
    row = {**axes(cell), "status": status, "simulated": simulated}
    if status == "pending":
        return row
    good = status in schema.GOOD_STATUSES
    done = epochs if good else epochs // 2
    mode, r = row["quantization"], row["lora_r"]
    fp32, int8, nf4, dq = _BYTES.get(row["model"], _BYTES["deit_tiny_patch16_224"])
    weights = {"none": fp32, "int8": int8, "nf4": nf4, "nf4-dq": dq, "fp4": nf4, "fp4-dq": dq}[mode]
    adapters = 4 * r * 48 * (fp32 // 400_000)
    activations = fp32 * 20
    row |= {
        "epochs_completed": done,
        "best_epoch": max(done - 1, 1),
        "val_accuracy": accuracy + 0.001,
        "train_images": 45_000,
        "val_images": 5_000,
        "test_images": 10_000,
        "num_classes": 10 if row["dataset"] == "cifar10" else 100,
        "total_parameters": fp32 // 4 + adapters // 4,
        "trainable_parameters": adapters // 4,
        "quantized_layers": 0 if mode == "none" else 48,
        "weights_bytes": weights,
        "weights_bytes_fp32": fp32,
        "weights_bytes_16bit": fp32 // 2,
        "quantization_error": _ERROR.get(mode),
        "adapter_bytes": adapters,
        "gradient_bytes": adapters,
        "optimizer_bytes": 2 * adapters,
        "activation_bytes": activations,
        "peak_train_bytes": weights + 4 * adapters + int(1.05 * activations),
        "peak_source": "profiler",
        "rss_peak_bytes": 1_500_000_000 + weights,
        "batch_size": 32,
        "gradient_accumulation_steps": 1,
        "train_time_s": 100.0 if mode == "none" else 120.0,
        "train_energy_j": (fp32 + activations) / 1e5 * (1.0 if mode == "none" else 1.5),
        "energy_source": "a counter",
        "eval_time_s": 10.0,
        "images_per_s": 450.0 if mode == "none" else 375.0,
        "grad_explosions": 0,
        "grad_vanishing_layers": 0,
        "loss_spikes": 1,
        "gradient_cosine_successive": 0.4,
        "gradient_cosine": {"none": None, "int8": 0.999}.get(mode, 0.95),
        "gradient_norm_ratio": {"none": None, "int8": 1.0}.get(mode, 1.02),
        "device": "cpu",
    }
    if good:
        row |= {"test_accuracy": accuracy, "test_loss": float(-np.log(accuracy))}
    elif status != "interrupted":
        row["error"] = f"planted {status}"
    return row


def _epoch_rows(
    row: Mapping[str, Any], epochs: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A saturating learning curve that ends at the row's validation accuracy."""
    rows = []
    for epoch in range(1, int(row.get("epochs_completed") or 0) + 1):
        rise = 1 - np.exp(-epoch / 3)
        final = row["val_accuracy"] / (1 - np.exp(-epochs / 3))
        noise = rng.normal(0, 0.002)
        spread = abs(rng.normal(0.2, 0.02))
        mean = 2.0 * np.exp(-epoch / 8) + spread
        rows.append(
            {
                "trial_id": row["trial_id"],
                "epoch": epoch,
                "train_loss": 2.0 * np.exp(-epoch / 3) + 0.1,
                "train_accuracy": min(final * rise + 0.01, 1.0),
                "val_loss": 2.0 * np.exp(-epoch / 3) + 0.2 + noise,
                "val_accuracy": float(np.clip(final * rise + noise, 0, 1)),
                "learning_rate": 1e-4 * (1 - epoch / (epochs + 1)),
                "epoch_time_s": 7.0,
                "images_per_s": row["images_per_s"],
                "grad_norm_mean": mean,
                "grad_norm_std": spread,
                "grad_norm_cv": spread / mean,
                "grad_norm_min": mean - spread,
                "grad_norm_max": mean + 3 * spread,
                "grad_explosions": 0,
                "grad_vanishing_layers": 0,
                "loss_spikes": 0,
                "stability_score": 1 / (1 + spread / mean),
                "gradient_cosine_successive": 0.4,
            }
        )
    return rows


def write_study(
    path: Path,
    cells: Sequence[Mapping[str, Any]] | None = None,
    *,
    simulated: bool = False,
    tables: bool = True,
    gradients: bool = True,
    **model: Any,
) -> Path:
    """A whole study folder under ``path``; ``model`` goes to :func:`study_frames`."""
    cells = plan() if cells is None else cells
    trials, epochs = study_frames(cells, simulated=simulated, **model)
    path.mkdir(parents=True, exist_ok=True)
    versions = {"python": "3.12", "torch": "2.9", "bitsandbytes": "0.50.2"}
    hardware = {"cpu": "Test CPU", "cores": 2, "memory_bytes": 8_000_000_000, "gpu": None}
    manifest = {
        "format": 1,
        "study": path.name,
        "simulated": simulated,
        "created": "2026-01-02T03:04:05+00:00",
        "command": "python -m tune_study.run --grid full",
        "grid": "full",
        "plan": list(cells),
        "provenance": {
            "versions": versions,
            "commit": None,
            "hardware": hardware,
            "data": {cell["dataset"]: {"sha256": "0" * 64} for cell in cells},
            "weights": {},
        },
    }
    _dump(path / "study.json", manifest)
    meta = {"versions": versions, "commit": None, "hardware": hardware}
    by_trial = dict(iter(epochs.groupby("trial_id")))
    for cell, row in zip(cells, trials.to_dict("records"), strict=True):
        if row["status"] == "pending":
            continue
        own = _records(by_trial.get(row["trial_id"], epochs.iloc[:0]))
        _write_trial(path / cell["trial_id"], cell, row, own, meta, gradients)
    if tables:
        for name, table in (("trials", trials), ("epochs", epochs)):
            table.to_csv(path / f"{name}.csv", index=False)
            table.to_parquet(path / f"{name}.parquet", index=False)
    return path


_PARTS = {
    "test_metrics": ("test_accuracy", "test_loss", "test_images"),
    "model_metrics": (
        "num_classes", "total_parameters", "trainable_parameters", "quantized_layers",
        "weights_bytes", "weights_bytes_fp32", "weights_bytes_16bit", "quantization_error",
        "gradient_cosine", "gradient_norm_ratio",
    ),
    "resource_metrics": (
        "adapter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes",
        "peak_train_bytes", "peak_source", "rss_peak_bytes", "batch_size",
        "gradient_accumulation_steps", "train_time_s", "eval_time_s", "images_per_s", "device",
    ),
}  # fmt: skip


def _write_trial(
    folder: Path,
    cell: Mapping[str, Any],
    row: Mapping[Any, Any],
    epochs: list[dict[str, Any]],
    meta: Mapping[str, Any],
    gradients: bool,
) -> None:
    folder.mkdir(exist_ok=True)
    config = {name: value for name, value in cell.items() if name != "trial_id"}
    _dump(folder / "config.json", config)
    elsewhere = {"trial_id", "status", "simulated", "error", *axes(cell)}
    parts = {part: {name: _plain(row[name]) for name in names} for part, names in _PARTS.items()}
    placed = elsewhere.union(*(part.keys() for part in parts.values()))
    parts["training_results"] = {
        str(name): _plain(value) for name, value in row.items() if name not in placed
    }
    result = {
        "trial_id": row["trial_id"],
        "status": row["status"],
        "simulated": bool(row["simulated"]),
        "error": _plain(row["error"]),
        "run": {"config": config, "device": _plain(row["device"])},
        "train": {**parts, "epochs": epochs},
        "meta": meta,
    }
    _dump(folder / "results.json", result)
    mode = row["quantization"]
    layers = [f"blocks.{b}.{part}" for b in range(12) for part in ("attn.qkv", "mlp.fc1")]
    if mode != "none":
        entries = [
            {"name": n, "class": "Linear", "dtype": "uint8", "relative_error": _ERROR[mode]}
            for n in layers
        ]
        _dump(folder / "quantization_analysis.json", {"mode": mode, "layers": entries})
    if gradients and epochs:
        norms = [
            [float(e["grad_norm_mean"]) / (2 + i) for i, _ in enumerate(layers)] for e in epochs
        ]
        _dump(folder / "gradients.json", {"layers": layers, "epochs": norms})
    if row["status"] in ("error", "oom", "diverged"):
        error = {"type": "PlantedError", "message": row["error"], "traceback": ""}
        _dump(folder / "error.json", error)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    """A JSON value: null where a number is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
