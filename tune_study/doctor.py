# ruff: noqa: E402  (two settings must come before the imports that read them)
"""``python -m tune_study.doctor``: does this machine compute what it claims to?

Every check is small and uses the product's own code, so that a fault found here is a fault that a
study would have had. It needs no network and leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

# Both talk while they are imported, of a profiler for GPUs and of a kernel of another package.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tune_study import checks, products, provenance
from tune_study.checks import Verdict, Wrong, check
from tune_study.estimate import bf16_slowness, free_bytes, without_bf16
from tune_study.schema import MODES

QUANTIZED = MODES[1:]
NEEDED_DISK_BYTES = 2 * 10**9


def examine(device: torch.device) -> Iterator[Verdict]:
    """All verdicts for ``device``, one by one as they are found."""
    yield versions()
    yield devices()
    yield memory(device)
    yield disk(Path.cwd())
    yield compute_dtype(device)
    for of_a_layer in (
        checks.dequantization,
        checks.train_eval_train,
        checks.kernels,
        products.block_layers,
    ):
        for mode in QUANTIZED:
            yield of_a_layer(mode, device)
    yield products.lora_layer(device)
    yield products.attention(device)
    yield products.head_and_loss(device)
    yield products.resize(device)
    yield products.whole_gradient(device)
    for of_a_trial in (checks.epoch, checks.checkpoint_round_trip, checks.peak):
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


def available(device: str) -> bool:
    """Whether torch can use ``device``: cpu, mps or cuda."""
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or (device == "mps" and torch.backends.mps.is_available())


if __name__ == "__main__":
    typer.run(main)
