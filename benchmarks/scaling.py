"""How time and memory grow with the study: ``python -m benchmarks.scaling``.

Simulated studies of 144, 1,440 and 14,400 trials (the full grid with 3, 30 and 300 seeds, 15
epochs a trial), each phase in a process of its own. 50 minutes on two cores, 2 GB of disk.

``plan``        the grid's trials
``command``     the whole of ``python -m tune_study.run --simulate``: Ray's start, the trials one at
                a time, tables and report
``run``         of that, from the first trial's start to the last one's end
``collect``     the trials' own files -> tables, written
``load``        the tables, read and checked
``statistics``  all that the report says, computed
``report``      load, statistics, figures, pages, written

Seconds, of the clock and of the CPU, are of the phase itself, without the process's start and its
imports. The peak RSS is of the whole process, imports included. ``command`` counts all of it, and
all of Ray's processes, read every 0.2 s; memory that they share counts for each. Medians of
``--repeats``; a command runs once. Growth is per ten times the trials: at most 10 is no faster than
linear.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from tune_study.machine.environment import spared_from_collection

PER_SEED = 48
GRID = """
from ray import tune
from search_spaces import grids

def seeds():
    return {{**grids.full(), "seed": tune.grid_search(list(range({seeds})))}}
"""
PHASES = ("plan", "command", "run", "collect", "load", "statistics", "report")


class Cost(NamedTuple):
    seconds: float
    """Of the clock."""
    cpu_s: float
    """Of the processors, which depends less on what else a machine does."""
    peak_rss_bytes: float


def plan(folder: Path) -> Callable[[], object]:
    """What is timed of this phase; the imports and inputs that it needs are there."""
    with spared_from_collection():  # as in the command
        from tune_study.study import plan as plans

    return lambda: plans.plan(plans.load_grid(f"{folder / 'grid.py'}:seeds")[1])


def collect(folder: Path) -> Callable[[], object]:
    """As ``session.collect``, without its imports of Ray and torch."""
    from analysis import load

    return lambda: load.write_tables(load.rebuild(folder / "study"), folder / "study")


def load(folder: Path) -> Callable[[], object]:
    from analysis.load import read_study

    return lambda: read_study(folder / "study")


def statistics(folder: Path) -> Callable[[], object]:
    from analysis.findings.findings import compute
    from analysis.load import read_study

    study = read_study(folder / "study")
    if study.problems:
        raise RuntimeError(study.problems[0])
    return lambda: compute(study)


def report(folder: Path) -> Callable[[], object]:
    from analysis.report import write_report

    return lambda: write_report(folder / "study")


ALONE = {
    "plan": plan,
    "collect": collect,
    "load": load,
    "statistics": statistics,
    "report": report,
}


def alone(phase: str, folder: Path, repeats: int) -> Cost:
    """Medians of :func:`once` over fresh processes."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--phase", phase, str(folder)]
    done = [Cost(*json.loads(subprocess.check_output(command))) for _ in range(repeats)]
    return Cost(*(median(values) for values in zip(*done, strict=True)))


def once(phase: str, folder: Path) -> Cost:
    """In this process."""
    work = ALONE[phase](folder)
    begun, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(seconds, cpu, peak if sys.platform == "darwin" else 1024 * peak)


def command(folder: Path, trials: int) -> dict[str, Cost]:
    """Makes the study of ``trials`` trials: the costs of ``command`` and of ``run``."""
    arguments = ["--grid", f"{folder / 'grid.py'}:seeds", "--simulate", "--name", "study"]
    begun, peak, cpu, spent = time.perf_counter(), 0, {}, [(0.0, 0.0)]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tune_study.run", *arguments, "--output-dir", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            rss, times = used(process.pid)
            peak, cpu = max(peak, rss), cpu | times
            spent.append((time.time(), sum(cpu.values())))
            time.sleep(0.2)
    seconds = time.perf_counter() - begun
    started, ended = (
        [path.stat().st_mtime for path in (folder / "study").glob(f"*/{name}.json")]
        for name in ("config", "results")
    )
    if process.returncode or len(ended) != trials:
        raise RuntimeError((folder / "output.txt").read_text()[-2000:])
    first, last = min(started), max(ended)
    return {
        "command": Cost(seconds, sum(cpu.values()), peak),
        "run": Cost(last - first, until(last, spent) - until(first, spent), math.nan),
    }


def until(moment: float, spent: list[tuple[float, float]]) -> float:
    """The seconds of CPU that were ``spent`` at ``moment``: (time, seconds by then) in order."""
    return max(seconds for when, seconds in spent if when <= moment)


def used(pid: int) -> tuple[int, dict[int, float]]:
    """(resident bytes, seconds of CPU so far by process) of a process and all below it."""
    total, times = 0, {}
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total, times
    for process in processes:
        try:
            total += process.memory_info().rss
            times[process.pid] = sum(process.cpu_times()[:2])  # user and system
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    return total, times


def measure(trials: int, repeats: int) -> dict[str, Cost]:
    """{phase: its cost} for a study of ``trials`` trials."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "grid.py").write_text(GRID.format(seeds=trials // PER_SEED))
        found = {"plan": alone("plan", folder, repeats), **command(folder, trials)}
        rest = (phase for phase in PHASES if phase not in found)
        return found | {phase: alone(phase, folder, repeats) for phase in rest}


def growth(values: list[float], trials: list[int]) -> list[float]:
    """By what factor each of ``values`` exceeds the one before, per ten times the trials."""
    pairs = zip(values, values[1:], trials, trials[1:], strict=False)
    return [math.nan, *((b / a) ** (1 / math.log10(m / n)) for a, b, n, m in pairs)]


def table(found: dict[int, dict[str, Cost]]) -> str:
    """A row per phase and size; a growth above 10 is bold."""
    rows = [
        "| phase | trials | s | growth | CPU s | growth | CPU ms per trial | peak MiB | growth |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    sizes = list(found)
    for phase in PHASES:
        costs = [found[size][phase] for size in sizes]
        factors = zip(
            *(growth(list(values), sizes) for values in zip(*costs, strict=True)), strict=True
        )
        for size, cost, (slower, busier, larger) in zip(sizes, costs, factors, strict=True):
            cells = [phase, f"{size:,}", text(cost.seconds, ".2f"), factor(slower)]
            cells += [text(cost.cpu_s, ".2f"), factor(busier)]
            cells += [text(1000 * cost.cpu_s / size, ".2f")]
            cells += [text(cost.peak_rss_bytes / 2**20, ",.0f"), factor(larger)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def text(value: float, form: str) -> str:
    """Empty for what was not measured."""
    return "" if math.isnan(value) else format(value, form)


def factor(value: float) -> str:
    return f"**{value:.1f}**" if value > 10 else text(value, ".1f")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[144, 1_440, 14_400])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phase", nargs=2, metavar=("PHASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(once(options.phase[0], Path(options.phase[1]))))
        return
    if any(trials % PER_SEED or trials <= 0 for trials in options.trials):
        parser.error(f"--trials: multiples of {PER_SEED}, the trials of a seed")
    found: dict[int, dict[str, Cost]] = {}
    for trials in options.trials:
        found[trials] = measure(trials, options.repeats)
        print(f"{trials:,} trials: {found[trials]}", file=sys.stderr, flush=True)
    print(f"{ran_on()}\n\n{table(found)}")


def ran_on() -> str:
    from analysis.folder.contents import machine
    from tune_study.folder.files import now
    from tune_study.machine import provenance

    where, python = machine(provenance.hardware()), platform.python_version()
    software = ", ".join(f"{name} {metadata.version(name)}" for name in ("ray", "pandas"))
    return f"{where}; Python {python}, {software}; {now()}, {provenance.commit()}."


if __name__ == "__main__":
    main()
