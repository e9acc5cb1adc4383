"""The chapters on memory and speed."""

from __future__ import annotations

import pandas as pd

from analysis.findings.findings import Findings
from analysis.measures.memory import LEDGER, why_no_peak
from analysis.statistics.cells import NOT_RECORDED, counts_on_device, finished, machines_of
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
    paragraphs += _beside(found.study.trials)
    tables = [_ratios("speed", "Training speed", "times the speed", found.speed)]
    if why := _why_no_energy(found):
        paragraphs.append(f"The energy of training can't be compared: {why}.")
    else:
        measured = finished(found.study.trials, "train_energy_j")
        sources = listing(sorted(measured["energy_source"].dropna().unique()))
        paragraphs.append(
            "Energy is what the device's own counter says of the same seconds, whatever the device "
            f"took it for ({sources}). Below 1 is less."
        )
        tables.append(_ratios("energy", "Energy of training", "times the energy", found.energy))
    figures = ("pareto_energy",) if len(found.energy_front) else ()
    return Section("speed", "Speed", paragraphs, tables, figures)


def _beside(trials: pd.DataFrame) -> list[str]:
    """What is to be said of trials that could share a device; nothing where each had it alone."""
    counts = counts_on_device(trials, "images_per_s")
    if len(counts) > 1:
        return [
            f"Not all trials shared their device with as many: trials on it at a time, at most: "
            f"{listing(counts)}. Speed, time and energy are compared within each number, never "
            "across."
        ]
    if counts in ([], ["1"], [NOT_RECORDED]):
        return []
    return [
        f"Up to {counts[0]} trials ran on a device at a time, and held each other up: the ratios "
        "are those of trials with as many beside them; at the end of a study there were fewer."
    ]


def _why_no_energy(found: Findings) -> str:
    """Why no mode's energy can be set against the baseline's; "" where it can."""
    if found.energy["ratio"].notna().any():
        return ""
    good = finished(found.study.trials)
    if good["train_energy_j"].notna().any():
        return "no unquantized trial has it beside a quantized one"
    reasons = sorted({str(source) for source in good["energy_source"].dropna()})
    return "; ".join(reasons[:3]) or "no trial recorded it"


def _ratios(key: str, what: str, times: str, table: pd.DataFrame) -> Table:
    """``table`` is ``ratios.metric_ratios``."""
    return table_of(
        key,
        f"{what} against the unquantized model",
        table,
        {
            "mode": text("quantization"),
            times: lambda r: number(r["ratio"]),
            "interval": lambda r: span(r["ci_low"], r["ci_high"], 2),
            "configurations": count("n_configurations"),
            "pairs": count("n_pairs"),
        },
        note=notes(table),
    )
