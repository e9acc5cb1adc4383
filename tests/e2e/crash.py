"""Kills the smoke study at random moments until it completes, again and again, and compares.

    python -m tests.e2e.crash --kills 25 --seed 1 [--device cuda]

Each run starts the study, kills a part of it (``harness.TARGETS``) at a seeded moment, starts the
same command again, and may be killed again. When the study has completed, its tables and adapters
must equal those of an uninterrupted one to the last bit. A line per run; exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from tests.e2e import harness

ANOTHER_KILL = 0.25
"""Probability of a further kill after each one."""


def uninterrupted(folder: Path, *arguments: str) -> float:
    """Seconds that the whole study takes, its command with ``arguments``."""
    begun = time.monotonic()
    code, output = harness.finish(harness.start(folder, *arguments), folder)
    if code != 0:
        raise SystemExit(f"the uninterrupted study failed:\n{output}")
    return time.monotonic() - begun


def device_of(study: Path) -> str:
    """What its trials ran on, as they say themselves."""
    return ", ".join(sorted(set(pd.read_parquet(study / "trials.parquet")["device"])))


def crash(
    folder: Path, expected: Path, duration_s: float, rng: random.Random, *arguments: str
) -> str:
    """One study, killed until it completes: what was done to it. Raises ``AssertionError``."""
    done = []
    kills = 1
    while rng.random() < ANOTHER_KILL:
        kills += 1
    while True:
        process = harness.start(folder, *arguments)
        if kills:
            kills -= 1
            done.append(_one_kill(process, folder, duration_s, rng))
        try:
            code, output = harness.finish(process, folder)
        except AssertionError as error:
            raise AssertionError(f"{', '.join(done)}: {error}") from None
        if code == 0 and not kills:
            break
        # A dead worker is continued by the study itself; the other kills end the command.
        assert code in (0, 1, -9), f"{', '.join(done)}: exit code {code}\n{output}"
        assert len(done) < 20, f"{', '.join(done)}: it never completes\n{output}"
    try:
        harness.compare(folder / "smoke", expected)
        harness.no_epoch_twice(folder / "smoke")
    except AssertionError as error:
        raise AssertionError(f"{', '.join(done)}: {error}") from None
    return ", ".join(done)


def _one_kill(
    process: subprocess.Popen, folder: Path, duration_s: float, rng: random.Random
) -> str:
    target, moment = rng.choice(harness.TARGETS), rng.uniform(0, 0.95 * duration_s)
    begun = time.monotonic()
    while time.monotonic() - begun < moment and process.poll() is None:
        time.sleep(0.05)
    # A worker or raylet that is not there yet is waited for.
    while process.poll() is None and not harness.kill(process, target):
        time.sleep(0.05)
    words = f"{target} at {time.monotonic() - begun:.1f} s"
    if target == "power":
        cut = harness.cut_power(folder / "smoke", rng) if (folder / "smoke").exists() else []
        words += f" ({', '.join(cut)} cut)" if cut else " (nothing was written yet)"
    return words


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="studies to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=1, help="number of the first study")
    parser.add_argument("--device", default="auto", help="of the studies")
    options = parser.parse_args(arguments)
    given = ("--device", options.device)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        duration_s = uninterrupted(whole, *given)
        device = device_of(whole / "smoke")
        print(f"uninterrupted: {duration_s:.0f} s on {device}", flush=True)
        for number in range(options.first, options.first + options.kills):
            folder = Path(temporary) / str(number)
            rng = random.Random(f"{options.seed}/{number}")
            begun = time.monotonic()
            try:
                words = crash(folder, whole / "smoke", duration_s, rng, *given)
                verdict = "equal"
            except AssertionError as error:
                failed += 1
                verdict, words = "FAILED", str(error)
            took = time.monotonic() - begun
            print(f"{number}: {verdict} after {took:.0f} s: {words}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    equal = options.kills - failed
    print(f"{equal} of {options.kills} equal on {device} (seed {options.seed})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
