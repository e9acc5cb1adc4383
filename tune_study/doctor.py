# ruff: noqa: E402  (two settings must come before the imports that read them)
"""``python -m tune_study.doctor``: does this machine compute what it claims to?

Every check is small and uses the product's own code, so that a fault found here is a fault that a
study would have had. It needs no network and writes nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# Both talk while they are imported, of a profiler for GPUs and of a kernel of another package.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tune_study import provenance, quantize, train
from tune_study.config import TrialConfig, UserError, parse_trial
from tune_study.data import load
from tune_study.estimate import bf16_slowness, free_bytes, settle_compute_dtype, without_bf16
from tune_study.model import build_model
from tune_study.schema import MODES

QUANTIZED = MODES[1:]
NEEDED_DISK_BYTES = 2 * 10**9
TIMED_STEPS = 3


class Verdict(NamedTuple):
    """One line of the table. ``remedy`` is empty when ``ok``."""

    check: str
    ok: bool
    found: str
    remedy: str = ""


def examine(device: torch.device) -> Iterator[Verdict]:
    """All verdicts for ``device``, one by one as they are found."""
    yield versions()
    yield devices()
    yield memory(device)
    yield disk(Path.cwd())
    yield compute_dtype(device)
    for mode in QUANTIZED:
        yield dequantization(mode, device)
    for mode in QUANTIZED:
        yield train_eval_train(mode, device)
    for mode in QUANTIZED:
        yield kernels(mode, device)
    for mode in MODES[:4]:
        yield from training(mode, device)


def versions() -> Verdict:
    found = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    return Verdict("versions", True, found)


def devices() -> Verdict:
    hardware = provenance.hardware()
    threads = torch.get_num_threads()
    found = f"{hardware['cpu']}, {hardware['cores']} cores, torch uses {threads} threads; GPU: "
    found += hardware["gpu"] or "none"
    if threads > hardware["cores"]:
        remedy = f"set OMP_NUM_THREADS={hardware['cores']}: waiting threads take the cores' time"
        return Verdict("devices", False, found, remedy)
    return Verdict("devices", True, found)


def memory(device: torch.device) -> Verdict:
    free = free_bytes(device)
    if free is None:
        return Verdict("memory", True, f"{device.type} does not tell what is free")
    return Verdict("memory", True, f"{free / 1e9:.1f} GB free for {device.type}")


def disk(folder: Path) -> Verdict:
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free here"
    if free < NEEDED_DISK_BYTES:
        return Verdict("disk", False, found, "free some space, or give --output-dir elsewhere")
    return Verdict("disk", True, found)


def dequantization(mode: str, device: torch.device) -> Verdict:
    """Gaussian weights come back with the error that the mode has on a sound machine."""
    low, high = quantize.GAUSSIAN_ERROR_BANDS[mode]
    try:
        error = quantize.check_kernel(mode, 256, str(device))
    except UserError as failure:
        remedy = "choose another mode or device, or install another version of bitsandbytes"
        return Verdict(f"weights of {mode}", False, str(failure), remedy)
    found = f"relative error {error:.4f}, expected {low} to {high}"
    return Verdict(f"weights of {mode}", True, found)


def train_eval_train(mode: str, device: torch.device) -> Verdict:
    """The gradient through a layer is the same before and after it was used for evaluation.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a 4-bit layer in the first evaluation, and
    the next training step raises or loses its gradient, unless that is switched off.
    """
    name = f"train, eval, train of {mode}"
    remedy = (
        "set support_avx512bf16_for_cpu = False on the 4-bit layers (quantize.quantize_linear "
        "does), or install another version of bitsandbytes"
    )
    layer = _layer(mode, device)
    pixels = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).to(device)

    def gradient() -> Tensor:
        layer.train()
        leaf = pixels.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]

    before = gradient()
    layer.eval()
    with torch.inference_mode():
        layer(pixels)
    try:
        after = gradient()
    except RuntimeError as error:
        return Verdict(name, False, f"training after evaluation raises: {error}", remedy)
    if not torch.equal(before, after):
        return Verdict(name, False, "the gradient after evaluation is another one", remedy)
    if not float(before.norm()) > 0:
        return Verdict(name, False, "the gradient is zero", remedy)
    return Verdict(name, True, "equal to the last bit")


def kernels(mode: str, device: torch.device) -> Verdict:
    """Which of bitsandbytes' operations run, and whether ``device`` has kernels of its own."""
    layer = _layer(mode, device).train()
    leaf = torch.randn(16, 128, device=device, requires_grad=True)
    with _Operations() as training:
        out = layer(leaf)
        function = type(out.grad_fn).__name__.removesuffix("Backward")
        out.sum().backward()
    layer.eval()
    with torch.inference_mode(), _Operations() as evaluation:
        layer(leaf)
    key = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS"}[device.type]

    def described(names: list[str]) -> str:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        own = {name: has(f"bitsandbytes::{name}", key) for name in names}
        return (
            ", ".join(f"{name} ({'own' if own[name] else 'plain torch'})" for name in names)
            or "plain torch alone"
        )

    found = f"train: {function}: {described(training.names)}; eval: {described(evaluation.names)}"
    return Verdict(f"kernels of {mode}", True, found)


class _Operations(TorchDispatchMode):
    """Notes the names of bitsandbytes' operations in the order of their first use."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bitsandbytes":
            name = func._schema.name.partition("::")[2]
            if name not in self.names:
                self.names.append(name)
        return func(*args, **(kwargs or {}))


def compute_dtype(device: torch.device) -> Verdict:
    """What trials compute in that do not name it. fp32 is no fault, and no silence either."""
    slowness = bf16_slowness(device.type)
    reason = without_bf16(device.type)
    used = f"fp32, because {reason}" if reason else "bf16"
    found = f"trials use {used}; a bf16 matrix product takes {slowness:.2g} times as long as fp32"
    return Verdict("compute dtype", True, found)


def _layer(mode: str, device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(128, 192)
    return quantize.quantize_linear(linear, mode, torch.float32, device)


def training(mode: str, device: torch.device) -> Iterator[Verdict]:
    """Three steps of the demo's model, twice: equal bits, their time, and what tells the peak."""
    try:
        runs = [_three_steps(mode, device) for _ in range(2)]
        measured = train.measure_memory(_started(mode, device))
    except (RuntimeError, UserError) as error:
        yield Verdict(f"training with {mode}", False, str(error), "choose another mode or device")
        return
    (first, _), (second, times) = runs  # the first run also warms up
    step = f"{1e3 * statistics.median(times):.0f} ms per step of 32 small images"
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    remedy = "" if equal else "compare accuracies by their spread over seeds, not to the last bit"
    most = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    same = "are equal to the last bit" if equal else f"differ by up to {most:.1e} in a parameter"
    found = f"two identical runs {same}; {step}"
    yield Verdict(f"training with {mode}", equal, found, remedy)
    known = measured.peak_train_bytes is not None
    peak = f"{(measured.peak_train_bytes or 0) / 1e6:.1f} MB by {measured.peak_source}"
    remedy = "" if known else "use a device whose allocator keeps count: cpu, cuda or mps"
    yield Verdict(f"peak of {mode}", known, peak if known else "not to be had", remedy)


def _started(mode: str, device: torch.device) -> train.Training:
    config = _trial(mode, device)
    data = load(config.dataset, None, config.data)
    return train.start(config, build_model(config, 10, device=device), data, device)


def _trial(mode: str, device: torch.device) -> TrialConfig:
    trial = parse_trial(
        {
            "model": "vit_glyphs_patch4_32",
            "dataset": "digits",
            "quantization": mode,
            "data": {"train_size": 100, "val_size": 20, "test_size": 20},
            "training": {"per_device_train_batch_size": 32, "warmup_steps": 0},
        }
    )
    return settle_compute_dtype([trial], device.type)[0][0]


def _three_steps(mode: str, device: torch.device) -> tuple[list[Tensor], list[float]]:
    """(trainable parameters, seconds per step)."""
    started = _started(mode, device)
    started.model.train()
    images, labels = (tensor[:32] for tensor in started.data.train)
    times = []
    for _ in range(TIMED_STEPS):
        begun = time.perf_counter()
        loss, _hits = train.train_step(started, images, labels)
        float(loss)  # waits for the device
        times.append(time.perf_counter() - begun)
    return [p.detach().cpu() for p in started.parameters.values()], times


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
        table.add_row(verdict.check, "ok" if verdict.ok else "WRONG", verdict.found)
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
