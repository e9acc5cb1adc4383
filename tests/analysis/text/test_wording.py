"""Numbers as a reader sees them."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.text.wording import span_of


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
