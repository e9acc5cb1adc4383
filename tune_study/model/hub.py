"""Pretrained weights on the Hugging Face hub: the file in its cache, downloaded at most once."""

from __future__ import annotations

import contextlib
import errno
import shlex
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import timm
from timm.models import get_deprecated_models

from tune_study.errors import UserError, first_line

HUB = "hf-hub:"
FILES = ("model.safetensors", "pytorch_model.bin")
"""Of a model on the hub, in the order in which timm looks for them."""
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC)
OTHERWISE = "give --weights FILE_OR_DIR, or start from random weights with --set pretrained=false"


def refuse_unknown_model(name: str) -> None:
    """Raises ``UserError`` for a name that timm does not know, or knows under a newer name."""
    if name.startswith(HUB):
        hub_settings(name)
        return
    if current := get_deprecated_models().get(name):
        raise UserError(f"model = {name}: timm calls it {current} by now; name that one")
    if name.startswith("local-dir:"):
        raise UserError(f"model = {name}: name its architecture, and the folder with --weights")
    if "/" in name:
        raise UserError(f"model = {name}: write {HUB}{name} for a model of the hub's")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:1] or ["deit_tiny_patch16_224"]
        raise UserError(f"model = {name}: timm has no such model; try {close[0]}")


def hub_settings(name: str) -> dict[str, Any]:
    """The ``config.json`` of ``hf-hub:OWNER/NAME``. Raises ``UserError`` where timm can't use it.

    ``architecture`` is timm's name of the network.
    """
    from timm.models._hub import load_cfg_from_json

    path = fetched(name, name.removeprefix(HUB), ("config.json",), "or name a model of timm's own")
    try:
        settings = load_cfg_from_json(path)
    except ValueError as error:
        raise broken(name, path, first_line(error)) from None
    if not isinstance(settings, dict) or not timm.is_model(str(settings.get("architecture"))):
        raise UserError(
            f"model = {name}: its config.json names no architecture of timm's; choose a model that "
            "was made with timm"
        )
    return settings


def repository(model: str) -> str | None:
    """``OWNER/NAME`` on the hub; ``None`` when timm gets the weights in another way."""
    if model.startswith(HUB):
        return model.removeprefix(HUB)
    settings = timm.get_pretrained_cfg(model)
    if settings is None or settings.file or settings.custom_load == "hf":
        return None
    return settings.hf_hub_id or None


def downloaded(repo: str, files: tuple[str, ...] = FILES) -> Path | None:
    """The first of ``files`` that the cache has, without asking the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, revision = _at(repo)
    for file in files:
        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
    return None


def fetched(
    model: str, repo: str, files: tuple[str, ...] = FILES, otherwise: str = OTHERWISE
) -> Path:
    """The first of ``files`` that is in the cache or on the hub.

    Raises ``UserError``, whose remedy is the network or ``otherwise``.
    """
    from huggingface_hub import constants, errors, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    if (path := downloaded(repo, files)) is not None:
        return path
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"model = {model}: HF_HUB_OFFLINE is set, and {files[0]} of it is not in the cache "
            f"{shlex.quote(constants.HF_HUB_CACHE)}; unset it once, {otherwise}"
        )
    name, revision = _at(repo)
    try:
        # One look first: without a network the download itself would retry for a minute.
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(constants.ENDPOINT, timeout=20).close()
        for file in files:
            with contextlib.suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(name, file, revision=revision))
        raise UserError(f"model = {model}: the hub has no {' or '.join(files)} of it; {otherwise}")
    except (HfHubHTTPError, ValueError) as error:  # a name, or an HF_ENDPOINT, that cannot be
        raise UserError(
            f"model = {model}: the hub does not give {files[0]} of it "
            f"({type(error).__name__}); look whether it is there and open to you, {otherwise}"
        ) from None
    except (OSError, errors.HTTPError) as error:  # the hub's own HTTP library
        if getattr(error, "errno", None) in _UNWRITABLE:
            raise UserError(
                f"model = {model}: the hub's cache {shlex.quote(constants.HF_HUB_CACHE)} can't be "
                f"written ({first_line(error)}); set HF_HOME to a folder with room that can"
            ) from None
        raise UserError(
            f"model = {model}: {files[0]} of it could not be downloaded "
            f"({type(error).__name__}); connect to the network once, {otherwise}"
        ) from None


def broken(model: str, path: Path, why: str) -> UserError:
    """For a file of the hub's cache that is not what the hub has."""
    return UserError(
        f"model = {model}: its file in the hub's cache is not whole ({why}); remove it with "
        f"rm {shlex.quote(str(path))} and give the same command again: it is downloaded anew"
    )


def _at(repo: str) -> tuple[str, str | None]:
    """``OWNER/NAME@REVISION`` -> (``OWNER/NAME``, ``REVISION``)."""
    name, _, revision = repo.partition("@")
    return name, revision or None
