"""A Ray of our own on this machine. It starts while the command still imports torch."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import ray

from tune_study.errors import UserError, first_line
from tune_study.machine import environment
from tune_study.machine.environment import spared_from_collection

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
TRIAL_SLOT = "trial_slot"
"""What a trial takes of this Ray, instead of its CPUs."""
NEEDED = "tune_study.study.session"
"""What the command imports next: torch, timm, PEFT, bitsandbytes, Tune."""
PRELOADED = "tune_study.cluster.preloaded"
PRELOADED_TO_SIMULATE = "tune_study.cluster.trainable"


def start_during_imports(slots: int, *, dashboard: bool, simulated: bool = False) -> None:
    """As ``start``, beside the import of what the command needs next; nothing where it is there.

    In this order, because only the main thread may start Ray, which sets a signal's handler.
    """
    if NEEDED in sys.modules:
        return
    imports = threading.Thread(target=importlib.import_module, args=[NEEDED], name="imports")
    with spared_from_collection():
        imports.start()
        try:
            start(slots, dashboard=dashboard, simulated=simulated)
        finally:
            imports.join()


def start(slots: int, *, dashboard: bool, simulated: bool = False) -> None:
    """Starts Ray with room for ``slots`` trials at a time, unless it has been started.

    How many threads a trial uses is its own matter. Ray starts as many workers as it has CPUs, and
    ends those that are idle when the CPUs are taken: so it has one for each slot, and trials take
    none. Workers import what they need at once; for ``simulated`` trials that is no torch. Raises
    ``UserError``.
    """
    if ray.is_initialized():
        return
    refuse_unusable_folder()
    lend_token()
    if simulated or one_gpu_at_most(Path("/dev")):
        preloaded = PRELOADED_TO_SIMULATE if simulated else PRELOADED
        os.environ.setdefault("RAY_preload_python_modules", preloaded)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address="local",
            num_cpus=slots,
            resources={TRIAL_SLOT: slots},
            include_dashboard=dashboard,
            **QUIET,
        )
    except Exception as error:  # a bare one, where a process of Ray's did not answer in time
        ray.shutdown()
        raise UserError(
            f"Ray did not start on this machine ({first_line(error)[:200]}); give the same "
            "command again, when less else is running"
        ) from error
    # Ray's own would end the command with a stack trace of its C++.
    signal.signal(signal.SIGTERM, on_sigterm)


def refuse_unusable_folder() -> None:
    """Raises ``UserError`` where Ray's sockets have no room in their names, or can't be made."""
    variable, folder = environment.ray_folder()
    if not folder.is_absolute():  # Ray's processes work elsewhere
        folder = folder.absolute()
        os.environ["RAY_TMPDIR"] = str(folder)
    set_it = "set RAY_TMPDIR to a short folder that can be written, such as /tmp"
    socket = f"{folder}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    longest = 103 if sys.platform == "darwin" else 107  # of a Unix socket's address
    if (excess := len(os.fsencode(socket)) - longest) > 0 and sys.platform != "win32":
        raise UserError(
            f"{variable}={folder}: Ray's sockets lie there, and its name is {excess} bytes too "
            f"long for them; {set_it}"
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        usable = os.access(folder / "ray", os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        raise UserError(f"{variable}={folder}: Ray's files can't be written there; {set_it}")


def lend_token() -> None:
    """Ray's processes know each other by a token in the home; where none can be kept, by another.

    Of the environment alone, and for as long as the command runs.
    """
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(exist_ok=True)
        kept = (folder / "auth_token").is_file() or os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # no home at all is a RuntimeError
        kept = False
    if not kept:
        os.environ["RAY_AUTH_TOKEN"] = uuid.uuid4().hex


def one_gpu_at_most(devices: Path) -> bool:
    """Whether no worker has to be told which GPU is its own before it imports bitsandbytes.

    That import looks at the GPUs, and afterwards CUDA_VISIBLE_DEVICES is not read again. ROCm and
    WSL do not tell their count here.
    """
    untold = any((devices / name).exists() for name in ("kfd", "dxg"))
    return not untold and len(list(devices.glob("nvidia[0-9]*"))) <= 1
