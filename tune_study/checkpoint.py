"""Checkpoints: written by us, carried by Tune, checked before they are believed.

Loading one runs no code: safetensors, JSON, and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tune_study.files import read_json, write_whole
from tune_study.model import file_sha256

FORMAT = 1
TENSORS = ("adapter", "best")
"""Adapter and head of the last epoch, and of the best one: a safetensors file each."""
BINARY = ("optimizer", "schedule", "generators", "monitor")
PLAIN = ("history", "layer_gradients", "best_epoch")
_FILES = (*(f"{name}.safetensors" for name in TENSORS), "training.pt")


def save(folder: Path, trial_id: str, state: dict[str, Any], extra: dict[str, Any]) -> None:
    """Writes ``Training.state_dict()`` and ``extra`` (JSON) into ``folder``.

    ``state.json`` comes last and holds the checksum of the others: without it there is no
    checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
    text = json.dumps(plain, indent=1)
    write_whole(folder / "state.json", lambda temporary: temporary.write_text(text))


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


def epochs_in(folder: Path) -> int:
    plain: Any = read_json(folder / "state.json")
    try:
        return len(plain["state"]["history"])
    except (TypeError, KeyError):  # no state.json of ours, which is_whole says
        return 0


def candidates(study_dir: Path, trial_id: str) -> Iterator[Path]:
    """The trial's checkpoint folders in all runs of the study, the most epochs first."""
    folders = study_dir.glob(f"run-*/{trial_id}/checkpoint_*")
    return iter(sorted(folders, key=lambda folder: (epochs_in(folder), folder), reverse=True))


def newest(study_dir: Path, trial_id: str) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the newer ones that are not whole."""
    broken: list[Path] = []
    for folder in candidates(study_dir, trial_id):
        if is_whole(folder, trial_id):
            return folder, broken
        broken.append(folder)
    return None, broken
