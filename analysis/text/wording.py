"""Numbers and names as a reader sees them: signs, units, intervals. A missing number is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tune_study.folder import names, schema

MISSING = "–"
NAMES = {
    "val_accuracy": "validation accuracy",
    "weights_bytes": "base weights",
    "peak_train_bytes": "peak of a training step",
    "train_time_s": "training time",
}
"""What a search can be asked for."""
_AXES = {
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora.init_lora_weights": "initialisation",
}
UNITS = {column.name: column.unit for column in schema.TRIALS}
"""By column of the trials table."""


def known(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def signed(value: float, digits: int = 2) -> str:
    """``+0.12`` or ``−0.12`` with a true minus sign; a rounded zero has no sign."""
    if not known(value):
        return MISSING
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return ("−" if value < 0 else "+") + text


def number(value: Any, digits: int = 2) -> str:
    """A plain number with thousands separators."""
    return f"{value:,.{digits}f}".replace("-", "−") if known(value) else MISSING


def significant(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits, without an exponent where one can do without."""
    if not known(value):
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        return f"{value:.{digits}g}".replace("-", "−")
    return f"{value:,.0f}" if 1 <= abs(value) < 1e9 else f"{value:.{digits - 1}e}"


def percent(value: Any, digits: int = 1) -> str:
    """A fraction as percent."""
    return f"{number(value * 100, digits)} %" if known(value) else MISSING


def points(difference: Any, digits: int = 2) -> str:
    """A difference of two fractions in percentage points, signed."""
    return f"{signed(difference * 100, digits)} pp" if known(difference) else MISSING


def between(low: Any, high: Any, *, scale: float = 1.0, digits: int = 2) -> str:
    """``−0.30 to +0.06``, or a dash without an interval."""
    if not (known(low) and known(high)):
        return MISSING
    return f"{signed(low * scale, digits)} to {signed(high * scale, digits)}"


def span(low: Any, high: Any, digits: int = 3) -> str:
    """``0.976 to 1.022``; one number when both are the same."""
    if not (known(low) and known(high)):
        return MISSING
    first, last = number(low, digits), number(high, digits)
    return first if first == last else f"{first} to {last}"


def span_of(fractions: pd.Series, digits: int | None = None, *, sign: bool = False) -> str:
    """Smallest to largest in percent: ``−85 to −83 %``; one number when both read the same.

    ``digits=None`` is none from 10 % on and one below. A dash without a known value.
    """
    values = fractions.astype("float64").dropna() * 100
    if values.empty:
        return MISSING
    if digits is None:
        digits = 0 if values.abs().max() >= 10 else 1
    low, high = (
        signed(value, digits) if sign else number(value, digits)
        for value in (values.min(), values.max())
    )
    return f"{low} %" if low == high else f"{low} to {high} %"


def p_value(value: Any) -> str:
    """``0.031``, ``< 0.001``, or a dash."""
    if not known(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def megabytes(value: Any) -> str:
    """Decimal megabytes with a useful number of digits."""
    return _in(value, 1e6, "MB")


def kilojoules(value: Any) -> str:
    """Joules as kilojoules, likewise."""
    return _in(value, 1e3, "kJ")


def _in(value: Any, one: float, unit: str) -> str:
    if not known(value):
        return MISSING
    size = float(value) / one
    return f"{size:,.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"


def seconds(value: Any) -> str:
    return f"{number(value, 0)} s" if known(value) else MISSING


def plural(count: Any, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{int(count):,} {noun}{'' if int(count) == 1 else 's'}"


def listing(names: list[str], most: int = 4) -> str:
    """``a, b and c``; long lists are cut and counted."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def either(names: list[str]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def short(name: str, most: int = 28) -> str:
    """A name of any length, cut in the middle so that it fits a label."""
    name = "".join(c if c.isprintable() else "?" for c in str(name))
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"


def without_shared_ends(names: list[str]) -> list[str]:
    """``deit_tiny``, ``deit_small`` of names that end alike, from a ``_`` on."""
    parts = [name.split("_") for name in names]
    shortest = min(map(len, parts))
    alike = 0
    while alike < shortest - 1 and len({part[-1 - alike] for part in parts}) == 1:
        alike += 1
    return ["_".join(part[: len(part) - alike]) for part in parts]


def name_of(objective: str) -> str:
    return NAMES.get(objective, objective)


def value_of(objective: str, value: Any) -> str:
    """The value of an objective with its unit."""
    unit = UNITS.get(objective, "")
    if unit == "fraction":
        return percent(value, 2)
    if unit == "bytes":
        return megabytes(value)
    return f"{number(value, 1)} {unit}".strip() if known(value) else MISSING


def parameter_of(name: str) -> str:
    """``training.learning_rate`` -> ``learning rate``; a computed one keeps what it is over."""
    field, _, computed = name.partition("/")
    words = field.rpartition(".")[2].removeprefix("per_device_train_").replace("_", " ")
    if field == "quantization.mode":
        words = "quantization"
    return short(words if computed in ("", "name") else f"{words} / {computed}")


def axis_in_words(columns: Sequence[str]) -> str:
    """The columns of an axis as a sentence names it: ``learning rate``, ``LoRA rank and alpha``."""
    if list(columns) == ["lora_r", "lora_alpha"]:
        return "LoRA rank and alpha"
    return listing([_AXES.get(name) or names.field_in_words(name) for name in columns])


def level_in_words(value: Any) -> str:
    """A value of an axis: ``0.0001``, ``224``, ``on``; ``default`` where it was left open."""
    if value is None or pd.isna(value):
        return "default"
    if isinstance(value, bool | np.bool_):
        return "on" if value else "off"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}".replace("e-0", "e-")
    return str(value)


def suggested(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else short(str(value), 40)
    return f"{value:.3g}".replace("e-0", "e-")


def suggestions(parameters: Mapping[str, Any]) -> str:
    """What was suggested for a trial, in one line."""
    return ", ".join(f"{parameter_of(name)} {suggested(v)}" for name, v in parameters.items())
