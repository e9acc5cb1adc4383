"""The chapters on memory and speed."""

from __future__ import annotations

import pandas as pd

from analysis.findings.findings import Findings
from analysis.measures.memory import LEDGER, why_no_peak
from analysis.statistics.cells import machines_of
from analysis.text.layout import Cell, Section, Table, count, notes, size, table_of, text
from analysis.text.wording import listing, megabytes, number, percent, signed, span


def memory(found: Findings) -> Section:
    paragraphs = [
        "Three quantities that must not be mixed up: the bytes of the frozen base weights (exact, "
        "computed from the tensors), the parts of one training step (the ledger), and the measured "
        "peak of a training step. Every percentage names its baseline: int8 weights are about "
        "three quarters smaller than fp32 ones, but only about half smaller than 16-bit ones.",
    ]
    tables = [_weights(found.memory), _ledger(found.ledger)]
    if len(found.peaks):
        tables.append(_peaks(found.peaks))
    else:
        why = why_no_peak(found.ledger)
        paragraphs.append(f"The peak of a training step can't be compared: {why}.")
    machines = sorted(machines_of(found.study.trials))
    if len(machines) > 1:
        paragraphs.append(
            f"The trials ran on {len(machines)} machines ({listing(machines)}); memory and time "
            "are compared within each, never pooled."
        )
    return Section("memory", "Memory", paragraphs, tables, ("memory_ledger", "pareto_peak"))


def _weights(table: pd.DataFrame) -> Table:
    return table_of(
        "weights",
        "Base weights, quantization state included (exact)",
        table,
        {
            "model": text("model"),
            "data set": text("dataset"),  # its classes decide the size of the head
            "mode": text("quantization"),
            "bytes": lambda r: megabytes(r["weights_bytes"]),
            "against fp32": lambda r: f"{signed((r['of_fp32'] - 1) * 100, 1)} %",
            "against 16 bit": lambda r: f"{signed((r['of_16bit'] - 1) * 100, 1)} %",
            "bits per weight": lambda r: number(r["bits_per_parameter"]),
            "in theory": lambda r: number(r["theoretical_bits"]),
            "ratio": lambda r: number(r["measured_over_theoretical"]),
        },
        note=notes(table),
    )


def _ledger(table: pd.DataFrame) -> Table:
    return table_of(
        "ledger",
        "One training step, mean over trials",
        table,
        {
            "model": text("model"),
            **_setting(table),
            "mode": text("quantization"),
            "batch": text("batch_size"),
            **{label: size(name) for name, label in LEDGER.items()},
            "measured peak": size("peak_train_bytes"),
            "measured by": text("peak_source"),
        },
    )


def _setting(table: pd.DataFrame) -> dict[str, Cell]:
    """What else varies and moves memory, where anything does."""
    return {"setting": text("setting")} if "setting" in table else {}


def _peaks(table: pd.DataFrame) -> Table:
    return table_of(
        "peaks",
        "Measured peak of a training step, against the unquantized model on the same machine",
        table,
        {
            "model": text("model"),
            **_setting(table),
            "batch": text("batch_size"),
            "mode": text("quantization"),
            "change of the peak": lambda r: f"{signed((r['ratio'] - 1) * 100, 1)} %",
            "activations' share": lambda r: percent(r["activation_share"], 0),
            "trials": count("n"),
            "measured by": text("peak_source"),
        },
    )


def speed(found: Findings) -> Section:
    paragraphs = [
        "Training throughput (images per second, without evaluation) over that of the unquantized "
        "trial of the same configuration and seed on the same machine. Below 1 is slower."
    ]
    if not found.speed["ratio"].notna().any():
        paragraphs.append("No finished pair of trials recorded its throughput.")
    table = table_of(
        "speed",
        "Training speed against the unquantized model",
        found.speed,
        {
            "mode": text("quantization"),
            "times the speed": lambda r: number(r["ratio"]),
            "interval": lambda r: span(r["ci_low"], r["ci_high"], 2),
            "configurations": count("n_configurations"),
            "pairs": count("n_pairs"),
        },
        note=notes(found.speed),
    )
    return Section("speed", "Speed", paragraphs, [table])
