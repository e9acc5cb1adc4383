"""The base of our Tune callbacks."""

from __future__ import annotations

from typing import Any

from ray import tune


class Callback(tune.Callback):
    """Tune pickles its callbacks for a restore of its own, which we never use: without content."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
