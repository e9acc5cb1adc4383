"""``--max-concurrent auto``: how many trials share a GPU, by memory predicted and use measured.

A small model's step is mostly Python launching kernels, and the GPU waits for it: then several
trials at a time end sooner than one after the other. Before the first trial the largest of the plan
takes some steps in a process of its own, while NVML is asked how busy the GPU is. As many trials
share it as memory, the GPU's own time and the cores of this machine hold, one number for all of a
study. It lies in ``sharing.json`` of the study's folder, where a study that goes on finds it.

None of this has run on a GPU yet.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_spaces.own_code import run_where_trials_run
from tune_study.cluster import placement
from tune_study.config import TrialConfig
from tune_study.data.splits import Outline, load
from tune_study.errors import UserError, first_line
from tune_study.folder.files import now, read_json, write_json
from tune_study.machine import gpus, nvml
from tune_study.machine.device import choose_device, free_bytes, settle
from tune_study.machine.gpus import Need
from tune_study.machine.nvml import NoReading
from tune_study.machine.process import Died, in_process
from tune_study.machine.provenance import cores
from tune_study.machine.resources import is_out_of_memory, release_memory
from tune_study.memory.estimate import largest_of, need_of
from tune_study.model.build import build_model, preprocessing
from tune_study.study.options import Options
from tune_study.trial import train
from tune_study.trial.context import RunContext
from tune_study.trial.training import Training

Planned = Sequence[tuple[TrialConfig, Outline]]
CHOICE_FILE = "sharing.json"
MOST = 8
"""Trials on a GPU. Without NVIDIA's MPS their processes take turns on it; what that costs, and how
many are too many, was not measured."""
WARM_UP_S, WATCHED_S = 2.0, 4.0
"""NVML's answer is about the last second at most: when the watching begins, that is of steps."""
EVERY_S = 0.25
LEAST_STEPS = 5
"""In each of both times: a graph is captured in the fourth."""
NOT_YET = "--max-concurrent auto looks at the GPU when the study begins"


def on_cuda_alone(given: Options, say: Callable[[str], None]) -> Options:
    """``given``, with one trial at a time where there is no GPU of CUDA's to share."""
    there = choose_device(given.device)
    if there == "cuda":
        return given
    say(f"--max-concurrent auto: one trial at a time, because {there} is no GPU of CUDA's to share")
    return replace(given, max_concurrent=1)


class Look(NamedTuple):
    """What one trial does with the GPU while it takes steps."""

    busy: float
    """Share of the time in which the GPU computes, 0..1."""
    step_s: float
    process_bytes: int
    """Of the GPU, beside what torch's allocator has: CUDA's own, kernels, workspaces."""


def choose(planned: Planned, context: RunContext, say: Callable[[str], None]) -> int:
    """How many trials share a GPU: as the study in ``context`` has it, else measured now.

    The choice is written into its folder. It holds on this machine, and until a trial joins that
    takes more memory than those before. Raises ``UserError`` where nothing can be measured.
    """
    device = torch.device(context.device)
    tensors = need_of(planned, device, process_bytes=0)
    trial = largest_of(planned, device)
    if tensors.step_bytes is None:
        say(
            "--max-concurrent auto: one trial at a time on a GPU, because the memory of "
            f"{trial.model} cannot be predicted"
        )
        return 1
    where = _machine(context)
    predicted = tensors.step_bytes + tensors.image_bytes
    if known := _known(context.study_dir, where, predicted):
        say(
            f"--max-concurrent auto: {known} at a time on {where['gpu']}, as this study began "
            f"({CHOICE_FILE})"
        )
        return known
    say(f"--max-concurrent auto: watching the GPU while {trial.trial_id} takes steps")
    release_memory()
    free = min(_free(torch.device(device.type, number)) for number in range(where["gpus"]))
    look = _look_in_a_process(trial, context)
    each = tensors.step_bytes + look.process_bytes
    limits = {
        "memory": placement.within(Need(each, tensors.image_bytes), free),
        "busy": int(1 / max(look.busy, 1 / MOST)),
        "cores": where["cores"] // where["gpus"] // context.num_threads,
        "most": MOST,
    }
    count = max(1, min(limits.values()))
    say(
        f"--max-concurrent auto: {count} at a time on {where['gpu']}: {limits['memory']} fit its "
        f"memory ({each / 1e9:,.1f} GB each, of {free / 1e9:,.1f} free), "
        f"{limits['busy']} its time (one keeps it busy for {look.busy * 100:.0f} %, with "
        f"{look.step_s * 1e3:.0f} ms a step), {limits['cores']} the cores; never more than {MOST}"
    )
    choice = {
        "trials_on_device": count,
        "limits": limits,
        "trial_id": trial.trial_id,
        **look._asdict(),
        "predicted_bytes": predicted,
        "free_bytes": free,
        "machine": where,
        "time": now(),
    }
    write_json(context.study_dir / CHOICE_FILE, choice)
    return count


def _machine(context: RunContext) -> dict[str, Any]:
    """What a choice holds for."""
    card = gpus.smallest(context.device)
    assert card is not None  # this is for CUDA alone
    return {
        "gpu": card.name,
        "memory_bytes": card.memory_bytes,
        "gpus": gpus.count(),
        "cores": cores(),
        "cores_of_a_trial": context.num_threads,
    }


def _free(device: torch.device) -> int:
    free = free_bytes(device)
    assert free is not None  # CUDA tells
    return free


def _known(study_dir: Path, where: dict[str, Any], predicted_bytes: int) -> int | None:
    choice = read_json(study_dir / CHOICE_FILE)
    if not isinstance(choice, dict) or choice.get("machine") != where:
        return None
    count, before = choice.get("trials_on_device"), choice.get("predicted_bytes")
    if type(count) is not int or type(before) is not int:
        return None
    return count if 1 <= count <= MOST and before >= predicted_bytes else None


def _look_in_a_process(trial: TrialConfig, context: RunContext) -> Look:
    """Raises ``UserError``."""
    free = _free(torch.device(context.device))
    try:
        found = in_process(look_or_why_not, trial, context, free)
    except Died as why:
        found = str(why)
    if isinstance(found, str):
        raise UserError(
            f"--max-concurrent auto: no step of {trial.trial_id} could be watched ({found}); name "
            "a number with the share of a GPU that each takes, such as --max-concurrent 4 "
            "--gpus-per-trial 0.25"
        )
    return Look(*found)


def look_or_why_not(trial: TrialConfig, context: RunContext, free: int) -> Look | str:
    """In a process of its own; ``free`` are the bytes of the GPU that were so before it began."""
    device = torch.device(context.device)
    try:
        busy = nvml.busy_share(device)
        busy()
        settle(device, strict=False)
        torch.set_num_threads(context.num_threads)
        run_where_trials_run(context.code)
        data = load(trial.dataset, context.place, trial.data, preprocessing(trial))
        built = build_model(trial, len(data.class_names), weights=context.weights, device=device)
        training = train.start(trial, built, data, device, context.code)
        share, step_s = watch(training, busy)
    except (UserError, NoReading) as why:
        return str(why)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return f"out of memory: {first_line(error)}"
    taken = free - _free(device)
    return Look(share, step_s, max(0, taken - torch.cuda.memory_reserved(device)))


def watch(training: Training, busy: Callable[[], float]) -> tuple[float, float]:
    """(mean of what ``busy`` reads while steps are taken, seconds of a step)."""
    steps = _endless(training)
    _take(steps, WARM_UP_S, lambda: None)
    readings: list[float] = []
    count, time_s = _take(steps, WATCHED_S, lambda: readings.append(busy()))
    return sum(readings) / len(readings), time_s / count


def _take(steps: Iterator[Tensor], least_s: float, read: Callable[[], object]) -> tuple[int, float]:
    """(how many steps, seconds): for ``least_s``, ``read`` every ``EVERY_S`` and last."""
    started = last = time.perf_counter()
    for count in itertools.count(1):
        loss = next(steps)
        at = time.perf_counter()
        over = at - started >= least_s and count >= LEAST_STEPS
        if over or at - last >= EVERY_S:
            read()
            last = at
        if over:
            float(loss)  # which waits for the device
            break
    return count, time.perf_counter() - started


def _endless(training: Training) -> Iterator[Tensor]:
    """The loss of each step, epoch after epoch; what the epochs found is not looked at."""
    while True:
        for _, _, loss, _ in train.epoch_steps(training):
            yield loss
