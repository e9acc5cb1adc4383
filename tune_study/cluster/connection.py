"""Ray, on this machine alone or as a cluster that is there already: ``--address``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search_spaces.own_code import Code, run_where_trials_run
from tune_study.cluster import local
from tune_study.errors import UserError, first_line
from tune_study.machine import provenance
from tune_study.trial.context import RunContext

AWS_SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)
"""What Tune hands to its workers by way of a log file (seen with Ray 2.60)."""
PATIENCE_S = 600
"""For a node's first answer: its worker imports torch, on a machine that may be busy."""


class Slots(NamedTuple):
    """What a trial takes, and how many run at a time."""

    resources: dict[str, float]
    at_a_time: int
    limit: int | None = None
    """For Tune, where fewer than fit are wanted and no resource says so. Tune then creates trials
    one by one, and starts a worker for each: 20 s that a reused one does not take."""


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
    gpus_per_trial: float | None,
    dashboard: bool = False,
) -> Slots:
    """Starts a Ray of our own, or joins the one at ``address``. Raises ``UserError``."""
    # Ray would write them into a log that everyone may read; local workers inherit them anyway.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(AWS_SECRETS)
    # What a trial died of stands in its error.json, and we say so: no traceback beside it.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    gpus = 1 if context.device == "cuda" and gpus_per_trial is None else gpus_per_trial or 0
    if address == "local":
        count = max_concurrent or 1
        local.start(count, dashboard=dashboard)
        # Workers inherit all of it; asked for again, it would take another worker than the one that
        # Ray has started by now.
        class_cache.ENV_VARS_TO_PROPAGATE.clear()
        class_cache.DEFAULT_ENV_VARS.clear()
        return Slots({"CPU": 0, "GPU": gpus, local.TRIAL_SLOT: 1}, count)
    resources: dict[str, float] = {"CPU": context.num_threads, "GPU": gpus}
    _join(address)
    fits = _look_at_nodes(address, context, resources)
    if max_concurrent is None or max_concurrent >= fits:
        return Slots(resources, fits)
    return Slots(resources, max_concurrent, limit=max_concurrent)


def _join(address: str) -> None:
    try:
        ray.init(address=address, **local.QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there "
            f"({first_line(error)[:200]}); start one with ray start --head, or leave --address out"
        ) from None


def _look_at_nodes(address: str, context: RunContext, resources: Mapping[str, float]) -> int:
    """How many trials fit on the nodes at a time. Raises ``UserError`` for one that differs."""
    nodes = nodes_for(resources)
    fits = sum(_fit(node["Resources"], resources) for node in nodes)
    if not fits:
        raise UserError(
            f"--address {address}: no node has {resources['CPU']:g} CPUs and {resources['GPU']:g} "
            "GPUs for a trial; see --cpus-per-trial and --gpus-per-trial"
        )
    look = ray.remote(num_cpus=0)(_what_is_there)
    asked = {
        name_of(node): look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(context.device, context.code)
        for node in nodes
    }
    ours = provenance.what_computes(context.device)
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
        if difference := first_difference(ours, theirs):
            raise UserError(
                f"--address {address}: on {name}, {difference}; a study wants the same on all nodes"
            )
    return fits


def nodes_for(resources: Mapping[str, float]) -> list[dict[str, Any]]:
    """The living nodes that have room for a trial."""
    living = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in living if _fit(node["Resources"], resources)]


def _what_is_there(device: str, code: Code | None) -> dict[str, Any] | str:
    """``what_computes`` on a node, or why the user's own file does not run there."""
    try:
        run_where_trials_run(code)
    except UserError as error:
        return str(error)
    return provenance.what_computes(device)


def name_of(node: Mapping[str, Any]) -> str:
    """In words. Nodes are told apart by their id: those of one machine share the address."""
    return f"node {node['NodeID'][:8]} ({node['NodeManagerAddress']})"


def _fit(there: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return int(min(there.get(k, 0) / v for k, v in resources.items() if v))


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """``torch is 2.6.0 and here it is 2.7.1``; a commit that one side can't tell does not count."""
    for name, value in ours.items():
        other = theirs.get(name)
        if other != value and (other is not None and value is not None):
            return f"{name} is {other} and here it is {value}"
    return None
