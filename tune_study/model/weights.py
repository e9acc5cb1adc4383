"""The base model with its pretrained weights, and the proof that all of them are in it."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor, nn

from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line
from tune_study.model import (
    backbone,  # noqa: F401  (registers the demo's backbone with timm)
    hub,
)
from tune_study.model.hub import refuse_unknown_model

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class Fit(NamedTuple):
    """What of a weights file is not in the model as the file holds it, by tensor names."""

    left_out: tuple[str, ...] = ()
    """Of the file, for which the model has no place."""
    resampled: tuple[str, ...] = ()
    """In the model at another size than in the file."""
    missing: tuple[str, ...] = ()
    """Of the model, which a file of the hub's does not hold: they keep their initial values."""


def load_base(config: TrialConfig, num_classes: int, weights: Path | None = None) -> nn.Module:
    """The timm model at full precision on the CPU, with a new head of ``num_classes``.

    Raises ``UserError`` as ``build_model``.
    """
    return load_fitted(config, num_classes, weights)[0]


def load_fitted(
    config: TrialConfig, num_classes: int, weights: Path | None = None
) -> tuple[nn.Module, Fit]:
    """As ``load_base``, and what of the weights did not fit as it was."""
    refuse_unknown_model(config.model)
    options: dict[str, Any] = {"num_classes": num_classes}
    if config.data.image_size is not None:
        options["img_size"] = config.data.image_size
    if not config.pretrained:
        return _create(config, options), Fit()
    options["pretrained"] = True
    path = weights_file(config.model, weights) if weights else pretrained_file(config.model)
    if path is None:
        return _create(config, options), Fit()
    state = _read_state(path) if weights else _read_hub_state(config.model, path)
    # Not checkpoint_path=: that would not resample the position embedding for another image size.
    overlay: dict[str, Any] = {
        "state_dict": dict(state),
        "hf_hub_id": None,
        "url": "",
        "file": None,
        "source": "",
    }
    origin = f"--weights {path}" if weights else f"model = {config.model}"
    with _handed_over() as handed:
        model = _create(config, {**options, "pretrained_cfg_overlay": overlay}, origin)
    cast(dict[str, Any], model.pretrained_cfg).pop("state_dict", None)
    given = next((tensors for module, tensors in handed if module is model), None)
    if given is None:
        raise UserError(
            f"{origin}: {config.model} loads no weights when it is asked for pretrained ones; hand "
            "pretrained and the other options of its function to timm's build_model_with_cfg, or "
            "add --set pretrained=false"
        )
    missing = _prove_loaded(model, given, origin, whole=weights is not None)
    left_out, resampled = _unlike(model, state, given)
    if config.data.image_size is not None:  # then other positions are what was asked for
        resampled = [name for name in resampled if "patch_embed" in name]
    return model, Fit(tuple(left_out), tuple(resampled), tuple(missing))


def refuse_misfit(fit: Fit, model: str, weights: Path | None) -> None:
    """Raises ``UserError`` where another network would be trained than the weights are of."""
    origin = f"--weights {weights}" if weights else f"model = {model}"
    wrong = []
    if fit.left_out:
        wrong.append(f"{model} has no place for {listed(fit.left_out)} of the file")
    if fit.missing:
        wrong.append(f"the file does not hold {listed(fit.missing)}")
    if fit.resampled and weights:  # on the hub that is timm's own way of making this model
        wrong.append(f"the file has {listed(fit.resampled)} at another size")
    if wrong:
        raise UserError(
            f"{origin}: {' and '.join(wrong)}; name the model (and data.image_size) that they are "
            "of, or add --adapt-weights to train without what does not fit, which study.json "
            "records"
        )


def listed(names: Iterable[str], most: int = 6, of: str = "tensor") -> str:
    """``24 tensors (blocks.*.ls1.gamma, blocks.*.ls2.gamma)``."""
    names = list(names)
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    more = f", and {len(kinds) - most} more kinds" if len(kinds) > most else ""
    return f"{len(names)} {of}{'s' if len(names) > 1 else ''} ({', '.join(kinds[:most])}{more})"


def weights_are_here(model: str) -> bool:
    """Whether timm's pretrained weights of ``model`` lie on this machine already."""
    if (shipped := _shipped(model)) is not None:
        return shipped.is_file()
    repo = hub.repository(model)
    return repo is not None and hub.downloaded(repo) is not None


def hub_weights(model: str) -> Path | None:
    """timm's pretrained weights of ``model`` as a file, downloaded at most once.

    ``None`` when timm gets them in another way (its own file, a plain address). Raises
    ``UserError`` when they are neither in the cache nor to be had from the network.
    """
    repo = hub.repository(model)
    return None if repo is None else hub.fetched(model, repo)


def pretrained_file(model: str) -> Path | None:
    """As ``hub_weights``, or the file that a package ships."""
    return _shipped(model) or hub_weights(model)


def _shipped(model: str) -> Path | None:
    settings = timm.get_pretrained_cfg(model)
    if settings is None or not settings.file or settings.custom_load:
        return None
    return Path(settings.file)


@contextmanager
def _handed_over() -> Iterator[list[tuple[nn.Module, dict[str, Tensor]]]]:
    """Every (module, tensors) that ``load_state_dict`` gets meanwhile.

    timm's filters rename, resample and leave out tensors of a file, and what the model then has no
    place for is passed over: nothing that timm returns tells.
    """
    original, seen = nn.Module.load_state_dict, []

    def noting(module: nn.Module, state: Mapping[str, Any], *given: Any, **options: Any) -> Any:
        seen.append((module, dict(state)))
        return original(module, state, *given, **options)

    # What it says of tensors without a place, one line of hundreds of names, we say ourselves.
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    nn.Module.load_state_dict = noting  # type: ignore[assignment]
    try:
        yield seen
    finally:
        logger.setLevel(level)
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _create(config: TrialConfig, options: dict[str, Any], weights: str = "") -> nn.Module:
    """Raises ``UserError``, where there are ``weights`` (in words) about them."""
    try:
        return timm.create_model(config.model, **options)
    except (
        RuntimeError, TypeError, AssertionError, ValueError, KeyError, OSError, EOFError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        if "No pretrained weights" in detail or isinstance(error, OSError):
            detail += f"; or {hub.OTHERWISE}"
        if weights.startswith("--weights"):
            raise UserError(
                f"{weights}: they do not fit the model {config.model}: {detail}"
            ) from None
        raise UserError(f"model = {config.model}: timm cannot build it so: {detail}") from None


def weights_file(model: str, weights: Path) -> Path:
    """``weights`` itself, or ``<model>.safetensors`` (``.pth``, ``.pt``, ``.bin``) in that folder.

    Raises ``UserError`` when there is none.
    """
    if weights.is_file():
        return weights
    if not weights.is_dir():
        raise UserError(f"--weights {weights}: there is no such file or folder")
    name = model.rpartition("/")[2]
    for suffix in SUFFIXES:
        if (path := weights / f"{name}{suffix}").is_file():
            return path
    raise UserError(f"--weights {weights}: no {name}.safetensors in it (nor .pth, .pt, .bin)")


class _Unreadable(Exception):
    """Of a weights file, as a clause."""


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        return _tensors(path)
    except _Unreadable as why:
        raise UserError(
            f"--weights {path}: not a readable safetensors file or weights_only checkpoint "
            f"({why}); fetch it again, or save it with "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from None


def _read_hub_state(model: str, path: Path) -> dict[str, Tensor]:
    try:
        return _tensors(path)
    except _Unreadable as why:
        raise hub.broken(model, path, str(why)) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name. Raises ``_Unreadable``."""
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    try:
        with path.open("rb") as file:
            beginning = file.read(64)
        if beginning.startswith(b"version https://git-lfs"):
            raise _Unreadable("a pointer of git-lfs and not the file itself: git lfs pull gets it")
        if beginning.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            raise _Unreadable("a web page and not weights")
        # weights_only: a checkpoint from a stranger must not run code.
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except (
        OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError,
        AttributeError, TypeError, KeyError, IndexError,
    ) as error:  # fmt: skip
        raise _Unreadable(first_line(error)[:200].rstrip(".")) from None
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not state:
        raise _Unreadable("it holds no tensors by name")
    return state


def _prove_loaded(
    model: nn.Module, given: Mapping[str, Tensor], origin: str, *, whole: bool = True
) -> list[str]:
    """Every tensor but the head must be a given one; timm alone would leave gaps at random.

    Returns the names of those that are not given, which ``whole`` refuses. Raises ``UserError``.
    """
    expected = {n: t for n, t in model.state_dict().items() if not _in_head(model, n)}
    missing = [name for name in expected if name not in given]
    if missing and (whole or len(missing) == len(expected)):
        raise UserError(
            f"{origin}: they do not fit the model: {len(missing)} of its {len(expected)} "
            f"tensors are not in the file, the first is {missing[0]}"
        )
    for name, tensor in expected.items():
        if name in given and not torch.equal(tensor, given[name].to(tensor.dtype)):
            raise UserError(f"{origin}: {name} of the model is not what the file holds")
    return missing


def _unlike(
    model: nn.Module, state: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """(names that the model has no place for, names of another size than in the file)."""
    places = model.state_dict()
    left_out = [name for name in given if name not in places and not _in_head(model, name)]
    resampled = [
        name
        for name, tensor in given.items()
        if name in places
        and (in_file := _of_file(name, state)) is not None
        and in_file.numel() != tensor.numel()
        and not _in_head(model, name)
    ]
    return left_out, resampled


def _of_file(name: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """The file may have a prefix before the name."""
    if name in state:
        return state[name]
    return next((tensor for full, tensor in state.items() if full.endswith(f".{name}")), None)


def _in_head(model: nn.Module, name: str) -> bool:
    return any(name.startswith(f"{head}.") for head in classifier_names(model))


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that make the class scores, ``["head"]`` for a ViT."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return [names] if isinstance(names, str) else list(names)
