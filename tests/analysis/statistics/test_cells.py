"""The spread over seeds against a slow version."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.folder.configurations import SHORT
from analysis.statistics.cells import pooled_sd, seed_spread


def test_seed_spread_pools_within_cells(frames: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    trials = frames[0]
    spread = seed_spread(trials)
    sds = pooled_sd(spread).set_index("quantization")
    good = trials[trials["test_accuracy"].notna() & (trials["quantization"] == "none")]
    groups = [g["test_accuracy"] for _, g in good.groupby(list(SHORT))]
    groups = [g for g in groups if len(g) > 1]
    squares = sum(((g - g.mean()) ** 2).sum() for g in groups)
    freedom = sum(len(g) - 1 for g in groups)
    assert sds.loc["none", "sd"] == pytest.approx((squares / freedom) ** 0.5)
    assert sds.loc["none", "df"] == freedom
