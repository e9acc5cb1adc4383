"""The chapters on convergence and gradient flow."""

from __future__ import annotations

import pandas as pd

from analysis.findings.findings import GRADIENT_METRICS, Findings
from analysis.text.layout import Cell, Section, Table, count, notes, table_of, text
from analysis.text.wording import between, p_value, percent, signed, significant, span


def convergence(found: Findings) -> Section:
    paragraphs = [
        "Does quantization change how training proceeds? Differences are mode minus unquantized, "
        "over configurations; accuracies and shares are fractions."
    ]
    tables: list[Table] = []
    if not found.convergence["epochs_seen"].any():
        paragraphs.append("No trial has finished an epoch.")
    else:
        tables.append(_comparison("convergence", "Against the unquantized model", found))
        tables.append(_early_stopping(found.early_stopping))
    figures = ("learning_curves", "learning_gap")
    return Section("convergence", "Convergence", paragraphs, tables, figures)


def _early_stopping(table: pd.DataFrame) -> Table:
    return table_of(
        "early_stopping",
        "Early stopping",
        table,
        {
            "mode": text("quantization"),
            "ended well": count("n_trials"),
            "stopped early": count("n_stopped"),
            "share": lambda r: percent(r["share_stopped"], 0),
            "epochs (median)": count("epochs_median"),
            "range": lambda r: span(r["epochs_min"], r["epochs_max"], 0),
        },
        note=notes(table),
    )


def _comparison(key: str, caption: str, found: Findings) -> Table:
    table = found.convergence_comparison if key == "convergence" else found.gradient_comparison
    return table_of(
        key,
        caption,
        table,
        {
            "quantity": lambda r: WORDS.get(str(r["metric"]), str(r["metric"])),
            "mode": text("quantization"),
            "difference": lambda r: signed(r["mean_difference"], 3),
            "interval": lambda r: between(r["ci_low"], r["ci_high"], digits=3),
            "p Holm": lambda r: p_value(r["p_holm"]),
            "configurations": count("n_configurations"),
        },
        note="Many quantities are looked at here: one small p among them is no finding.",
    )


WORDS = {
    "epochs_to_95": "epochs to 95 % of the best accuracy",
    "plateau_epoch": "epoch of the plateau",
    "stopped_early": "share stopped early",
    "train_loss_roughness": "roughness of the training loss",
    "train_loss_rises": "share of epochs in which the loss rose",
    "overfit_gap": "training minus validation accuracy",
    "loss_gap": "validation minus training loss",
    "grad_norm_mean": "mean gradient norm",
    "grad_norm_cv": "variation (cv) of the gradient norm",
    "stability_score": "stability score",
}


def gradients(found: Findings) -> Section:
    paragraphs = [
        "Gradients of the trainable parameters, before clipping. Fidelity compares, on a fixed "
        "batch, the LoRA gradients of the quantized model with those of its full-precision twin: "
        "a cosine of 1 and a norm ratio of 1 mean that quantization leaves them alone."
    ]
    if not found.gradients["grad_norm_mean"].notna().any():
        paragraphs.append("No trial that ended well recorded its gradient norms.")
    if not found.gradients["gradient_cosine"].notna().any():
        paragraphs.append("Gradient fidelity was not measured in this study.")
    labels = {
        "grad_norm_mean": "norm",
        "grad_norm_cv": "variation (cv)",
        "stability_score": "stability",
        "grad_explosions": "explosions",
        "grad_vanishing_layers": "vanishing",
        "loss_spikes": "loss spikes",
        "gradient_cosine": "fidelity: cosine",
        "gradient_norm_ratio": "fidelity: norm ratio",
    }
    cells: dict[str, Cell] = {"mode": text("quantization"), "trials": lambda r: str(r["n"])}
    for name in GRADIENT_METRICS:
        cells[labels[name]] = _significant(name)
    tables = [table_of("gradients", "Means per mode", found.gradients, cells)]
    if len(found.gradient_comparison):
        tables.append(_comparison("gradient_shift", "Against the unquantized model", found))
    return Section(
        "gradients", "Gradient flow", paragraphs, tables, ("gradient_norm", "gradient_layers")
    )


def _significant(name: str) -> Cell:
    return lambda row: significant(row[name])
