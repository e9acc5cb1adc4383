"""``fit`` and ``evaluate``: plain torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from search_spaces.own_code import Code
from tune_study.config import TrialConfig
from tune_study.data.batches import (
    augmentation,
    eval_batches,
    make_batch,
    planned,
    preprocess,
)
from tune_study.data.mapped import Mapped
from tune_study.data.sources import Split
from tune_study.data.splits import Dataset
from tune_study.data.transform import transform_of
from tune_study.memory.step import StepMemory, measure_step
from tune_study.model.build import BuiltModel, trainable
from tune_study.model.layers import COMPUTE_DTYPES
from tune_study.model.noise_scale import NoiseScale, gradients_of_first_half
from tune_study.model.outliers import make_static
from tune_study.trial.gradients import GradientFlowMonitor
from tune_study.trial.graph import Capturer, Cuda, GraphedStep, refuse_graph, step_of
from tune_study.trial.schedule import Schedule, hold_rate
from tune_study.trial.training import Row, Training

EVAL_IMAGES_ON_CPU = 32
"""glibc takes every tensor of more than 32 MiB from the system anew: more images are slower."""
NO_NOISE_SCALE = dict.fromkeys(
    ("gradient_noise_trace", "gradient_square", "gradient_noise_scale"), math.nan
)


def start(
    config: TrialConfig,
    built: BuiltModel,
    data: Dataset,
    device: torch.device,
    code: Code | None = None,
) -> Training:
    """A trial before its first epoch. The images move to ``device``, as uint8.

    Raises ``UserError`` as ``refuse_graph`` and ``transform_of``, which looks into ``code``.
    """
    refuse_graph(config, device.type)
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
    hold_rate(optimizer, device)
    schedule = Schedule(
        optimizer,
        settings.learning_rate,
        settings.warmup_steps,
        steps_per_epoch * settings.num_train_epochs,
    )
    torch.manual_seed(config.seed)
    training = Training(
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
        transform=transform_of(config, code),
    )
    if step_of(config) == "graph":
        training.outliers = make_static(built.model)
        training.graph = graphed(training, Cuda(device))
        training.evaluation = graphed_evaluation(training, Cuda(device))
    return training


def graphed(training: Training, device: Capturer) -> GraphedStep:
    """The training's step on full batches, as a graph of ``device``."""
    split, size = training.data.train, training.config.images_per_step
    policy = augmentation(training.config.dataset, training.config.data)
    images = None
    if isinstance(split.images, Mapped):  # they come batch by batch
        shape = (size, *split.images.shape[1:])
        images = torch.zeros(shape, dtype=torch.uint8, device=training.device)

    def step(part: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        return step_on_device(training, *make_batch(split, part, given, policy))

    def undo() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        if training.noise is not None:
            training.noise.start_step()

    part = torch.zeros(4, size, dtype=torch.int64, device=training.device)
    return GraphedStep(step, undo, part, images, device)


def graphed_evaluation(training: Training, device: Capturer) -> GraphedStep:
    """The forward pass of ``evaluate`` on full batches, as a graph of ``device``."""
    size = images_per_evaluation(training)
    shape = (size, *training.data.val.images.shape[1:])
    images = torch.zeros(shape, dtype=torch.uint8, device=training.device)
    labels = torch.zeros(size, dtype=torch.int64, device=training.device)

    def step(labels: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor]:
        assert images is not None
        return _loss_and_hits(training, images, labels)

    return GraphedStep(step, lambda: None, labels, images, device)


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
        joules, started = training.joules(), time.perf_counter()
        row, layer_gradients = _train_epoch(training)
        trained = time.perf_counter()
        joules = training.joules() - joules
        row["val_loss"], row["val_accuracy"] = evaluate(training, training.data.val)
        ended = time.perf_counter()
        row |= {
            "epoch": len(training.history) + 1,
            "epoch_time_s": ended - started,
            "train_time_s": trained - started,
            "train_energy_j": joules,
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
    total = len(training.data.train.labels)
    count = math.ceil(total / training.config.images_per_step)
    sums = torch.zeros(count, 2, device=training.device)
    learning_rate = math.nan
    for number, (rate, images, loss, hits) in enumerate(epoch_steps(training)):
        learning_rate = rate
        sums[number].copy_(torch.stack([loss * images, hits]))
    # The only reads of the device in the epoch. Doubles are the CPU's: MPS has none.
    losses, correct = sums.cpu().double().T.contiguous()
    if training.outliers is not None:
        training.outliers.refuse_more_than_room()
    gradients, layer_gradients = training.monitor.end_epoch()
    row = {
        "train_loss": float(losses.sum()) / total,
        "train_accuracy": int(correct.sum()) / total,
        "learning_rate": learning_rate,
        **gradients,
        **(training.noise.end_epoch() if training.noise is not None else NO_NOISE_SCALE),
    }
    return row, layer_gradients


def epoch_steps(training: Training) -> Iterator[tuple[float, int, Tensor, Tensor]]:
    """The steps of an epoch: (learning rate, images, mean loss, count of hits) of each.

    The last two lie on the device.
    """
    training.model.train()
    split, size = training.data.train, training.config.images_per_step
    policy = augmentation(training.config.dataset, training.config.data)
    plan = planned(split, size, policy, training.generator)
    for number, (part, images) in enumerate(plan):
        learning_rate, count = training.schedule.rate, part.shape[1]
        if training.graph is not None and count == size:
            loss, hits = training.graph(part, images)
            _count_step(training, count)
        else:
            batch, labels = make_batch(split, part, images, policy)
            if training.transform is not None:
                batch = training.transform(batch, len(training.history) + 1, number)
            loss, hits = train_step(training, batch, labels)
        yield learning_rate, count, loss, hits


def train_step(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step on uint8 ``images``: (mean loss, count of hits), on the device."""
    found = step_on_device(training, images, labels)
    _count_step(training, len(labels))
    return found


def _count_step(training: Training, count: int) -> None:
    """What the host does after each step on ``count`` images."""
    training.monitor.keep()
    if training.noise is not None:
        training.noise.keep(_compared_parts(training.config, count))
    training.schedule.step()


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
    """(mean cross-entropy, accuracy) of the current model on ``split``, not augmented.

    Raises ``UserError`` as ``Outliers.refuse_more_than_room``.
    """
    training.model.eval()
    losses, correct, sizes = [], [], []
    size = images_per_evaluation(training)
    for images, labels in eval_batches(split, size):
        if training.evaluation is not None and len(labels) == size:
            found = training.evaluation(labels, images)
            loss, hits = (tensor.clone() for tensor in found)  # the next batch is found there too
        else:
            loss, hits = _loss_and_hits(training, images, labels)
        losses.append(loss)
        sizes.append(float(len(labels)))
        correct.append(hits)
    if training.outliers is not None:
        training.outliers.refuse_more_than_room()
    total = len(split.labels)
    summed = (torch.stack(losses).cpu().double() * torch.tensor(sizes).double()).sum()
    return float(summed) / total, int(torch.stack(correct).sum()) / total


def _loss_and_hits(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss, scores = _forward(training, images, labels)
    return loss, (scores.argmax(-1) == labels).sum()


def images_per_evaluation(training: Training) -> int:
    """How many images of an evaluation batch go through the model together.

    All, but on a CPU at most ``EVAL_IMAGES_ON_CPU``. int8 layers look for outlier columns in the
    whole batch: for them parts of it would be another computation.
    """
    size = training.config.training.per_device_eval_batch_size
    if training.device.type == "cpu" and "int8" not in training.config.quantization.modes:
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
