"""Trials tables with planted differences. No test module."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd


def made(rows: list[tuple[Any, ...]], **columns: Any) -> pd.DataFrame:
    """A trials table of (lora_r, quantization, seed, test_accuracy)."""
    table = pd.DataFrame(rows, columns=["lora_r", "quantization", "seed", "test_accuracy"])
    table = table.assign(model="m", dataset="cifar100", lora_alpha=16, status="completed")
    return table.assign(**columns)


def study(
    differences: dict[str, list[float]], seeds: int = 1, base: float = 0.5, **columns: Any
) -> pd.DataFrame:
    """Configurations whose modes differ from a varying baseline by the given amounts."""
    rows: list[tuple[Any, ...]] = []
    n = max(len(values) for values in differences.values())
    for r, seed in itertools.product(range(n), range(seeds)):
        own = base + 0.01 * r + 0.003 * seed
        rows.append((r, "none", seed, own))
        rows += [(r, mode, seed, own + d[r]) for mode, d in differences.items() if r < len(d)]
    return made(rows, **columns)


def one(table: pd.DataFrame, mode: str = "nf4") -> pd.Series:
    return table.set_index("quantization").loc[mode]
