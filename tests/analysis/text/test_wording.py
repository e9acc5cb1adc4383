"""Numbers and names as a reader sees them."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.text.wording import span_of, without_shared_ends


@pytest.mark.parametrize(
    ("fractions", "options", "text"),
    [
        ([-0.831, -0.853], {"sign": True}, "−85 to −83 %"),
        ([0.021, -0.004], {"sign": True}, "−0.4 to +2.1 %"),
        ([0.5, 0.501, None], {}, "50 %"),
        ([0.004, 0.02], {"digits": 0}, "0 to 2 %"),
        ([None], {}, "–"),
        ([], {"sign": True}, "–"),
    ],
)
def test_a_range_in_percent(fractions, options, text) -> None:
    assert span_of(pd.Series(fractions, dtype="float64"), **options) == text


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["deit_tiny_patch16_224", "deit_small_patch16_224"], ["deit_tiny", "deit_small"]),
        (["a_b", "a_b_b"], ["a", "a_b"]),
        (["cifar10", "cifar100"], ["cifar10", "cifar100"]),
        (["x_y", "y"], ["x_y", "y"]),
    ],
)
def test_names_that_end_alike_are_cut_there(names: list[str], told: list[str]) -> None:
    assert without_shared_ends(names) == told
    assert len(pd.unique(pd.Series(told))) == len(told)
