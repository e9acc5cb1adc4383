"""The images of every node, before the first trial: all nodes fill their caches at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_study.cluster.connection import name_of, nodes_for
from tune_study.cluster.inputs import Distant, Inputs, into_cache
from tune_study.cluster.stop import Stop
from tune_study.data import cache
from tune_study.data.place import Place
from tune_study.errors import UserError, first_line

LOOK_EVERY_S = 10.0
"""A fill that takes no longer is not worth a line."""


class _Filler:
    """Lives on a node until its cache is filled."""

    def __init__(self, distant: Sequence[Distant], place: Place) -> None:
        self._distant, self._place = distant, place

    def fill(self) -> str | None:
        """Why this node can't have the images; ``None`` where it has them."""
        try:
            cache.refuse_no_room_for(
                [(some.name, some.shape) for some in self._distant], self._place
            )
            for some in self._distant:
                into_cache(some, self._place)
        except UserError as error:
            return str(error)
        return None

    def written(self) -> int:
        """Bytes of images that are here by now."""
        return sum(cache.written(some.name, some.shape, self._place) for some in self._distant)


def fill(
    inputs: Inputs,
    place: Place,
    resources: Mapping[str, float],
    address: str,
    say: Callable[[str], None],
) -> None:
    """Returns when every node with room for a trial has the images of all folders.

    Or when the study is to stop. A node that dies meanwhile is told, and left to itself: it has no
    trials either. Raises ``UserError`` that names the node which has no room, or can't have them
    for another reason.
    """
    distant = [given for given in inputs.data.values() if isinstance(given, Distant)]
    if not distant:
        return
    nodes = nodes_for(resources)
    fillers = {name_of(node): _filler(node, distant, place) for node in nodes}
    waiting = {filler.fill.remote(): name for name, filler in fillers.items()}
    whole = len(nodes) * sum(math.prod(some.shape) for some in distant)
    while waiting and not Stop.requested():
        done, _ = ray.wait(list(waiting), timeout=LOOK_EVERY_S)
        for answer in done:
            name = waiting.pop(answer)
            try:
                why = ray.get(answer)
            except RayError as error:
                say(f"images: {name} did not take them ({first_line(error)[:200]})")
                continue
            if why:
                raise UserError(f"--address {address}: on {name}, {why}")
        if waiting and not done:
            there = _written([fillers[name] for name in waiting.values()])
            there += (len(nodes) - len(waiting)) * whole // len(nodes)
            say(
                f"images: {len(nodes) - len(waiting)} of {len(nodes)} nodes have them "
                f"({there / whole:.0%} of {whole / 1e9:,.1f} GB in all)"
            )


def _filler(node: Mapping[str, Any], distant: Sequence[Distant], place: Place) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor: Any = ray.remote(_Filler)
    # Two at a time: it can be asked how far it is.
    return actor.options(num_cpus=0, max_concurrency=2, scheduling_strategy=there).remote(
        distant, place
    )


def _written(fillers: Sequence[Any]) -> int:
    answers = [filler.written.remote() for filler in fillers]
    ready, _ = ray.wait(answers, num_returns=len(answers), timeout=LOOK_EVERY_S)
    total = 0
    for answer in ready:
        with contextlib.suppress(RayError):  # it died: what it was filling for will say so
            total += ray.get(answer)
    return total
