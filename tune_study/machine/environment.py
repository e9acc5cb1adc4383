"""Settings that Ray and torch read while they are imported: this comes before either of them."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SETTINGS = {
    # Nothing listens beyond this machine, on any system: Ray itself would do so only on a Mac.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Tune waits for a tracker that does not answer: seconds, where MLflow would try for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    # A relative folder:PATH is found from where the command was typed, not from Tune's folders.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    # It would abort the whole study; a trial that runs out of memory is handled by itself.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "KINETO_LOG_LEVEL": "99",
    # Every trial of a worker runs in a thread of its own: with an arena of memory for each, the
    # worker of a long study grew from 1.5 to 3 GB.
    "MALLOC_ARENA_MAX": "2",
    # Threads that wait for work by turning are fast on an idle machine, and slow beside a busy
    # process; sleeping ones are the other way round. GNU's OpenMP, torch's on Linux, turns (its own
    # count), others sleep; a user's OMP_WAIT_POLICY decides for both (measured: docs/log.md).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "300000",
}
MACOS_SETTINGS = {
    # bitsandbytes compiles its dequantization for MPS, 0.5 to 2.7 s for every shape of a layer, and
    # computes eagerly after all.
    "TORCH_COMPILE_DISABLE": "1",
}
set_by_prepare: set[str] = set()
"""The variables that the user had not set."""


def clustered(arguments: Sequence[str]) -> bool:
    """Whether ``--address`` names a Ray whose head is reached over a network.

    With the setting for clusters, Ray takes loopback for the machine's network address, and finds
    no head that listens on loopback alone.
    """
    pairs = itertools.pairwise([*arguments, ""])
    given = [value for option, value in pairs if option == "--address"]
    given += [a.partition("=")[2] for a in arguments if a.startswith("--address=")]
    address = given[-1] if given else "local"
    if address == "auto":
        running = ray_folder()[1] / "ray" / "ray_current_cluster"
        address = os.environ.get("RAY_ADDRESS") or (
            running.read_text().strip() if running.is_file() else "local"
        )
    return not re.match(r"local$|localhost:|127\.|\[::1\]", address)


def ray_folder() -> tuple[str, Path]:
    """(the variable that decides, the folder) where Ray keeps its files and its address.

    Ray's own ``get_default_system_temp_dir``, which cannot be imported before the settings are
    made: on a Mac it is not the temporary folder of the system.
    """
    if folder := os.environ.get("RAY_TMPDIR"):
        return "RAY_TMPDIR", Path(folder)
    if sys.platform.startswith("linux") and "TMPDIR" in os.environ:
        return "TMPDIR", Path(os.environ["TMPDIR"])
    unix = sys.platform.startswith(("linux", "darwin"))
    return "RAY_TMPDIR", Path("/tmp" if unix else tempfile.gettempdir())


def prepare() -> None:
    """No telemetry, no open port, no chatter. What the user has set stays."""
    if clustered(sys.argv):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    chosen = "OMP_WAIT_POLICY" in os.environ  # a count would outvote it
    settings = SETTINGS | (MACOS_SETTINGS if sys.platform == "darwin" else {})
    for name, value in settings.items():
        if name not in os.environ and not (chosen and name == "GOMP_SPINCOUNT"):
            os.environ[name] = value
            set_by_prepare.add(name)
    # At import it names a faster kernel of a package that is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def spared_from_collection() -> Iterator[None]:
    """What is imported here stays for good, so that nothing looks through it for garbage.

    Neither meanwhile, which takes a sixth of the import of torch, timm, PEFT and bitsandbytes, nor
    in any later collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@cache
def spare_imports_from_collection() -> None:
    """What is imported stays for good: collecting garbage need not look at it again, trial by
    trial, which took 0.4 s of 0.5 s. For workers that did not preload (``preloaded.py``): on a
    cluster, and beside several GPUs.
    """
    gc.collect()
    gc.freeze()
