"""Ray, on this machine alone or as a cluster that is there already: ``--address``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search_spaces.own_code import Code, run_where_trials_run
from tune_study.cluster import local, placement
from tune_study.cluster.placement import Room
from tune_study.errors import UserError, first_line
from tune_study.machine import gpus, provenance
from tune_study.machine.gpus import Card, Need
from tune_study.machine.provenance import cores
from tune_study.trial.context import RunContext

AWS_SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)
"""What Tune hands to its workers by way of a log file (seen with Ray 2.60)."""
HERE = "this machine"
PATIENCE_S = 600
"""For a node's first answer: its worker imports torch, on a machine that may be busy."""


class Slots(NamedTuple):
    """What a trial takes, and how many run at a time."""

    resources: dict[str, float]
    at_a_time: int
    told: str = ""
    """Of a cluster, and where ``auto`` has counted: how many trials run at a time, and where."""
    limit: int | None = None
    """For Tune, where fewer than fit are wanted and no resource says so. Tune then creates trials
    one by one, and starts a worker for each: 20 s that a reused one does not take."""
    on_device: int = 1
    """Trials on a GPU, or on a node's CPUs, at a time, at most."""


def parse_address(address: str) -> str:
    """``local``, ``auto`` or ``HOST:PORT``. Raises ``UserError``."""
    if address not in ("local", "auto") and not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
        raise UserError(f"--address {address}: write local, auto or HOST:PORT")
    return address


def check_options(address: str, storage: str | None) -> None:
    """Raises ``UserError`` for what a study on a cluster lacks."""
    if parse_address(address) == "local":
        return
    if storage is None:
        raise UserError(
            f"--address {address}: the nodes of a cluster need a place for what their trials "
            "leave; add --storage with s3://bucket/path, or file:///path of a folder they share"
        )


def connect(
    address: str,
    context: RunContext,
    *,
    max_concurrent: int | None,
    gpus_per_trial: float | Need | None,
    dashboard: bool = False,
) -> Slots:
    """Starts a Ray of our own, or joins the one at ``address``. Raises ``UserError``.

    ``gpus_per_trial`` is a share, or what trials take of a GPU: then as many share one as fit.
    """
    # Ray would write them into a log that everyone may read; local workers inherit them anyway.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(AWS_SECRETS)
    # What a trial died of stands in its error.json, and we say so: no traceback beside it.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if gpus_per_trial is None:
        gpus_per_trial = 1 if context.device == "cuda" else 0
    if address == "local":
        resources, room = _here(context, gpus_per_trial, max_concurrent)
        simulated = context.simulation is not None
        local.start(room.trials, dashboard=dashboard, simulated=simulated)
        # Workers inherit all of it; asked for again, it would take another worker than the one that
        # Ray has started by now.
        class_cache.ENV_VARS_TO_PROPAGATE.clear()
        class_cache.DEFAULT_ENV_VARS.clear()
        told = placement.told([room], room.trials) if room.card else ""
        return Slots(resources, room.trials, told, on_device=_on_device(resources, [room]))
    _join(address)
    resources, rooms = _there(address, context, gpus_per_trial)
    fits = sum(room.trials for room in rooms)
    at_a_time = min(fits, max_concurrent or fits)
    limit = at_a_time if at_a_time < fits else None
    on_device = min(at_a_time, _on_device(resources, rooms))
    return Slots(resources, at_a_time, placement.told(rooms, at_a_time), limit, on_device)


def _on_device(resources: Mapping[str, float], rooms: Sequence[Room]) -> int:
    """``Slots.on_device``; of a node with several GPUs it is not known which trials share one."""
    most, share = max(room.trials for room in rooms), resources["GPU"]
    return min(most, max(1, int(1 / share + 1e-9))) if share else most


def _here(
    context: RunContext, gpu: float | Need, most: int | None
) -> tuple[dict[str, float], Room]:
    """What a trial takes of a Ray of our own, and how many run at a time."""
    count, card = most or 1, None
    if isinstance(gpu, Need):
        card = gpus.smallest(context.device)
        assert card is not None  # auto is for CUDA alone
        gpu = placement.share_of_all(gpu, {HERE: card})
        there = {"GPU": gpus.count(), "CPU": cores()}
        fits = placement.fit(there, {"GPU": gpu, "CPU": context.num_threads})
        count = max(1, min(fits, most or fits))
    return {"CPU": 0, "GPU": gpu, local.TRIAL_SLOT: 1}, Room(HERE, card, count)


def _there(
    address: str, context: RunContext, gpu: float | Need
) -> tuple[dict[str, float], list[Room]]:
    """What a trial takes of the cluster, and its nodes that have room for one."""
    resources = {"CPU": context.num_threads, "GPU": 1 if isinstance(gpu, Need) else gpu}
    nodes = nodes_for(resources)
    if not nodes:
        raise UserError(
            f"--address {address}: no node has {resources['CPU']:g} CPUs and {resources['GPU']:g} "
            "GPUs for a trial; see --cpus-per-trial and --gpus-per-trial"
        )
    cards = _look_at_nodes(address, context, nodes)
    if isinstance(gpu, Need):
        known = {name: card for name, card in cards.items() if card is not None}
        resources["GPU"] = placement.share_of_all(gpu, known)
    return resources, [
        Room(name, cards[name], placement.fit(node["Resources"], resources))
        for name, node in ((name_of(node), node) for node in nodes)
    ]


def _join(address: str) -> None:
    try:
        ray.init(address=address, **local.QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there "
            f"({first_line(error)[:200]}); start one with ray start --head, or leave --address out"
        ) from None


def _look_at_nodes(
    address: str, context: RunContext, nodes: Sequence[Mapping[str, Any]]
) -> dict[str, Card | None]:
    """The card of every node, by its name. Raises ``UserError`` for a node that differs."""
    look = ray.remote(num_cpus=0)(_what_is_there)
    asked = {
        name_of(node): look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(context.device, context.code)
        for node in nodes
    }
    ours, cards = provenance.what_computes(context.device), {}
    for name, answer in asked.items():
        try:
            theirs = ray.get(answer, timeout=PATIENCE_S)
        except (RayError, TimeoutError) as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise UserError(
                f"--address {address}: {name} can't run trials ({last[0][:200]}); install this "
                "version of tune-study and its dependencies there"
            ) from None
        if isinstance(theirs, str):
            raise UserError(f"--address {address}: on {name}, {theirs}")
        computes, cards[name] = theirs
        if difference := first_difference(ours, computes):
            raise UserError(
                f"--address {address}: on {name}, {difference}; a study wants the same on all nodes"
            )
    return cards


def nodes_for(resources: Mapping[str, float]) -> list[dict[str, Any]]:
    """The living nodes that have room for a trial."""
    living = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in living if placement.fit(node["Resources"], resources)]


def _what_is_there(device: str, code: Code | None) -> tuple[dict[str, Any], Card | None] | str:
    """(``what_computes``, the GPU) of a node, or why the user's own file does not run there."""
    try:
        run_where_trials_run(code)
    except UserError as error:
        return str(error)
    return provenance.what_computes(device), gpus.smallest(device)


def name_of(node: Mapping[str, Any]) -> str:
    """In words. Nodes are told apart by their id: those of one machine share the address."""
    return f"node {node['NodeID'][:8]} ({node['NodeManagerAddress']})"


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """``torch is 2.6.0 and here it is 2.7.1``; a commit that one side can't tell does not count."""
    for name, value in ours.items():
        other = theirs.get(name)
        if other != value and (other is not None and value is not None):
            return f"{name} is {other} and here it is {value}"
    return None
