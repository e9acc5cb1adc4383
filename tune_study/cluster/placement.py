"""How many trials share a GPU, by what they will take of it, and where they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tune_study.errors import UserError
from tune_study.machine.gpus import SHARE_OF_DEVICE, Card, Need

NAMED = 4
"""So many nodes are named one by one; of more only the kinds are told."""

MOST = 100
"""Trials on a GPU; of more, a share would no longer be told from the next one."""


class Room(NamedTuple):
    """A node, as far as trials are concerned."""

    name: str
    card: Card | None
    """``None`` where trials take no GPU."""
    trials: int
    """At a time."""


def share_of_all(need: Need, cards: Mapping[str, Card]) -> float:
    """The share of a GPU that every trial takes, on whatever node (by name) it runs.

    One for all: trials that have more of a GPU to themselves than others would not be comparable in
    time. The largest trial decides, and the smallest card. Raises ``UserError`` for a card that is
    too small for one.
    """
    if need.step_bytes is None:
        return 1.0
    fewest = MOST
    for name, card in cards.items():
        count = within(need, card.memory_bytes)
        if count == 0:
            raise UserError(
                f"--gpus-per-trial auto: a trial can take {need.step_bytes / 1e9:,.1f} GB of a "
                f"GPU, and {card.name} of {name} has {card.memory_bytes / 1e9:,.1f} GB; lower "
                "training.per_device_train_batch_size (training.gradient_accumulation_steps keeps "
                "the batch of a step), or leave that node out"
            )
        fewest = min(fewest, count)
    return share_of(fewest)


def share_of(count: int) -> float:
    """The share of a GPU that ``count`` trials on one take each."""
    # Ray counts in ten-thousandths; rounded up, the last trial would find no room.
    return 10_000 // count / 10_000


def within(need: Need, memory_bytes: int) -> int:
    """How many trials of ``need``, whose step is known, so much memory of a GPU holds."""
    assert need.step_bytes is not None
    images = need.image_bytes
    if images > memory_bytes * SHARE_OF_DEVICE:  # they stay in their file
        images = 0
    return memory_bytes // (need.step_bytes + images)


def fit(there: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many trials with ``resources`` run on a node that has those ``there``.

    A share of a GPU lies on one: two GPUs of which trials take 0.4 each hold four of them.
    """
    return int(min(_times(there.get(k, 0), v) for k, v in resources.items() if v))


def _times(there: float, each: float) -> float:
    return int(there) * int(1 / each + 1e-9) if each < 1 else there / each


def told(rooms: Sequence[Room], at_a_time: int) -> str:
    """``6 trials at a time: 4 on node 1a2b3c4d (10.0.0.1, NVIDIA L4), 2 on ...``."""
    fits = sum(room.trials for room in rooms)
    some = "trial" if at_a_time == 1 else "trials"
    begins = f"{at_a_time:,} {some} at a time"
    if at_a_time < fits:
        begins += f", of {fits:,} that have room"
    if len(rooms) <= NAMED:
        places = [f"{room.trials} on {room.name}{_of(room.card)}" for room in rooms]
    else:
        kinds = Counter((room.trials, _of(room.card)) for room in rooms)
        places = [
            f"{trials} on {'one node' if n == 1 else f'each of {n:,} nodes'}{card}"
            for (trials, card), n in kinds.items()
        ]
    return f"{begins}: {', '.join(places)}"


def _of(card: Card | None) -> str:
    return f" with {card.name}" if card else ""
