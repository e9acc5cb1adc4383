"""Do three nodes stay busy? 24 simulated trials on a cluster of raylets on this machine.

    python -m benchmarks.cluster_scaling --epoch-s 10

A simulated trial sleeps and needs no core, so that the figure is about scheduling, the store and
the restarts of workers, and not about the cores that the raylets share. It prints the wall time
from the first trial's start to the last one's end over (sum of trial times / slots), and the same
with the command's start and end. The former should be at most 1.15.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e import harness, nodes

TRIALS, NODES = 24, 3
GRID = """
from ray import tune

def many():
    from search_spaces import grids
    space = grids.smoke()
    space["seed"] = tune.grid_search(list(range(6)))
    return space
"""


def watch(process, output: Path) -> tuple[float, float, float]:
    """(seconds from the first start to the last end, sum of trial times, seconds in all)."""
    begun = time.monotonic()
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    while process.poll() is None or len(ended) < TRIALS:
        text, now = output.read_text(), time.monotonic()
        for trial in re.findall(r"^(\S+): started$", text, re.MULTILINE):
            started.setdefault(trial, now)
        for trial in re.findall(r"^(\S+): completed, ", text, re.MULTILINE):
            ended.setdefault(trial, now)
        if process.poll() is not None and len(ended) < TRIALS:
            raise SystemExit(f"the study did not complete:\n{text}")
        time.sleep(0.1)
    times = [ended[trial] - started[trial] for trial in ended]
    return max(ended.values()) - min(started.values()), sum(times), time.monotonic() - begun


def main() -> int:
    """The command line; 1 when the nodes were not busy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epoch-s", type=float, default=10.0, help="two epochs a trial")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, nodes.cluster(NODES) as cluster:
        root = Path(temporary)
        (root / "many.py").write_text(GRID)
        arguments = ["--simulate", "--epoch-s", options.epoch_s, "--cpus-per-trial", 1]
        arguments += ["--address", cluster["address"], "--storage", (root / "store").as_uri()]
        process = harness.start(root / "here", *arguments, grid=f"{root / 'many.py'}:many")
        wall, total, in_all = watch(process, root / "here" / "output.txt")
    ideal = total / NODES
    nominal = TRIALS * 2 * options.epoch_s / NODES
    print(
        f"{TRIALS} trials on {NODES} nodes: {wall:.1f} s, ideal {ideal:.1f} s: {wall / ideal:.3f}"
    )
    print(f"against the trials' own {nominal:.0f} s of sleep: {wall / nominal:.3f}")
    print(f"the whole command, Ray's start and the report included: {in_all:.1f} s")
    return 0 if wall <= 1.15 * ideal else 1


if __name__ == "__main__":
    sys.exit(main())
