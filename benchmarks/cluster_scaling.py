"""Do the nodes of a cluster stay busy, and what does the command take? Simulated trials on raylets.

    python -m benchmarks.cluster_scaling --epoch-s 10
    python -m benchmarks.cluster_scaling --nodes 10 --trials 2000 --epoch-s 5

A simulated trial sleeps and needs no core, so that the figures are about scheduling, the store and
the restarts of workers, and not about the cores that the raylets of this machine share. Printed are
the share of the slots' time in which trials ran, from the first one's start to the last one's end,
and that of it which was their own sleep; the resident memory of the command when the first tenth of
the trials had ended, and the most; and how long it took before the first trial and after the last
one (tables and report). The slots should be busy for at least 95 % of the time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.e2e import harness, nodes

EPOCHS, OF_A_SEED = 2, 4
"""Of a trial of the smoke grid, and its trials with one seed."""
GRID = """
from ray import tune

def many():
    from search_spaces import grids
    space = grids.smoke()
    space["seed"] = tune.grid_search(list(range({seeds})))
    return space
"""
BUSY = 0.95


class Seen(NamedTuple):
    """What a command did, in seconds since it began, and in bytes."""

    started: dict[str, float]
    ended: dict[str, float]
    done: float
    early_rss_bytes: int
    """Of the command alone, when a tenth of its trials had ended."""
    peak_rss_bytes: int


def watch(process: subprocess.Popen, output: Path, trials: int) -> Seen:
    """Looks five times a second. Raises ``SystemExit`` when not all trials ended well."""
    begun, early, peak = time.monotonic(), 0, 0
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    command = psutil.Process(process.pid)
    with output.open() as said:
        rest, living = "", True
        while living:
            living, now = process.poll() is None, time.monotonic() - begun
            lines = (rest + said.read()).split("\n")
            rest = lines.pop()  # half a line, as yet
            for line in lines:
                if found := re.match(r"(\S+): (started$|completed, )", line):
                    (started if found[2] == "started" else ended).setdefault(found[1], now)
            try:
                rss = command.memory_info().rss
            except psutil.NoSuchProcess:
                rss = 0
            peak = max(peak, rss)
            early = early or (rss if 10 * len(ended) >= trials else 0)
            time.sleep(0.2)
    if len(ended) < trials:
        raise SystemExit(f"the study did not complete:\n{output.read_text()[-3000:]}")
    return Seen(started, ended, time.monotonic() - begun, early, peak)


def table(seen: Seen, slots: int, epoch_s: float) -> tuple[str, float]:
    """(rows of Markdown, the share of the slots' time in which trials ran)."""
    first, last = min(seen.started.values()), max(seen.ended.values())
    room = slots * (last - first)
    ran = sum(end - seen.started[trial] for trial, end in seen.ended.items())
    slept = len(seen.ended) * EPOCHS * epoch_s
    rows = {
        "trials": f"{len(seen.ended):,}",
        "slots": f"{slots}",
        "from the first trial's start to the last one's end, s": f"{last - first:.1f}",
        "of the slots' time: trials ran": f"{ran / room:.1%}",
        "of the slots' time: their own sleep": f"{slept / room:.1%}",
        "before the first trial, s": f"{first:.1f}",
        "after the last one: tables and report, s": f"{seen.done - last:.1f}",
        "the command's memory after a tenth of the trials, MB": f"{seen.early_rss_bytes / 1e6:.0f}",
        "the most of it, MB": f"{seen.peak_rss_bytes / 1e6:.0f}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| what | |", "|---|---:|", *lines]), ran / room


def main() -> int:
    """The command line; 1 when the nodes were not busy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3, help="raylets, of one slot each")
    parser.add_argument("--trials", type=int, default=24, help="a multiple of four")
    parser.add_argument("--epoch-s", type=float, default=10.0, help="two epochs a trial")
    options = parser.parse_args()
    if options.trials <= 0 or options.trials % OF_A_SEED:
        parser.error(f"--trials: a multiple of {OF_A_SEED}, the trials of a seed")
    with tempfile.TemporaryDirectory() as temporary, nodes.cluster(options.nodes) as cluster:
        root = Path(temporary)
        (root / "many.py").write_text(GRID.format(seeds=options.trials // OF_A_SEED))
        arguments = ["--simulate", "--epoch-s", options.epoch_s, "--cpus-per-trial", 1]
        arguments += ["--address", cluster["address"], "--storage", (root / "store").as_uri()]
        process = harness.start(root / "here", *arguments, grid=f"{root / 'many.py'}:many")
        seen = watch(process, root / "here" / "output.txt", options.trials)
    text, busy = table(seen, options.nodes, options.epoch_s)
    print(text)
    return 0 if busy >= BUSY else 1


if __name__ == "__main__":
    sys.exit(main())
