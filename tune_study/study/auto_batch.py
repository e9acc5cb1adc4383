"""``--batch auto``: the micro-batch that trains fastest of those that fit, one for all modes.

A micro-batch decides the peak of a training step and, with dropout, the masks that are drawn. Were
it chosen trial by trial, a mode's memory, speed and accuracy would differ from another's by more
than the mode. So trials of one study that differ only in mode, LoRA and seed, and those on other
data of the same size, share the fastest micro-batch that fits in every mode. The images of an
optimizer step stay what the configuration says, and so does the trial id.

The choice lies in ``batch.json`` of every trial's folder, where ``micro_batch.within_memory`` finds
it: timing is never repeated for a trial that goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tune_study.config import TrialConfig
from tune_study.data.splits import load
from tune_study.errors import UserError
from tune_study.folder.files import now, write_json
from tune_study.machine.device import free_bytes, settle
from tune_study.machine.resources import is_out_of_memory, release_memory
from tune_study.memory.predict import predict
from tune_study.model.build import build_model, preprocessing
from tune_study.study.manifest import plan_of, planned
from tune_study.trial import fidelity, train
from tune_study.trial.context import RunContext
from tune_study.trial.graph import step_of
from tune_study.trial.micro_batch import CHOICE_FILE, chosen
from tune_study.trial.training import Training

Choice = dict[str, Any]
TIMED_STEPS = 2
"""Optimizer steps per micro-batch and mode, after one that warms up; the faster counts."""
LARGEST = 65536
"""As ``TrainingConfig.per_device_train_batch_size``."""
CPU_SHARE = 0.8
"""Of the free memory that a step may take to be tried on the host, where too much is answered by a
kill and not by an error."""
NOT_YET = (
    "--batch auto chooses the micro-batch when the study begins: peaks and times below are those "
    "of training.per_device_train_batch_size"
)


class Attempt(NamedTuple):
    """One micro-batch in one mode. ``images_per_s`` is ``None`` where it did not fit."""

    trial_id: str
    micro_batch: int
    images_per_s: float | None
    predicted_peak_train_bytes: int | None


def wanted(
    batch: str | None,
    context: RunContext,
    *,
    search: str | None,
    max_concurrent: int | None,
    gpus_per_trial: float | None,
) -> bool:
    """Whether to choose. Raises ``UserError`` for what it cannot go with."""
    if batch is None:
        return False
    if batch != "auto":
        raise UserError(
            f"--batch {batch}: there is one, auto; a size of your own is "
            "--set training.per_device_train_batch_size=N"
        )
    if context.simulation is not None:
        raise UserError("--batch auto: a simulated trial takes no step to time; leave it out")
    if search is not None:
        raise UserError(
            f"--batch auto: --search {search} draws a batch for every trial; leave it out, or fix "
            "the batch with --set training.per_device_train_batch_size=N"
        )
    if context.on_cluster:
        raise UserError(
            "--batch auto: it times steps on this machine, and the trials would run on others; "
            "leave --address out, or name the size with "
            "--set training.per_device_train_batch_size=N"
        )
    own_gpu = context.device == "cuda" and (gpus_per_trial is None or gpus_per_trial >= 1)
    if (max_concurrent or 1) > 1 and not own_gpu:
        raise UserError(
            f"--max-concurrent {max_concurrent}: --batch auto times a trial that has "
            f"{context.device} to itself; leave one of the two out"
        )
    return True


def comparable(trial: TrialConfig) -> tuple[Any, ...]:
    """Trials that are equal in this get the same micro-batch."""
    settings = trial.training
    return (
        trial.model,
        trial.data.image_size,
        trial.images_per_step,
        settings.compute_dtype,
        settings.gradient_checkpointing,
    )


def known(trials: Sequence[TrialConfig], study_dir: Path, *, auto: bool) -> dict[str, Choice]:
    """{trial id: choice} of those of ``trials`` for which the study in ``study_dir`` has one.

    With ``auto`` a new trial takes the choice of the study's trials that it will be compared with.
    Raises ``UserError`` where it would run with another micro-batch than they did.
    """
    if not auto and not any(study_dir.glob(f"*/{CHOICE_FILE}")):
        return {}
    choices: dict[tuple[Any, ...], Choice] = {}
    own: dict[str, Choice] = {}
    as_planned = set()
    both = [*planned(study_dir.name, plan_of(study_dir)), *trials]
    for trial in {trial.trial_id: trial for trial in both}.values():
        if choice := chosen(trial, study_dir / trial.trial_id):
            own[trial.trial_id] = choice
            choices.setdefault(comparable(trial), choice)
        elif (study_dir / trial.trial_id / "results.json").exists():
            as_planned.add(comparable(trial))
    found = {}
    for trial in trials:
        group = comparable(trial)
        choice = own.get(trial.trial_id)
        if auto and group in as_planned:
            raise UserError(
                f"--batch auto: the study in {study_dir} has begun with micro-batches as planned; "
                "leave the option out to continue it, or choose another --name"
            )
        if not (auto or choice or group in as_planned) and group in choices:
            raise UserError(
                f"--name {study_dir.name}: that study chose its micro-batches, and new trials "
                "could not be compared without; add --batch auto, or choose another --name"
            )
        if choice := choice or (choices.get(group) if auto else None):
            found[trial.trial_id] = choice
    return found


def choose(
    trials: Sequence[TrialConfig],
    context: RunContext,
    found: Mapping[str, Choice],
    say: Callable[[str], None],
    *,
    auto: bool,
) -> None:
    """Writes every trial's choice into its folder: the one ``found``, else one measured now.

    Raises ``UserError`` where not even single images fit.
    """
    groups: dict[tuple[Any, ...], list[TrialConfig]] = {}
    for trial in trials:
        if auto and trial.trial_id not in found:
            groups.setdefault(comparable(trial), []).append(trial)
    found = dict(found)
    for group in groups.values():
        choice = measure(group, context, say)
        found |= dict.fromkeys([trial.trial_id for trial in group], choice)
    for trial in trials:
        folder = context.study_dir / trial.trial_id
        if trial.trial_id in found and chosen(trial, folder) is None:
            folder.mkdir(exist_ok=True)
            write_json(folder / CHOICE_FILE, found[trial.trial_id])


def measure(
    trials: Sequence[TrialConfig], context: RunContext, say: Callable[[str], None]
) -> Choice:
    """The choice for ``trials``, which are ``comparable``: tried in every mode, at its largest r.

    The models that take the steps are dropped; nothing of a trial is touched. Raises ``UserError``
    where the trials' steps are no eager ones.
    """
    first = trials[0]
    if any(step_of(trial) == "graph" for trial in trials):
        raise UserError(
            "--batch auto: it times eager steps, and training.step=graph takes others; leave one "
            "of the two out"
        )
    images = first.images_per_step
    candidates = [size for size in range(1, min(images, LARGEST) + 1) if images % size == 0]
    kinds = {}
    for trial in sorted(trials, key=lambda trial: trial.lora.r):
        lora = trial.lora.of_a_step().model_copy(update={"r": 1})
        kinds[trial.quantization.model_dump_json(), lora.model_dump_json()] = trial
    say(
        f"--batch auto: timing micro-batches of {first.model} that make {images} images a step, "
        f"{len(kinds)} modes, up to {len(candidates)} sizes each"
    )
    # As a trial does, but a kernel that is not deterministic is no reason to time nothing.
    settle(torch.device(context.device), strict=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(context.num_threads)
    try:
        speeds, attempts = _timed(list(kinds.values()), context, candidates)
    finally:
        torch.set_num_threads(threads)
    # Of a study that trains every mode on the same images.
    overall = {size: statistics.harmonic_mean(measured) for size, measured in speeds.items()}
    micro, largest = max(overall, key=lambda size: overall[size]), max(overall)
    say(
        f"--batch auto: {micro} images, {images // micro} times a step: the fastest, "
        f"{overall[micro]:.1f} images/s over the modes; {largest} are the most that fit "
        f"({overall[largest]:.1f} images/s)"
    )
    return {
        "micro_batch": micro,
        "gradient_accumulation_steps": images // micro,
        "largest_micro_batch": largest,
        "images_per_s": overall,
        "attempts": [attempt._asdict() for attempt in attempts],
        "device": context.device,
        "num_threads": context.num_threads,
        "time": now(),
    }


def _timed(
    trials: Sequence[TrialConfig], context: RunContext, candidates: Sequence[int]
) -> tuple[dict[int, list[float]], list[Attempt]]:
    """({size: images/s of each trial} of the sizes that fit in all of them, every attempt)."""
    speeds: dict[int, list[float]] = {size: [] for size in candidates}
    attempts: list[Attempt] = []
    for trial in trials:
        for attempt in _attempts(trial, context, list(speeds)):
            attempts.append(attempt)
            if attempt.images_per_s is None:
                del speeds[attempt.micro_batch]
            else:
                speeds[attempt.micro_batch].append(attempt.images_per_s)
        release_memory()  # the workers need what this model had
        if not speeds:
            raise UserError(
                f"--batch auto: {trial.trial_id}: not even micro-batches of one image fit into "
                f"the free memory of {context.device}; set training.gradient_checkpointing=true"
            )
    return speeds, attempts


def _attempts(trial: TrialConfig, context: RunContext, sizes: Sequence[int]) -> Iterator[Attempt]:
    """Every size once, the largest first: once one has fitted, the smaller ones do."""
    device = torch.device(context.device)
    data = load(trial.dataset, context.place, trial.data, preprocessing(trial))
    classes = len(data.class_names)
    free = free_bytes(device)
    room = math.inf if free is None else free * (CPU_SHARE if device.type == "cpu" else 1)
    peaks = {
        size: predict(trial.with_micro_batch(size), classes, device).peak_train_bytes
        for size in sorted(sizes, reverse=True)
    }
    built = build_model(trial, classes, weights=context.weights, device=device)
    training = train.start(trial, built, data, device, context.code)
    fits = False
    for size, peak in peaks.items():
        training.config = trial.with_micro_batch(size)
        speed = None
        if peak is None or peak <= room:
            try:
                if not fits:  # as a trial does, which may have a second model at its start and end
                    fidelity.at_end(training, context.weights)
                speed = _images_per_s(training)
                fits = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                training.optimizer.zero_grad(set_to_none=True)
            release_memory()
        yield Attempt(trial.trial_id, size, speed, peak)


def _images_per_s(training: Training) -> float:
    """Of the fastest of ``TIMED_STEPS`` optimizer steps on the first images, after a warm-up."""
    training.model.train()
    count = training.config.images_per_step
    images, labels = training.data.train
    first = torch.arange(count, device=training.device) % len(labels)
    images, labels = images[first], labels[first]
    times = []
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        float(train.train_step(training, images, labels)[0])  # reading it waits for the device
        times.append(time.perf_counter() - started)
    return count / min(times[1:])
