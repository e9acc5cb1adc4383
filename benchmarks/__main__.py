"""All comparisons in one run: ``python -m benchmarks [--device cpu] [--rounds 5]``.

The sides of a comparison take turns. Writes ``benchmarks/results/<machine>.json``, and the table
in Markdown beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from tune_study.machine import environment

environment.prepare()

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--steps", type=int, default=3, help="steps per measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument(
        "--trials", type=int, default=12, help="of the whole study; 0 leaves it out"
    )
    parser.add_argument(
        "--images", type=int, default=320, help="in a trial's epoch; a trial should last over 10 s"
    )
    options = parser.parse_args(arguments)
    found = collect(options)
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", f"{machine(found)}-{options.device}").strip("-").lower()
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(found))
    print(f"written: {RESULTS / name}.json and .md")
    return 0


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, in the form of the JSON file."""
    import torch

    from benchmarks import machine as limits
    from benchmarks import peers, steps, whole_study
    from benchmarks.timing import Comparison
    from tune_study.folder.files import now
    from tune_study.machine import provenance

    shape = (options.steps, options.rounds, options.device)
    comparisons: list[Comparison] = []

    def run(function: Callable[..., Comparison | list[Comparison]], *given: Any) -> None:
        result = function(*given)
        for one in result if isinstance(result, list) else [result]:
            comparisons.append(one)
            print(line(one._asdict() | {"median": one.median, "met": one.met}), flush=True)

    for mode in ("none", "nf4"):
        run(steps.epoch_against_step, options.model, mode, options.batch, *shape)
    config = steps.config_of(options.model, "none", options.batch, options.device)
    dtypes = dict.fromkeys(("fp32", config.training.compute_dtype))
    for mode in ("none", "nf4"):
        for dtype in dtypes:
            run(peers.epoch_against_trainer, options.model, mode, options.batch, dtype, *shape)
    for mode in ("none", "nf4"):
        run(steps.monitors_on_against_off, options.model, mode, options.batch, *shape)
    run(steps.modes_against_none, options.model, options.batch, *shape)
    for mode in ("none", "int8", "nf4"):
        for dtype in dtypes:
            run(peers.step_against_plain, options.model, mode, options.batch, dtype, *shape)
    training = steps.started(config, options.device, options.batch)
    found = {
        "utilisation": limits.utilisation(training, options.device),
        "operators": {
            mode: limits.operators(
                steps.started(
                    steps.config_of(options.model, mode, options.batch, options.device),
                    options.device,
                    options.batch,
                ),
                options.device,
            )
            for mode in steps.MODES
        },
    }
    if options.trials:
        run(whole_study.study_overhead, options.trials, options.images, options.device)
    return {
        "settings": vars(options),
        "at": now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "threads": torch.get_num_threads(),
        "comparisons": [
            {**one._asdict(), "median": one.median, "met": one.met} for one in comparisons
        ],
        **found,
    }


def machine(found: dict[str, Any]) -> str:
    hardware = found["hardware"]
    gpu = hardware["gpu"] if found["settings"]["device"] != "cpu" else None
    return gpu or f"{hardware['cpu']} {hardware['cores']} cores"


def line(one: dict[str, Any]) -> str:
    """A row of the table."""
    sides = ", ".join(f"{name} {value:.3g}" for name, value in one["sides"].items())
    spread = f"{min(one['ratios']):.3f} to {max(one['ratios']):.3f}"
    spread = "one run" if len(one["ratios"]) == 1 else spread
    measured = f"{sides} {one['unit']}" if sides else ""
    measured += f"; {one['note']}" if one["note"] else ""
    verdict = "met" if one["met"] else "**missed**"
    cells = (one["what"], one["target"], f"{one['median']:.3f}", spread, verdict, measured)
    return "| " + " | ".join(cells) + " |"


def markdown(found: dict[str, Any]) -> str:
    """The table, where it comes from, and where a step's time goes."""
    settings, used = found["settings"], found["utilisation"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [
        f"{machine(found)}, {found['threads']} threads, {found['at']}, commit {found['commit']}. "
        f"Our side computes in {used['compute_dtype']}, as its trials do here by default.",
        f"{settings['model']}, batch {settings['batch']}, {settings['steps']} steps per "
        f"measurement, {settings['rounds']} rounds in turns. {versions}.",
        "",
        "| what | target | median | spread | | medians of the sides |",
        "|---|---|---|---|---|---|",
        *map(line, found["comparisons"]),
        "",
        f"The bare step of `none` in {used['compute_dtype']} computes "
        f"{used['step_flop_per_s'] / 1e9:.0f} GFLOP/s, {used['share_of_peak']:.0%} of the "
        f"{used['peak_flop_per_s'] / 1e9:.0f} GFLOP/s that a square matrix product reaches here.",
        "",
        "Where a bare step's time goes (share of the operators' own time):",
        "",
        "| mode | operators |",
        "|---|---|",
    ]
    for mode, operators in found["operators"].items():
        shares = ", ".join(
            f"`{o['operator']}` {o['share']:.0%}" for o in operators if o["share"] > 0.01
        )
        rows.append(f"| {mode} | {shares} |")
    assert not any(math.isnan(one["median"]) for one in found["comparisons"])
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
