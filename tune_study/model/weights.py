"""Where pretrained weights come from, and the proof that they are in the model."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line
from tune_study.model import backbone  # noqa: F401  (registers the demo's backbone with timm)


def refuse_unknown_model(name: str) -> None:
    """Raises ``UserError`` for a name that timm does not know."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:1] or ["deit_tiny_patch16_224"]
        raise UserError(f"model = {name}: timm has no such model; try {close[0]}")


def load_base(config: TrialConfig, num_classes: int, weights: Path | None = None) -> nn.Module:
    """The timm model at full precision on the CPU, with a new head of ``num_classes``.

    Raises ``UserError`` as ``build_model``.
    """
    refuse_unknown_model(config.model)
    options: dict[str, Any] = {"num_classes": num_classes}
    if config.data.image_size is not None:
        options["img_size"] = config.data.image_size
    if not config.pretrained:
        return _create(config, options)
    options["pretrained"] = True
    if weights is None:
        path = hub_weights(config.model)
        local = {"file": str(path), "hf_hub_id": None, "url": ""} if path else {}
        return _create(config, {**options, "pretrained_cfg_overlay": local})
    path = weights_file(config.model, weights)
    state = _read_state(path)
    # Not checkpoint_path=: that would not resample the position embedding for another image size.
    overlay: dict[str, Any] = {
        "state_dict": dict(state),
        "hf_hub_id": None,
        "url": "",
        "file": None,
    }
    model = _create(config, {**options, "pretrained_cfg_overlay": overlay})
    cast(dict[str, Any], model.pretrained_cfg).pop("state_dict", None)
    _prove_loaded(model, state, path)
    return model


def hub_weights(model: str) -> Path | None:
    """timm's pretrained weights of ``model`` as a file, downloaded at most once.

    ``None`` when timm gets them in another way (its own file, an ``.npz``, a plain address).
    Raises ``UserError`` when they are neither in the cache nor to be had from the network.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    settings = timm.get_pretrained_cfg(model)
    if settings is None or settings.file or settings.custom_load or not settings.hf_hub_id:
        return None
    repo, file = settings.hf_hub_id, "model.safetensors"
    try:
        return Path(hf_hub_download(repo, file, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache yet
    try:
        # One look first: without a network the download itself would retry for a minute.
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(constants.ENDPOINT, timeout=20).close()
        return Path(hf_hub_download(repo, file))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model = {model}: its pretrained weights could not be downloaded "
            f"({type(error).__name__}); connect to the network once, give --weights FILE_OR_DIR, "
            "or start from random weights with --set pretrained=false"
        ) from None


def _create(config: TrialConfig, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(config.model, **options)
    except (RuntimeError, TypeError, AssertionError) as error:
        detail = " ".join(str(error).split())[:300]
        if "No pretrained weights" in detail:
            detail += "; or give --weights FILE_OR_DIR"
        raise UserError(f"model = {config.model}: timm cannot build it so: {detail}") from None


def weights_file(model: str, weights: Path) -> Path:
    """``weights`` itself, or ``<model>.safetensors`` (``.pth``, ``.pt``, ``.bin``) in that folder.

    Raises ``UserError`` when there is none.
    """
    if weights.is_file():
        return weights
    if not weights.is_dir():
        raise UserError(f"--weights {weights}: there is no such file or folder")
    for suffix in (".safetensors", ".pth", ".pt", ".bin"):
        if (path := weights / f"{model}{suffix}").is_file():
            return path
    raise UserError(f"--weights {weights}: no {model}.safetensors in it (nor .pth, .pt, .bin)")


def _read_state(path: Path) -> dict[str, Tensor]:
    import pickle

    from safetensors import SafetensorError
    from timm.models import load_state_dict

    try:
        # weights_only: a checkpoint from a stranger must not run code.
        return load_state_dict(str(path), device="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"--weights {path}: not a readable safetensors file or weights_only checkpoint "
            f"({first_line(error)[:200]}); save it with "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from None


def _prove_loaded(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Every tensor but the head must be the file's; timm alone would leave gaps at random."""
    heads = classifier_names(model)
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{head}.") for head in heads)
    }
    missing = [name for name in expected if name not in state]
    if missing:
        raise UserError(
            f"--weights {path}: they do not fit the model: {len(missing)} of its {len(expected)} "
            f"tensors are not in the file, the first is {missing[0]}"
        )
    for name, tensor in expected.items():
        # The position embedding of another image size is resampled, everything else is equal.
        if state[name].shape == tensor.shape and not torch.equal(
            tensor, state[name].to(tensor.dtype)
        ):
            raise UserError(f"--weights {path}: {name} of the model is not what the file holds")


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that make the class scores, ``["head"]`` for a ViT."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return [names] if isinstance(names, str) else list(names)
