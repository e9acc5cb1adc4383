"""Looks at everything that the planned trials need, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from tune_study.config import TrialConfig
from tune_study.data.names import DECODED, is_bucket
from tune_study.data.place import Preprocessing
from tune_study.data.sources import CIFAR_CLASSES
from tune_study.data.splits import Outline, load, outline
from tune_study.data.transform import transform_of, try_out
from tune_study.errors import UserError
from tune_study.folder.files import file_sha256
from tune_study.memory.estimate import refuse_any_that_cannot_fit
from tune_study.model.build import build_model, preprocessing
from tune_study.model.layers import block_linears, plan_layers, refuse_without_effect, skeleton_of
from tune_study.model.quantize import check_kernel
from tune_study.model.weights import (
    Fit,
    load_fitted,
    pretrained_file,
    refuse_misfit,
    weights_are_here,
    weights_file,
)
from tune_study.trial.context import RunContext
from tune_study.trial.graph import refuse_graph
from tune_study.trial.micro_batch import within_memory


class Checked(NamedTuple):
    """What ``check`` found out about the inputs of the planned trials."""

    data: dict[str, Outline]
    """By trial id; trials that see the same images share one."""
    checksums: dict[str, Any]
    not_here: Mapping[str, Sequence[str]] = {}
    """The data sets ("images") and models ("weights") that a dry run did not look at."""

    @property
    def told(self) -> list[str]:
        """Of every folder or table of images one line: what was found, passed over and split."""
        return list(dict.fromkeys(seen.told for seen in self.data.values() if seen.told))


def check(
    trials: Sequence[TrialConfig],
    context: RunContext,
    *,
    auto_batch: bool = False,
    adapt_weights: bool = False,
    dry: bool = False,
) -> Checked:
    """Looks at every input before anything is written: data, models, weights, kernels.

    Raises ``UserError`` for the first that is missing or does not fit. With ``auto_batch`` it is
    enough that a step fits with micro-batches of one image. With ``adapt_weights`` tensors of a
    weights file may be left out or resampled: the checksums name them. A ``dry`` look downloads and
    writes nothing: what is not on this machine is left out of it.
    """
    if context.simulation is not None:
        for trial in trials:
            skeleton_of(trial.model, 10, trial.data.image_size)
        return Checked({}, {"data": {}, "weights": {}})
    for trial in trials:
        refuse_graph(trial, context.device)
        transform_of(trial, context.code)  # there is such a function
    data: dict[str, Outline] = {}
    seen: dict[str, Outline] = {}
    sha256: dict[str, Any] = {"data": {}, "weights": {}}
    models: set[str] = set()
    bases: dict[str, Fit] = {}
    not_here: dict[str, dict[str, None]] = {"images": {}, "weights": {}}
    for trial in trials:
        how = preprocessing(trial)
        key = f"{trial.dataset} {trial.data.model_dump_json()} {how}"
        if key not in seen:
            seen[key], found = _look_at_images(trial, how, context, dry=dry)
            sha256["data"].update(found)
            known = seen[key].is_known and trial.dataset.startswith(DECODED)
            if not found and (not known or is_bucket(trial.dataset)):
                not_here["images"][trial.dataset] = None
        data[trial.trial_id] = seen[key]
        classes = seen[key].classes
        key = f"{trial.model} {classes} {trial.data.image_size} {trial.quantization} {trial.lora}"
        if key not in models:
            models.add(key)
            _check_model(trial, classes, context)
        if dry and trial.pretrained and not context.weights and not weights_are_here(trial.model):
            not_here["weights"][trial.model] = None
            continue
        key = f"{trial.model} {classes} {trial.data.image_size} {trial.pretrained}"
        if key not in bases:
            bases[key] = load_fitted(trial, classes, context.weights)[1]
            if not adapt_weights:
                refuse_misfit(bases[key], trial.model, context.weights)
        entry = sha256["weights"].get(trial.model)
        if entry is None:  # a large file is read once, not once a trial
            entry = sha256["weights"][trial.model] = _weights_sha256(trial, context)
        for kind, names in bases[key]._asdict().items():
            if names:
                entry[kind] = list(dict.fromkeys([*entry.get(kind, []), *names]))
    planned = []
    for trial in trials:
        folder = context.study_dir / trial.trial_id
        least = trial.with_micro_batch(1) if auto_batch else within_memory(trial, folder)
        planned.append((least, data[trial.trial_id].classes))
    refuse_any_that_cannot_fit(planned, torch.device(context.device))
    return Checked(data, sha256, {kind: list(names) for kind, names in not_here.items()})


def _look_at_images(
    trial: TrialConfig, how: Preprocessing, context: RunContext, *, dry: bool
) -> tuple[Outline, dict[str, dict[str, Any]]]:
    """(how much there is, what study.json keeps of it: nothing where it was not all read)."""
    downloaded = trial.dataset in CIFAR_CLASSES and context.data_dir is None
    if dry and (downloaded or trial.dataset.startswith(DECODED)):
        return outline(trial.dataset, context.place, trial.data, how), {}
    images = load(trial.dataset, context.place, trial.data, how)
    try_out(trial, context.code, images.train.images[:2])
    seen = images.outline
    kept: dict[str, Any] = {"sha256": images.sha256}
    if seen.told:
        kept |= {"images": seen.told, "left_out": list(seen.left_out)}
    return seen, {trial.data_name: kept}


def _check_model(trial: TrialConfig, num_classes: int, context: RunContext) -> None:
    skeleton = skeleton_of(trial.model, num_classes, trial.data.image_size)
    refuse_without_effect(skeleton, trial)
    linears = block_linears(skeleton)
    for name, mode in plan_layers(skeleton, trial.quantization).items():
        check_kernel(mode, linears[name].in_features, context.device)
    _refuse_untold_weights(trial, context)


def _refuse_untold_weights(trial: TrialConfig, context: RunContext) -> None:
    """A function of the user's may pass over ``pretrained``, and nothing would tell."""
    code, known = context.code, timm.get_pretrained_cfg(trial.model)
    told = context.weights is not None or (known is not None and known.has_weights)
    if trial.pretrained and code and trial.model in code.models and not told:
        raise UserError(
            f"model = {trial.model}: {code.file} names no pretrained weights for it in its "
            "default_cfgs; give --weights FILE, or start from random ones with --set "
            "pretrained=false"
        )


def _weights_sha256(trial: TrialConfig, context: RunContext) -> dict[str, Any]:
    if not trial.pretrained:
        return {"pretrained": False, "sha256": None}
    if context.weights is not None:
        path: Path | None = weights_file(trial.model, context.weights)
    else:
        path = pretrained_file(trial.model)
    return {
        "pretrained": True,
        "file": path.name if path else None,
        "sha256": file_sha256(path) if path else None,
    }


def validate(trials: Sequence[TrialConfig], checked: Checked, context: RunContext) -> None:
    """Builds every distinct model of the plan, with all the proofs. Raises ``UserError``."""
    seen: set[str] = set()
    for trial in trials:
        classes = checked.data[trial.trial_id].classes
        key = f"{trial.model} {classes} {trial.lora} {trial.quantization} {trial.data.image_size}"
        if key not in seen:
            seen.add(key)
            build_model(trial, classes, weights=context.weights, device=context.device)
