"""``fit`` and ``evaluate``: plain torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tune_study.config import TrialConfig
from tune_study.data.batches import (
    Preprocessing,
    augmentation,
    eval_batches,
    normalisation,
    preprocess,
    train_batches,
)
from tune_study.data.sources import Split
from tune_study.data.splits import Dataset
from tune_study.machine.device import random_states, set_random_states
from tune_study.memory.step import StepMemory, measure_step
from tune_study.model.build import COMPUTE_DTYPES, BuiltModel, trainable
from tune_study.model.initial import Factors
from tune_study.model.noise_scale import NoiseScale, gradients_of_first_half
from tune_study.trial.gradients import GradientFlowMonitor
from tune_study.trial.schedule import Schedule

Row = dict[str, float]
EVAL_IMAGES_ON_CPU = 32
"""glibc takes every tensor of more than 32 MiB from the system anew: more images are slower."""
NO_NOISE_SCALE = dict.fromkeys(
    ("gradient_noise_trace", "gradient_square", "gradient_noise_scale"), math.nan
)


@dataclass
class Training:
    """The state of one trial between two epochs. ``state_dict`` holds all of it but the base."""

    config: TrialConfig
    model: nn.Module
    preprocessing: Preprocessing
    data: Dataset
    device: torch.device
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    generator: torch.Generator
    """Batch order and augmentation. Dropout draws from torch's global generator."""
    monitor: GradientFlowMonitor
    noise: NoiseScale | None = None
    """Only where the configuration asks for it."""
    history: list[Row] = field(default_factory=list)
    layer_gradients: list[list[float]] = field(default_factory=list)
    """Mean gradient norm of each trainable tensor, per epoch."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The trainable parameters at the best epoch, on the CPU."""
    best_epoch: int = 0
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """What the adapters took of the base when they began (``BuiltModel.factors``)."""

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """The constants of ``preprocess``, made once."""
        return normalisation(self.preprocessing, self.device)

    @property
    def best_accuracy(self) -> float:
        return self.history[self.best_epoch - 1]["val_accuracy"] if self.best_epoch else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {
            "adapter": {name: p.detach().cpu() for name, p in self.parameters.items()},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": {
                "batches": self.generator.get_state(),
                **random_states(self.device),
            },
            "monitor": self.monitor.state_dict(),
            "history": self.history,
            "layer_gradients": self.layer_gradients,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where ``state_dict`` was taken."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generators"]["batches"])
        set_random_states(state["generators"], self.device)
        self.monitor.load_state_dict(state["monitor"])
        self.best = dict(state["best"])
        self.history = list(state["history"])
        self.layer_gradients = list(state["layer_gradients"])
        self.best_epoch = int(state["best_epoch"])


def start(config: TrialConfig, built: BuiltModel, data: Dataset, device: torch.device) -> Training:
    """A trial before its first epoch. The images move to ``device``, as uint8."""
    settings = config.training
    parameters = trainable(built.model)
    steps_per_epoch = math.ceil(len(data.train.labels) / config.images_per_step)
    noise = settings.gradient_noise_scale
    # Weight decay is for matrices: biases are exempt, as in transformers' Trainer.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p.ndim >= 2]},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = Schedule(
        optimizer,
        settings.learning_rate,
        settings.warmup_steps,
        steps_per_epoch * settings.num_train_epochs,
    )
    torch.manual_seed(config.seed)
    return Training(
        config=config,
        model=built.model,
        preprocessing=built.preprocessing,
        data=data._replace(
            train=data.train.to(device), val=data.val.to(device), test=data.test.to(device)
        ),
        device=device,
        parameters=parameters,
        optimizer=optimizer,
        schedule=schedule,
        generator=torch.Generator().manual_seed(config.seed),
        monitor=GradientFlowMonitor(
            parameters, warmup_steps=settings.warmup_steps, steps=steps_per_epoch
        ),
        noise=NoiseScale(parameters, steps=steps_per_epoch) if noise else None,
        factors=built.factors,
    )


def finished(training: Training) -> str | None:
    """The status with which the trial ends after its last epoch, or ``None`` to train on."""
    settings = training.config.training
    epochs = len(training.history)
    if epochs == 0:
        return None
    last = training.history[-1]
    if not (math.isfinite(last["train_loss"]) and math.isfinite(last["val_loss"])):
        return "diverged"
    if epochs >= settings.num_train_epochs:
        return "completed"
    patience = settings.early_stopping_patience
    if patience and epochs - training.best_epoch >= patience:
        return "early_stopped"
    return None


def fit(training: Training) -> Iterator[Row]:
    """Trains to the end, yielding the row of each finished epoch (``schema.EPOCHS`` columns)."""
    while finished(training) is None:
        started = time.perf_counter()
        row, layer_gradients = _train_epoch(training)
        trained = time.perf_counter()
        row["val_loss"], row["val_accuracy"] = evaluate(training, training.data.val)
        ended = time.perf_counter()
        row |= {
            "epoch": len(training.history) + 1,
            "epoch_time_s": ended - started,
            "train_time_s": trained - started,
            "images_per_s": len(training.data.train.labels) / (trained - started),
        }
        training.history.append(row)
        training.layer_gradients.append(layer_gradients)
        _keep_best(training)
        yield row


def _keep_best(training: Training) -> None:
    accuracy = training.history[-1]["val_accuracy"]
    diverged = finished(training) == "diverged"
    if not diverged and not accuracy <= training.best_accuracy:  # the first, or a better one
        training.best_epoch = len(training.history)
        training.best = {name: p.detach().cpu().clone() for name, p in training.parameters.items()}


def _train_epoch(training: Training) -> tuple[Row, list[float]]:
    training.model.train()
    size, total = training.config.images_per_step, len(training.data.train.labels)
    policy = augmentation(training.config.dataset, training.config.data)
    batches = train_batches(training.data.train, size, policy, training.generator)
    sums = torch.zeros(math.ceil(total / size), 2, device=training.device)
    learning_rate = math.nan
    for number, (images, labels) in enumerate(batches):
        learning_rate = training.schedule.rate
        loss, hits = train_step(training, images, labels)
        sums[number].copy_(torch.stack([loss * len(labels), hits]))
    # The only reads of the device in the epoch. Doubles are the CPU's: MPS has none.
    losses, correct = sums.cpu().double().T.contiguous()
    gradients, layer_gradients = training.monitor.end_epoch()
    row = {
        "train_loss": float(losses.sum()) / total,
        "train_accuracy": int(correct.sum()) / total,
        "learning_rate": learning_rate,
        **gradients,
        **(training.noise.end_epoch() if training.noise is not None else NO_NOISE_SCALE),
    }
    return row, layer_gradients


def train_step(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step on uint8 ``images``: (mean loss, count of hits), on the device."""
    found = step_on_device(training, images, labels)
    training.monitor.keep()
    if training.noise is not None:
        training.noise.keep(_compared_parts(training.config, len(labels)))
    training.schedule.step()
    return found


def step_on_device(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The part of ``train_step`` that only queues work: no read, nothing counted on the host.

    What it finds or leaves and the next step takes lies in tensors that stay where they are.
    """
    settings = training.config.training
    micro = settings.per_device_train_batch_size
    noise = training.noise
    halves = noise is not None and len(labels) <= micro
    losses, hits = [], []
    for part, targets in zip(images.split(micro), labels.split(micro), strict=True):
        with gradients_of_first_half(halves) as first:
            loss, scores = _forward(training, part, targets)
        # Of the step's mean loss, so that accumulation equals one large batch.
        share = loss * (len(targets) / len(labels))
        share.backward()
        if noise is not None and halves:
            noise.observe_halves(first)
        elif noise is not None:
            noise.observe_part(len(targets) / len(labels))
        losses.append(share.detach())
        hits.append((scores.detach().argmax(-1) == targets).sum())
    step_loss = torch.stack(losses).sum()
    norm = training.monitor.observe(step_loss)
    if noise is not None:
        noise.observe_step(norm, _compared_parts(training.config, len(labels)))
    torch.nn.utils.clip_grads_with_norm_(training.parameters.values(), settings.max_grad_norm, norm)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return step_loss, torch.stack(hits).sum()


def _compared_parts(config: TrialConfig, count: int) -> list[int]:
    """The images in each part of a step of ``count`` whose gradients the noise scale compares."""
    micro = config.training.per_device_train_batch_size
    if count <= micro:
        return [count - count // 2, count // 2]
    return [min(micro, count - start) for start in range(0, count, micro)]


def _forward(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy, scores [B, classes]) of uint8 ``images``, in the compute dtype."""
    pixels = preprocess(images, training.preprocessing, training.normalisation)
    with autocast(training):
        scores = training.model(pixels)
    return cross_entropy(scores.float(), labels), scores


def autocast(training: Training) -> torch.autocast:
    """bf16 where the configuration asks for it; off for fp32."""
    return autocast_of(training.config, training.device)


def autocast_of(config: TrialConfig, device: torch.device) -> torch.autocast:
    """The precision of every forward pass of a trial: bf16 autocast, or plain fp32."""
    dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.inference_mode()
def evaluate(training: Training, split: Split) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) of the current model on ``split``, not augmented."""
    training.model.eval()
    losses, correct, sizes = [], [], []
    for images, labels in eval_batches(split, images_per_evaluation(training)):
        loss, scores = _forward(training, images, labels)
        losses.append(loss)
        sizes.append(float(len(labels)))
        correct.append((scores.argmax(-1) == labels).sum())
    total = len(split.labels)
    summed = (torch.stack(losses).cpu().double() * torch.tensor(sizes).double()).sum()
    return float(summed) / total, int(torch.stack(correct).sum()) / total


def images_per_evaluation(training: Training) -> int:
    """How many images of an evaluation batch go through the model together.

    All, but on a CPU at most ``EVAL_IMAGES_ON_CPU``. int8 layers look for outlier columns in the
    whole batch: for them parts of it would be another computation.
    """
    size = training.config.training.per_device_eval_batch_size
    quantization = training.config.quantization
    has_int8 = "int8" in (quantization.mode, *quantization.overrides.values())
    if training.device.type == "cpu" and not has_int8:
        return min(size, EVAL_IMAGES_ON_CPU)
    return size


def test(training: Training) -> dict[str, float]:
    """``test_accuracy`` and ``test_loss`` at the best epoch's state: the one look at the test set.

    Leaves the model in that state.
    """
    with torch.no_grad():
        for name, parameter in training.parameters.items():
            parameter.copy_(training.best[name])
    loss, accuracy = evaluate(training, training.data.test)
    return {"test_accuracy": accuracy, "test_loss": loss}


def measure_memory(training: Training) -> StepMemory:
    """The bytes of one training step on the first images, leaving no trace."""
    size = training.config.training.per_device_train_batch_size
    images, labels = (tensor[:size] for tensor in training.data.train)
    training.model.train()
    return measure_step(
        training.model,
        training.optimizer,
        lambda count: _forward(training, images[:count], labels[:count])[0],
        training.device,
    )
