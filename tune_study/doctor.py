# ruff: noqa: E402  (torch reads the environment while it is imported)
"""``python -m tune_study.doctor``: does this machine compute what it claims to?

Every check is small and uses the product's own code, so that a fault found here is a fault that a
study would have had. It needs no network and leaves nothing behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tune_study.machine import environment

environment.prepare()

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tune_study.checks import modes, products
from tune_study.checks.modes import Verdict, Wrong, check
from tune_study.folder.schema import MODES
from tune_study.machine import provenance
from tune_study.machine.device import available, bf16_slowness, free_bytes, settle, without_bf16

QUANTIZED = MODES[1:]
NEEDED_DISK_BYTES = 2 * 10**9


def examine(device: torch.device) -> Iterator[Verdict]:
    """All verdicts for ``device``, one by one as they are found."""
    yield versions()
    yield devices()
    yield settings(device)
    yield memory(device)
    yield disk(Path.cwd())
    yield compute_dtype(device)
    for of_a_layer in (
        modes.dequantization,
        modes.train_eval_train,
        modes.kernels,
        products.block_layers,
    ):
        for mode in QUANTIZED:
            yield of_a_layer(mode, device)
    yield products.lora_layer(device)
    yield products.attention(device)
    yield products.head_and_loss(device)
    yield products.resize(device)
    yield products.whole_gradient(device)
    for of_a_trial in (modes.epoch, modes.checkpoint_round_trip, modes.peak):
        for mode in MODES:
            yield of_a_trial(mode, device)


@check("versions", "install the packages that are missing")
def versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in provenance.versions().items())


@check("devices", "report this line")
def devices() -> str:
    hardware = provenance.hardware()
    threads = torch.get_num_threads()
    found = f"{hardware['cpu']}, {hardware['cores']} cores, torch uses {threads} threads; GPU: "
    found += hardware["gpu"] or "none"
    if threads > hardware["cores"]:
        remedy = f"set OMP_NUM_THREADS={hardware['cores']}: waiting threads take the cores' time"
        raise Wrong(found, remedy)
    return found


@check("settings", "see what it says")
def settings(device: torch.device) -> str:
    """What a trial sets on ``device``, so that it repeats."""
    found = settle(device)
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "none needed"


@check("memory", "report this line")
def memory(device: torch.device) -> str:
    free = free_bytes(device)
    if free is None:
        return f"{device.type} does not tell what is free"
    return f"{free / 1e9:.1f} GB free for {device.type}"


@check("disk", "free some space, or give --output-dir elsewhere")
def disk(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free here"
    if free < NEEDED_DISK_BYTES:
        raise Wrong(found)
    return found


@check("compute dtype", "set training.compute_dtype=fp32, and report this line")
def compute_dtype(device: torch.device) -> str:
    """What trials compute in that do not name it. fp32 is no fault, and no silence either."""
    slowness = bf16_slowness(device.type)
    reason = without_bf16(device.type)
    used = f"fp32, because {reason}" if reason else "bf16"
    return f"trials use {used}; a bf16 matrix product takes {slowness:.2g} times as long as fp32"


def main(
    device: Annotated[str, typer.Option(help="cpu, mps or cuda; default: the best there is")] = "",
) -> None:
    """Check that this machine computes what it claims to. Exit code 1 when something is wrong."""
    chosen = device or next(name for name in ("cuda", "mps", "cpu") if available(name))
    if not available(chosen):
        print(f"error: --device {device}: this machine has none that torch can use; try cpu")
        raise typer.Exit(2)
    table = Table("check", "verdict", "found", title="tune-study doctor", title_justify="left")
    bad = []
    for verdict in examine(torch.device(chosen)):
        # An exception's text may look like markup.
        table.add_row(verdict.check, "ok" if verdict.ok else "WRONG", escape(verdict.found))
        if not verdict.ok:
            bad.append(verdict)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for verdict in bad:
        console.print(f"{verdict.check}: {verdict.found}. Remedy: {verdict.remedy}.", markup=False)
    console.print(f"{len(bad)} wrong" if bad else "all is well")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
