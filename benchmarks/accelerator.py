"""One prepared check of an accelerator: ``python -m benchmarks.accelerator``.

It is made for a machine that is lent for ten minutes. Nothing is downloaded: the models start from
random weights, the images are scikit-learn's digits. On the machine, in this checkout:

    python -m benchmarks.accelerator --output FOLDER

That ends after six minutes (``--minutes``) at the latest; the rest is for the machine's start and
for taking FOLDER away. Both files in it, JSON with all figures and Markdown with the table, are
written anew after every row, so that a machine that goes away leaves what was measured. Try the
command beforehand on any CPU: ``--device cpu --quick`` takes the small model, small batches and the
smoke grid, and says so; the whole check takes the better part of an hour on two cores
(``--minutes 60``).

The parts, in this order (``--parts speed,demo`` runs some of them):

- doctor: the verdicts of ``python -m tune_study.doctor``
- models: every mode built and proven, its bytes as computed from the shapes alone
- ledger: the bytes of a training step, predicted and measured
- repeat: a trial twice, and killed after its first epoch and continued: the same bits?
- speed: a step's time, the device's share of it, an evaluation
- demo: the demo study by its own command
- compare: our training against what people would use instead (benchmarks/comparisons.py). Only
  where it is named, for it takes all the time: a part for each model, batch and mode, the most
  telling first. A name stands for all parts that begin with it: ``--parts compare-epochs`` goes on
  where another run has ended

``--gate`` asks instead, on CUDA alone, whether a step that a CUDA graph replays is the eager one,
to the last bit (benchmarks/gate.py).

Each runs in a process of its own. One that raises, is killed, or takes longer than its limit is a
row that says so, and the others go on; their limits grow with ``--minutes``. What has not begun
when the time is over is not run, and red. Exit code 1 when a row is red.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.__main__ import RESULTS, machine
from benchmarks.processes import Row, run
from tune_study.folder.files import write_json, write_whole

MODES = ("none", "nf4", "int8", "nf4-dq")

MINUTES = 6.0
FULL: dict[str, Any] = {
    "models": ["deit_tiny_patch16_224", "deit_small_patch16_224"],
    "batch": 32,
    "large_batch": 256,
    "steps": 20,
    "grid": "demo",
}
QUICK: dict[str, Any] = {
    "models": ["deit_tiny_patch16_224"],
    "batch": 4,
    "large_batch": None,
    "steps": 4,
    "grid": "smoke",
}
WORDS = {True: "ok", False: "**WRONG**", None: ""}


class Part(NamedTuple):
    """A part of the check, ``function`` as ``processes.run`` takes it."""

    function: str
    limit_s: float
    """Of ``MINUTES``; it grows with ``--minutes``."""
    given: Mapping[str, Any] = {}
    """Settings of its own."""


MACHINE = Part("benchmarks.checks:this_machine", 120)
"""The first, always: it says where the figures come from."""
PARTS = {
    "doctor": Part("benchmarks.checks:doctors", 90),
    "models": Part("benchmarks.checks:models", 90),
    "ledger": Part("benchmarks.checks:ledgers", 90),
    "repeat": Part("benchmarks.repeats:repeats", 120),
    "speed": Part("benchmarks.speed:speeds", 120),
    "demo": Part("benchmarks.checks:demo", 180),
}
GATE = {"gate": Part("benchmarks.gate:gates", 360)}
"""Alone: it takes the whole time."""
COMPARISONS = {"steps": 75.0, "modes": 120.0, "epochs": 120.0, "script": 60.0}
"""Functions of benchmarks/comparisons.py, and their limits."""


def comparisons(settings: Mapping[str, Any]) -> dict[str, Part]:
    """A part for each comparison, the most telling first."""
    models, batch, large = (settings[key] for key in ("models", "batch", "large_batch"))
    cells = [(models[0], batch)]
    if large:
        cells += [(models[-1], large), (models[-1], batch), (models[0], large)]
    first, heavy = cells[0], cells[min(1, len(cells) - 1)]
    order = [("steps", *first, "none"), ("modes", *first, "all"), ("epochs", *first, "none")]
    order += [("steps", *first, mode) for mode in MODES]
    order += [("steps", *heavy, "none"), ("script", *first, "none"), ("epochs", *first, "nf4")]
    order += [("steps", *cell, mode) for cell in cells for mode in MODES]
    order += [("script", *cell, "none") for cell in cells]
    order += [("epochs", *cell, mode) for cell in cells for mode in MODES]
    return {
        f"compare-{kind}-{model}-{size}-{mode}": Part(
            f"benchmarks.comparisons:{kind}",
            COMPARISONS[kind],
            {"model": model, "batch": size, "mode": mode},
        )
        for kind, model, size, mode in dict.fromkeys(order)
    }


def chosen(names: list[str], parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts that ``names`` stand for, in the order of the names. Raises ``KeyError``."""
    found: dict[str, Part] = {}
    for name in names:
        some = {key: part for key, part in parts.items() if key == name} or {
            key: part for key, part in parts.items() if key.startswith(name)
        }
        if not name or not some:
            raise KeyError(name)
        found |= some
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when a row is red."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas between them")
    parser.add_argument("--gate", action="store_true", help="the CUDA graph's gate, and no part")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--quick", action="store_true", help="smaller everything, for a CPU")
    options = parser.parse_args(arguments)
    settings = dict(QUICK if options.quick else FULL)
    try:
        parts = chosen(options.parts.split(","), {**PARTS, **comparisons(settings)})
    except KeyError as error:
        parser.error(f"--parts {error.args[0]}: there are {', '.join(PARTS)} and compare")
    parts = GATE if options.gate else parts
    deadline = time.monotonic() + 60 * options.minutes
    limit_s = min(MACHINE.limit_s, 60 * options.minutes)
    first = run(MACHINE.function, {"device": options.device}, limit_s, shown("here"))
    if first.rows[-1].ok is False:
        print(first.tail, file=sys.stderr)
        return 1  # a file could not even say where its figures come from
    about = first.rows[-1].figures
    settings["device"] = about.pop("device")
    if options.gate and settings["device"] != "cuda":
        print(f"--gate: --device {settings['device']} has no CUDA graphs", file=sys.stderr)
        return 1
    found = {
        "settings": {**settings, "minutes": options.minutes, "quick": options.quick},
        **about,
        "parts": {},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    kind = "gate" if options.gate else "accelerator"
    kind += "-quick" if options.quick else ""
    name = re.sub(r"\W+", "-", f"{machine(found)}-{kind}").strip("-").lower()

    def keep() -> None:
        write_json(options.output / f"{name}.json", found)
        text = markdown(found)
        write_whole(options.output / f"{name}.md", lambda path: path.write_text(text, "utf-8"))

    check(parts, settings, options.minutes, deadline, found, keep)
    red = sum(row["ok"] is False for part in found["parts"].values() for row in part["rows"])
    print(f"{red} wrong" if red else "all is well", f"; written: {options.output / name}.*", sep="")
    return 1 if red else 0


def check(
    parts: Mapping[str, Part],
    settings: dict[str, Any],
    minutes: float,
    deadline: float,
    found: dict[str, Any],
    keep: Callable[[], object],
) -> None:
    """Runs ``parts`` until ``deadline`` (of ``time.monotonic``) and puts them into ``found``.

    ``keep`` is called whenever there is more in it.
    """
    for name, part in parts.items():
        limit_s = min(part.limit_s * minutes / MINUTES, deadline - time.monotonic())
        entry: dict[str, Any] = {"limit_s": limit_s, "took_s": 0.0, "rows": [], "tail": ""}
        found["parts"][name] = entry

        def tell(row: Row, name: str = name, entry: dict[str, Any] = entry) -> None:
            shown(name)(row)
            entry["rows"].append(row._asdict())
            keep()

        if limit_s <= 0:
            tell(Row("its process", False, "not run: time is over"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(
                part.function, {**settings, **part.given, "folder": folder}, limit_s, tell
            )
        entry |= {"took_s": outcome.took_s, "tail": outcome.tail}
        keep()


def shown(part: str) -> Callable[[Row], None]:
    """Prints a row as it comes."""
    words = {True: "ok   ", False: "WRONG", None: "     "}
    return lambda row: print(f"{words[row.ok]} {part}: {row.name}: {row.found}", flush=True)


def markdown(found: dict[str, Any]) -> str:
    """A table per part, and where it all comes from."""
    settings, commit = found["settings"], found["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    memory = f"{found['hardware']['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"{machine(found)}, device {settings['device']}, host with {found['hardware']['cores']} "
        f"cores of {found['hardware']['cpu']} and {memory}, {found['threads']} threads, "
        f"{found['at']}, commit {commit or 'unknown'}. {versions}.",
    ]
    if settings["quick"]:
        lines += [
            "",
            f"**Quick**: {', '.join(settings['models'])} alone, batches of {settings['batch']}, "
            f"the grid {settings['grid']}: this tells that the check works, and little of speed.",
        ]
    for name, part in found["parts"].items():
        lines += [
            "",
            f"**{name}**, {part['took_s']:.0f} s",
            "",
            "| what | | found |",
            "|---|---|---|",
        ]
        for row in part["rows"]:
            cells = (row["name"], WORDS[row["ok"]], row["found"])
            lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
