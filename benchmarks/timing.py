"""Two or more ways to do the same work, timed in turns, so that a slow moment slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Comparison(NamedTuple):
    """One line of the table: the ratio of two sides, round by round."""

    what: str
    target: str
    """``">= 0.95"``: what issue or README promises of the ratio."""
    ratios: list[float]
    """One per round, of two neighbouring measurements."""
    sides: dict[str, float]
    """Median of each side, in ``unit``."""
    unit: str
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        sign, bound = self.target.split()
        return bool(self.median >= float(bound) if sign == ">=" else self.median <= float(bound))


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """{side: what it returned, per round}; each side runs once unmeasured, then in turns.

    The order is turned round in every second round, so that no side always follows the same one.
    """
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(sides[name]())
    return found


def rate(work: Callable[[], object], images: int) -> float:
    """Images per second of ``work``, which handles ``images`` of them."""
    begun = time.perf_counter()
    work()
    return images / (time.perf_counter() - begun)


def compare(
    what: str,
    target: str,
    measured: Mapping[str, list[float]],
    over: str,
    under: str,
    unit: str = "images/s",
    note: str = "",
) -> Comparison:
    """The ratio of side ``over`` to side ``under``."""
    pairs = zip(measured[over], measured[under], strict=True)
    medians = {name: statistics.median(measured[name]) for name in (over, under)}
    return Comparison(what, target, [a / b for a, b in pairs], medians, unit, note)
