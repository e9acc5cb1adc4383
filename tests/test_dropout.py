"""The fast masks are dropout: Bernoulli, unbiased, from torch's generator, exact in backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats

from tune_study.config import TrialConfig
from tune_study.dropout import Dropout
from tune_study.model import build_model

ONES = torch.ones(250_001)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_element_is_kept_with_probability_1_minus_p_and_divided_by_it(p: float) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(ONES)
    kept = int((out != 0).sum())
    assert stats.binomtest(kept, len(ONES), 1 - p).pvalue > 0.001
    torch.testing.assert_close(out[out != 0], torch.full((kept,), 1 / (1 - p)), rtol=1e-4, atol=0)


def test_masks_are_independent_of_their_neighbours_and_of_the_next_call() -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.3)
    first, second = (dropout(ONES) != 0 for _ in range(2))
    # The four elements of one 64-bit draw, and the same element of two calls.
    pairs = [(first[:-lag], first[lag:]) for lag in (1, 2, 3, 4)] + [(first, second)]
    for a, b in pairs:
        table = [[int((a.eq(i) & b.eq(j)).sum()) for j in (0, 1)] for i in (0, 1)]
        assert stats.chi2_contingency(table).pvalue > 0.001


def test_the_gradient_is_the_forward_mask_and_the_seed_decides_it() -> None:
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    dropout = Dropout(0.4)

    def seeded(value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return dropout(value)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.equal(seeded(x), seeded(x))
    assert not torch.equal(seeded(x), dropout(x))


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.1, False), (1e-9, True)])
def test_nothing_is_dropped_where_nothing_should_be(p: float, training: bool) -> None:
    assert torch.equal(Dropout(p).train(training)(ONES), ONES)


def test_every_adapter_has_it(tiny: Callable[..., TrialConfig]) -> None:
    model = build_model(tiny("nf4", lora={"lora_dropout": 0.25}), 10).model
    adapters = [m for m in model.modules() if hasattr(m, "lora_dropout")]
    assert adapters
    assert all(str(m.lora_dropout["default"]) == "Dropout(p=0.25)" for m in adapters)
    assert all(isinstance(m.lora_dropout["default"], Dropout) for m in adapters)
