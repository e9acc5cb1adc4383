"""How far a quantized model is from its full-precision twin: its gradients, features and logits.

The images are the first ones of the training split, not augmented; test images play no part.
Nothing here leaves a trace: random states, gradients and weights are as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from tune_study.data.batches import preprocess
from tune_study.errors import UserError
from tune_study.machine.device import kept_random_states
from tune_study.model.build import build_model, trainable
from tune_study.model.weights import classifier_names, load_base
from tune_study.trial.train import autocast, images_per_evaluation
from tune_study.trial.training import Training

IMAGES = 32


class GradientFidelity(NamedTuple):
    """Gradients of the quantized model (q) against the twin's (f), over all LoRA tensors."""

    cosine: float
    """q.f / (|q| |f|); exactly 1 when they are equal."""
    norm_ratio: float
    """|q| / |f|."""
    layers: dict[str, dict[str, float | None]]
    """The same per trainable tensor, the head's included. ``None`` where a gradient is zero, as
    that of every A is while B is 0, before the first step."""


class OutputFidelity(NamedTuple):
    """The untouched pretrained model, quantized against full precision, in evaluation mode.

    NaN where there is no pretrained head. Named as the columns of ``schema.TRIALS``.
    """

    feature_cosine: float
    """Mean over the images, of the pooled features before the head."""
    pretrained_top1_agreement: float
    pretrained_logit_kl: float
    """Mean KL divergence in nats of the quantized model's classes from the twin's."""


class Look(NamedTuple):
    """What a model computes on the fixed images, in the adapters' present state."""

    gradients: dict[str, Tensor]
    features: Tensor


class Reference(NamedTuple):
    """The twin of the trials that begin with ``adapter``."""

    adapter: dict[str, Tensor]
    twin: Look
    head: nn.Linear | None
    """The pretrained classifier, where there is one."""


_latest: dict[str, Reference] = {}
"""At most one: that of the last trial of this process that began."""


@contextmanager
def twin(training: Training, weights: Path | None) -> Iterator[PeftModel]:
    """The full-precision model of the same trial, in the same adapter state.

    Where the adapters began with a part of the base, B0 and A0, the twin's base is
    W - scaling * B0 A0: at the start it computes with the full-precision weights W exactly, and it
    differs from the trial's model by what quantization, after all that the initialisation made
    good, has left. For PiSSA that is the error of the quantized rest; for LoftQ the twin is not the
    trial of mode ``none``, whose adapters begin otherwise.

    Random states are put back at the end, whatever is drawn in between.
    """
    with kept_random_states(training.device):
        classes = len(training.data.class_names)
        built = build_model(
            training.config.unquantized,
            classes,
            weights=weights,
            device=training.device,
            factors=training.factors,
        )
        with torch.no_grad():
            for name, parameter in trainable(built.model).items():
                parameter.copy_(training.parameters[name])
        yield built.model


def at_start(training: Training, weights: Path | None) -> tuple[GradientFidelity, OutputFidelity]:
    """Both fidelities of a trial before its first step.

    The modes of a configuration and seed begin with the same adapters, and so with the same twin:
    the first of them to run in a process looks at it, for the others too.
    """
    key = "|".join(
        [
            training.config.unquantized.model_dump_json(),
            f"{weights} {training.data.sha256} {training.device} {torch.get_num_threads()}",
        ]
    )
    known = _latest.get(key)
    if known is None or not all(
        torch.equal(p, known.adapter[name]) for name, p in training.parameters.items()
    ):
        _latest.clear()
        with _full_precision(training, weights) as other:
            known = _latest[key] = Reference(
                {name: p.detach().clone() for name, p in training.parameters.items()},
                _look(training, other),
                _pretrained_head(training, weights),
            )
    ours = known.twin if _is_its_own_twin(training) else _look(training, training.model)
    return (
        gradient_fidelity(ours.gradients, known.twin.gradients),
        output_fidelity(ours.features, known.twin.features, known.head),
    )


def at_end(training: Training, weights: Path | None) -> GradientFidelity:
    """The gradients' fidelity in the present state of the adapters."""
    with _full_precision(training, weights) as other:
        theirs = gradients_of(training, other)
    ours = theirs if _is_its_own_twin(training) else gradients_of(training, training.model)
    return gradient_fidelity(ours, theirs)


def _is_its_own_twin(training: Training) -> bool:
    return training.config == training.config.unquantized


@contextmanager
def _full_precision(training: Training, weights: Path | None) -> Iterator[nn.Module]:
    """The twin, or the trial's own model where that is at full precision."""
    if _is_its_own_twin(training):
        yield training.model
    else:
        with twin(training, weights) as other:
            yield other


def _look(training: Training, model: nn.Module) -> Look:
    return Look(gradients_of(training, model), features_of(training, model))


def gradients_of(training: Training, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the mean loss on the fixed images, by the name of the tensor that learns.

    By the kernels of training, in micro-batches of the trial's size, with dropout off, so that no
    draw decides.
    """
    images, labels = (tensor[:IMAGES] for tensor in training.data.train)
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if "Drop" in type(module).__name__:  # torch's and timm's
            module.eval()
    micro = training.config.training.per_device_train_batch_size
    with kept_random_states(training.device):
        for part, targets in zip(images.split(micro), labels.split(micro), strict=True):
            with autocast(training):
                scores = model(preprocess(part, training.preprocessing))
            loss = cross_entropy(scores.float(), targets) * (len(targets) / len(labels))
            loss.backward()
    found = {}
    for name, parameter in trainable(model).items():
        gradient = parameter.grad
        found[name] = torch.zeros_like(parameter) if gradient is None else gradient
        parameter.grad = None
    for module, mode in modes.items():
        module.training = mode
    return found


@torch.inference_mode()
def features_of(training: Training, model: nn.Module) -> Tensor:
    """Pooled features before the head [images, channels], double, on the CPU.

    By the kernels of evaluation: those of int8 round the activations too, where on the CPU those of
    training do not.
    """
    base: Any = cast(PeftModel, model).get_base_model()
    was_training = model.training
    model.eval()
    parts = []
    for part in training.data.train.images[:IMAGES].split(images_per_evaluation(training)):
        with autocast(training):
            pixels = preprocess(part, training.preprocessing)
            parts.append(base.forward_head(base.forward_features(pixels), pre_logits=True))
    model.train(was_training)
    return torch.cat(parts).cpu().double()


def gradient_fidelity(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> GradientFidelity:
    """Compares the gradients of a trial's model with those of its twin."""
    layers = {}
    products = {name: _products(ours[name], theirs[name]) for name in ours}
    for name, product in products.items():
        cosine, ratio = _compare(product)
        layers[name] = {"cosine": _none_if_nan(cosine), "norm_ratio": _none_if_nan(ratio)}
    lora = [product for name, product in products.items() if ".lora_" in name]
    total = tuple(math.fsum(column) for column in zip(*lora, strict=True))
    return GradientFidelity(*_compare(cast(tuple[float, float, float], total)), layers)


def output_fidelity(ours: Tensor, theirs: Tensor, head: nn.Linear | None) -> OutputFidelity:
    """Compares features before any training, and what the pretrained ``head`` makes of them.

    The twin's adapters add exactly nothing to the pretrained model then, or what was taken of it.
    """
    cosine = float(cosine_similarity(ours, theirs, dim=-1).mean())
    cosine = 1.0 if torch.equal(ours, theirs) else cosine
    if head is None:
        return OutputFidelity(cosine, math.nan, math.nan)
    with torch.inference_mode():
        log_q, log_p = (log_softmax(head(f.float()).double(), dim=-1) for f in (ours, theirs))
    agreement = float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean())
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return OutputFidelity(cosine, agreement, divergence)


def _products(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """a.b, a.a and b.b, in double precision on the CPU (MPS has none)."""
    a, b = a.flatten().cpu().double(), b.flatten().cpu().double()
    return float(a @ b), float(a @ a), float(b @ b)


def _compare(products: tuple[float, float, float]) -> tuple[float, float]:
    """(cosine, norm ratio) from a.b, a.a and b.b.

    In IEEE arithmetic sqrt(x * x) is x, so equal vectors give exactly 1 and 1.
    """
    dot, ours, theirs = products
    if not ours * theirs > 0:
        return math.nan, math.nan
    return dot / math.sqrt(ours * theirs), math.sqrt(ours) / math.sqrt(theirs)


def _pretrained_head(training: Training, weights: Path | None) -> nn.Linear | None:
    """The classifier that came with the pretrained weights, on the CPU, if there is one."""
    config = training.config
    settings = timm.get_pretrained_cfg(config.model)
    classes = getattr(settings, "num_classes", 0) or 0
    if not config.pretrained or classes <= 0:
        return None
    try:
        with kept_random_states(torch.device("cpu")):
            model = load_base(config, classes, weights)
    except UserError:
        return None  # the file holds the features alone
    names = classifier_names(model)
    head = model.get_submodule(names[0]) if len(names) == 1 else None
    return head if isinstance(head, nn.Linear) else None


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
