"""Training steps of ours, and the ratios that need nothing else: epoch, monitor, modes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.timing import Comparison, alternate, compare, rate
from tune_study.config import TrialConfig, parse_trial
from tune_study.data.batches import preprocess
from tune_study.data.place import Place
from tune_study.data.sources import Split
from tune_study.data.splits import load
from tune_study.machine.device import settle
from tune_study.machine.resources import INTERVAL_S, ResourceMonitor
from tune_study.model.build import build_model
from tune_study.model.noise_scale import NoiseScale
from tune_study.study.compute_dtype import settle_compute_dtype
from tune_study.trial import train
from tune_study.trial.training import Training

OFTEN = 20
CALLS = 20
MODES = ("none", "int8", "nf4", "nf4-dq")


def config_of(model: str, mode: str, batch: int, device: str) -> TrialConfig:
    """A trial of the full grid, on random weights: their values do not change the speed."""
    config = parse_trial(
        {
            "model": model,
            "dataset": "digits",
            "lora": {"r": 8, "lora_alpha": 16},
            "quantization": mode,
            "pretrained": False,
            "training": {"per_device_train_batch_size": batch},
            "data": {"augment": "flip-crop"},
        }
    )
    return settle_compute_dtype([config], device, set())[0][0]


def started(config: TrialConfig, device: str, images: int) -> Training:
    """A trial before its first epoch, with ``images`` training images."""
    data = load("digits", Place(), config.data)
    data = data._replace(train=first_images(data.train, images))
    where = torch.device(device)
    settle(where)  # as a trial does: deterministic kernels may be slower
    training = train.start(config, build_model(config, 10, device=where), data, where)
    training.model.train()
    return training


def first_images(split: Split, images: int) -> Split:
    """So many of ``split``, which begins anew where it has fewer."""
    return split.take(np.arange(images) % len(split.labels))


def bare_step(training: Training) -> Callable[[], None]:
    """Forward, backward and optimizer on one fixed batch: no data, no monitor, no clipping."""
    size = training.config.images_per_step
    images, labels = (part[:size] for part in training.data.train)
    pixels = preprocess(images, training.preprocessing)

    def step() -> None:
        with train.autocast(training):
            scores = training.model(pixels)
        cross_entropy(scores.float(), labels).backward()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    return step


def synchronised(work: Callable[[], object], device: str, times: int = 1) -> Callable[[], None]:
    """``work``, ``times`` times, and the device's queue empty at the end."""

    def run() -> None:
        for _ in range(times):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        elif device == "mps":
            torch.mps.synchronize()

    return run


def epoch_against_step(
    model: str, mode: str, batch: int, steps: int, rounds: int, device: str
) -> Comparison:
    """A whole training epoch of a trial, against the bare step on as many images."""
    images = batch * steps
    training = started(config_of(model, mode, batch, device), device, images)
    step = bare_step(training)
    epoch = synchronised(lambda: train._train_epoch(training), device)
    bare = synchronised(step, device, steps)
    measured = alternate(
        {"epoch": lambda: rate(epoch, images), "bare step": lambda: rate(bare, images)}, rounds
    )
    return compare(f"epoch / bare step, {mode}", ">= 0.95", measured, "epoch", "bare step")


def monitors_on_against_off(
    model: str, mode: str, batch: int, steps: int, rounds: int, device: str
) -> list[Comparison]:
    """Seconds per step with what watches it, against those without.

    The gradient monitor costs less than whole steps scatter: what it does more than compute the
    norm, which clipping needs anyway, is timed alone on a step's gradients. The resource monitor
    samples once a second in a trial, less often than these steps last: here it samples ``OFTEN``
    times as often, and that share of what it costs is told.
    """
    training = started(config_of(model, mode, batch, device), device, batch)
    parameters = list(training.parameters.values())
    noise = NoiseScale(training.parameters, steps=steps)

    def norm_alone(loss: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters])

    def alone(observe: Callable[[torch.Tensor], object]) -> float:
        loss, _ = train._forward(training, *training.data.train)
        synchronised(loss.backward, device)()
        took = 1 / rate(synchronised(lambda: observe(loss.detach()), device, CALLS), CALLS)
        training.optimizer.zero_grad(set_to_none=True)
        return took

    def step() -> None:
        train.train_step(training, *training.data.train)

    def seconds(watch: str) -> float:
        training.noise = noise if watch == "noise scale" else None
        work = synchronised(step, device, steps)
        if watch == "resources":
            with ResourceMonitor(torch.device(device), interval_s=INTERVAL_S / OFTEN):
                return 1 / rate(work, steps)
        return 1 / rate(work, steps)

    watches = ("step", "noise scale", "resources")
    sides = {watch: lambda w=watch: seconds(w) for watch in watches}
    sides["monitor"] = lambda: alone(training.monitor.observe)
    sides["norm"] = lambda: alone(norm_alone)
    measured = alternate(sides, rounds)
    timed = zip(*(measured[name] for name in ("step", "monitor", "norm")), strict=True)
    measured["without"] = [whole - (monitor - norm) for whole, monitor, norm in timed]
    gradients, noise_scale, resources = (
        compare(f"{what} on / off, {mode}", target, measured, on, off, "s/step")
        for what, target, on, off in (
            ("gradient monitor", "<= 1.02", "step", "without"),
            ("gradient noise scale", "<= 1.05", "noise scale", "step"),
            ("resource monitor", "<= 1.02", "resources", "step"),
        )
    )
    gradients = gradients._replace(note="what the monitor adds to the norm is timed alone")
    share = [1 + (ratio - 1) / OFTEN for ratio in resources.ratios]
    note = f"sampled {OFTEN} times as often, of which the ratio is a {OFTEN}th part"
    return [gradients, noise_scale, resources._replace(ratios=share, note=note)]


def modes_against_none(
    model: str, batch: int, steps: int, rounds: int, device: str
) -> list[Comparison]:
    """The bare LoRA step of each mode against that of ``none`` in the same compute dtype."""
    sides = {}
    for mode in MODES:
        config = config_of(model, mode, batch, device)
        work = synchronised(bare_step(started(config, device, batch)), device, steps)
        sides[mode] = lambda work=work: rate(work, steps * batch)
    measured = alternate(sides, rounds)
    dtype = config.training.compute_dtype
    return [
        compare(f"{mode} / none, LoRA step in {dtype}", ">= 0.9", measured, mode, "none")
        for mode in MODES[1:]
    ]
