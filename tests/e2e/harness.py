"""Studies as a user starts them, killed as a machine kills them, and compared to the last bit."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tune_study.machine import resources

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
PATIENCE_S = 900
"""A study that does nothing for so long is stuck."""
TIMES = ["train_time_s", "eval_time_s", "images_per_s", "epoch_time_s", "rss_peak_bytes"]
TIMES += ["train_energy_j", "energy_source", "trials_on_device"]
TIMES += resources.COLUMNS
TARGETS = ("driver", "worker", "raylet", "everything", "power")
"""What dies by SIGKILL. ``power`` is everything, and the files written last lose their end."""


def start(output_dir: Path, *arguments: object, grid: str | None = "smoke") -> subprocess.Popen:
    """The study's command in a session of its own, its output in ``<output_dir>/output.txt``.

    ``grid=None`` is for a search, whose options are among the ``arguments``.
    """
    return start_anywhere(output_dir, "--output-dir", output_dir, *arguments, grid=grid)


def start_anywhere(
    folder: Path, *arguments: object, grid: str | None = "smoke"
) -> subprocess.Popen:
    """As ``start``, with the output in ``folder`` and the study wherever the command puts it.

    On the CPU, unless the ``arguments`` name a device: a test must not find one by chance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tune_study.run"]
    command += [] if grid is None else ["--grid", grid]
    command += [] if "--device" in arguments else ["--device", "cpu"]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [str(part) for part in (*command, *arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )


def finish(
    process: subprocess.Popen, folder: Path, timeout_s: float = PATIENCE_S
) -> tuple[int, str]:
    """(exit code, output). Raises ``AssertionError`` with what a study that is stuck was doing."""
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it never ends:\n{stuck(process, folder)}") from None
    return code, said(folder)


def said(folder: Path) -> str:
    """The output of the study that was started last."""
    return (folder / "output.txt").read_text()


def wait_for(
    process: subprocess.Popen,
    folder: Path,
    text: str,
    times: int = 1,
    timeout_s: float = PATIENCE_S,
) -> None:
    """Until the study has printed ``text`` so often. Raises as ``wait_until``."""
    wait_until(process, folder, lambda: said(folder).count(text) >= times, text, timeout_s)


def wait_until(
    process: subprocess.Popen,
    folder: Path,
    condition: Callable[[], bool],
    what: str,
    timeout_s: float = PATIENCE_S,
) -> None:
    """Raises ``AssertionError`` where the study ends before, or is stuck."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"it ended before {what}:\n{said(folder)}"
        assert time.monotonic() < end, f"it waits for {what}:\n{stuck(process, folder)}"
        time.sleep(0.05)


def stuck(process: subprocess.Popen, folder: Path) -> str:
    """Kills a study that does not go on: its output, and where each thread of its command was."""
    others = descendants(process)
    names = ", ".join(sorted(map(name_of, others)))
    process.send_signal(signal.SIGABRT)  # Python's fault handler prints the stacks
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
    process.kill()
    _kill_all(others)
    return f"{said(folder)}\nits processes: {names}"


def descendants(process: subprocess.Popen, name: str = "") -> list[psutil.Process]:
    """Living processes below it whose name begins so: ``raylet``, ``ray::`` (workers)."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if name_of(child).startswith(name)]


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def kill(process: subprocess.Popen, target: str) -> bool:
    """SIGKILL for ``target``; ``False`` when there is none at this moment.

    Of the command's own end, where it is among them, this waits.
    """
    command = target in ("driver", "everything", "power")
    names = {"worker": "ray::ImplicitFunc", "raylet": "raylet"}
    victims = [] if target == "driver" else descendants(process, names.get(target, ""))
    if command:
        process.kill()
    _kill_all(victims)
    if command:
        process.wait()
    return command or bool(victims)


def _kill_all(victims: list[psutil.Process]) -> None:
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # it went first
            victim.kill()


def cut_power(study_dir: Path, rng: random.Random, most: int = 3) -> list[str]:
    """Truncates up to ``most`` of the files written last, anywhere; returns their names."""
    files = [path for path in study_dir.rglob("*") if path.is_file() and path.stat().st_size]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in files[:most]:
        with path.open("rb+") as file:
            file.truncate(rng.randrange(path.stat().st_size))
    return [str(path.relative_to(study_dir)) for path in files[:most]]


def interrupt(process: subprocess.Popen, number: int = signal.SIGINT) -> None:
    """As a terminal does it: the whole process group gets the signal."""
    os.killpg(process.pid, number)


def compare(study_dir: Path, expected: Path) -> None:
    """Raises ``AssertionError`` unless both tables are equal to the bit, times and RSS excepted."""
    for table in ("trials", "epochs"):
        ours, theirs = (pd.read_parquet(f / f"{table}.parquet") for f in (study_dir, expected))
        drop = [name for name in TIMES if name in ours]
        pd.testing.assert_frame_equal(
            ours.drop(columns=drop), theirs.drop(columns=drop), check_exact=True
        )
    for trial_id in pd.read_parquet(study_dir / "trials.parquet")["trial_id"]:
        ours, theirs = (
            (folder / trial_id / "adapter" / "adapter_model.safetensors").read_bytes()
            for folder in (study_dir, expected)
        )
        assert ours == theirs, f"the adapters of {trial_id} differ"


def no_epoch_twice(study_dir: Path) -> None:
    """In ``result.json`` of every run, and in TensorBoard's events. Raises ``AssertionError``."""
    for path in study_dir.glob("run-*/*/result.json"):
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # the last line of a killed run may be half
        epochs = [json.loads(line)["epoch"] for line in whole.splitlines()]
        assert epochs == list(range(1, len(epochs) + 1)), f"{path}: {epochs}"
    epochs = pd.read_parquet(study_dir / "epochs.parquet").groupby("trial_id")["epoch"]
    for trial_id, rows in epochs:
        events = EventAccumulator(str(study_dir / "tensorboard" / str(trial_id)))
        events.Reload()
        points = [point.step for point in events.Scalars("loss/train")]
        assert points == list(rows), f"TensorBoard shows epochs {points} of {trial_id}"
