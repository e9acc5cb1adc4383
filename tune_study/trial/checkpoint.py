"""Checkpoints: a folder per epoch under ``<study>/<trial_id>/checkpoints``, checked before use.

Each is written whole or not at all, and loading one runs no code: safetensors, JSON, and
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tune_study.folder.files import file_sha256, read_json, write_folder_whole

STATES_PER_CHECKPOINT = 4
"""The adapter now and at its best, and AdamW's two moments: four times the adapter's bytes."""

FORMAT = 1
FOLDER = "checkpoints"
KEPT = 2
"""The newest, and the one before should the newest not be whole."""
TENSORS = ("adapter", "best")
"""Adapter and head of the last epoch, and of the best one: a safetensors file each."""
BINARY = ("optimizer", "schedule", "generators", "monitor")
PLAIN = ("history", "layer_gradients", "best_epoch")
_FILES = (*(f"{name}.safetensors" for name in TENSORS), "training.pt")


def save(trial_folder: Path, state: dict[str, Any], extra: dict[str, Any]) -> Path:
    """Writes ``Training.state_dict()`` and ``extra`` (JSON), and returns the folder.

    Raises ``OSError`` and what torch and safetensors raise when it can't be written.
    """
    path = trial_folder / FOLDER / f"epoch-{len(state['history']):05d}"
    write_folder_whole(path, lambda folder: _write(folder, trial_folder.name, state, extra))
    return path


def _write(folder: Path, trial_id: str, state: dict[str, Any], extra: dict[str, Any]) -> None:
    for name in TENSORS:
        save_file(state[name], folder / f"{name}.safetensors")
    torch.save({name: state[name] for name in BINARY}, folder / "training.pt")
    plain = {
        "format": FORMAT,
        "trial_id": trial_id,
        "extra": extra,
        "state": {name: state[name] for name in PLAIN},
        "sha256": {name: file_sha256(folder / name) for name in _FILES},
    }
    # Python's JSON, in which a NaN stays one and every float returns to the bit.
    (folder / "state.json").write_text(json.dumps(plain, indent=1))


def prune(trial_folder: Path, keep: int = KEPT) -> None:
    """Removes all checkpoints but the ``keep`` newest."""
    for folder in candidates(trial_folder)[keep:]:
        shutil.rmtree(folder)
    if not keep:
        shutil.rmtree(trial_folder / FOLDER, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(``Training.state_dict()``, ``extra``) of a checkpoint that ``is_whole``."""
    plain = json.loads((folder / "state.json").read_text())
    state = plain["state"]
    state |= {name: load_file(folder / f"{name}.safetensors") for name in TENSORS}
    state |= torch.load(folder / "training.pt", weights_only=True, map_location="cpu")
    return state, plain["extra"]


def is_whole(folder: Path, trial_id: str) -> bool:
    """Whether every file of the checkpoint is there and is what was written."""
    plain = read_json(folder / "state.json")
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        return False
    state, digests = plain.get("state"), plain.get("sha256")
    return (
        plain.get("trial_id") == trial_id
        and isinstance(plain.get("extra"), dict)
        and isinstance(state, dict)
        and set(state) == set(PLAIN)
        and isinstance(digests, dict)
        and set(digests) == set(_FILES)
        and all(
            (folder / name).is_file() and file_sha256(folder / name) == digest
            for name, digest in digests.items()
        )
    )


def candidates(trial_folder: Path) -> list[Path]:
    """The trial's checkpoint folders, the newest first."""
    return sorted((trial_folder / FOLDER).glob("epoch-*"), reverse=True)


def newest(trial_folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the newer ones that are not whole."""
    broken: list[Path] = []
    for folder in candidates(trial_folder):
        if is_whole(folder, trial_folder.name):
            return folder, broken
        broken.append(folder)
    return None, broken
