"""Our training against what people would use instead, on one card.

The parts ``compare-...`` of ``benchmarks/accelerator.py``: they tell, and judge nothing. The sides
of a comparison take turns; ours are whole training epochs of ``steps`` steps, with everything that
a trial does in one, theirs what their names say. A side that can't be had here is a row that says
why, and the others are compared.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import product_peak, step_flops
from benchmarks.peers import Missing, peer, workers
from benchmarks.processes import Row, attempt
from benchmarks.speed import device_work
from benchmarks.steps import MODES, config_of, started, synchronised
from benchmarks.timing import Comparison, alternate, compare, rate
from tune_study.config import TrialConfig
from tune_study.errors import first_line
from tune_study.machine.resources import release_memory
from tune_study.model.layers import COMPUTE_DTYPES
from tune_study.trial import train
from tune_study.trial.context import RunContext
from tune_study.trial.execution import execute
from tune_study.trial.training import Training

ROUNDS = 5
GRID_STEPS = 250
GRID_TRIALS = 18
"""Of the full grid, for each model and mode: 2 data sets, 3 LoRA settings, 3 seeds."""
GRAPH_OVER_EAGER = {"none": 7.0, "int8": 6.0, "nf4": 9.0}
OVER_NONE = {"int8": 0.6, "nf4": 0.9}
LAUNCH_BOUND = 32
"""Images of a step, to which the targets belong that are not for both batches."""

Rates = dict[str, list[float]]
"""Images per second of each side, by round."""
Side = Callable[[], float]
Bounds = dict[tuple[str, str], float | None]
"""(side, other side): the least ratio that is wanted of a GPU, if any is."""


class Cell(NamedTuple):
    """What is compared in one process."""

    model: str
    mode: str
    batch: int
    device: str
    steps: int

    @property
    def dtype(self) -> str:
        """That our trials compute in here."""
        return str(self.config.training.compute_dtype)

    @property
    def config(self) -> TrialConfig:
        return config_of(*self[:4])

    @property
    def best(self) -> str:
        """How our steps are taken where it matters: as a graph, where there are graphs."""
        return "graph" if self.device == "cuda" else "eager"

    def theirs(self, what: str) -> AbstractContextManager[Side]:
        return peer(what, *self[:3], self.steps, self.device, self.dtype)


def cell_of(settings: dict[str, Any], **changed: Any) -> Cell:
    """Of ``settings``, but for what is ``changed``."""
    return Cell(*(({**settings, **changed})[name] for name in Cell._fields))


def steps(settings: dict[str, Any]) -> Iterator[Row]:
    """Ours, eager and as a graph; plain PEFT + bitsandbytes, eager and captured by hand."""
    cell = cell_of(settings)
    ours = {step: Ours(cell, step) for step in ("eager", "graph")}
    with cell.theirs("step") as plain, cell.theirs("captured") as captured:
        sides = {name: side.rate for name, side in ours.items()}
        rates = yield from turns({**sides, "plain": plain, "plain, captured": captured})
    tiny_and_small = (cell.model, cell.batch) == (settings["models"][0], LAUNCH_BOUND)
    bounds = {
        ("graph", "eager"): GRAPH_OVER_EAGER.get(cell.mode) if tiny_and_small else None,
        ("graph", "plain, captured"): 1.15,
        ("graph", "plain"): None,
        ("eager", "plain"): None,
    }
    yield from ratios(rates, bounds, cell.device)
    if cell.best in rates:
        found = rates[cell.best]
        yield attempt(_share, f"{cell.best}: share of the card's product rate", cell, found)
        name = f"{cell.best}: time / its kernels' time"
        yield attempt(_against_kernels, name, cell, ours[cell.best], found)


def epochs(settings: dict[str, Any]) -> Iterator[Row]:
    """Ours against transformers' ``Trainer``, with and without ``torch_compile``."""
    cell = cell_of(settings)
    about = f"{cell.dtype}, adamw_torch_fused, {workers()} persistent pinned workers"
    yield Row("Trainer", None, about)
    with cell.theirs("tuned") as tuned, cell.theirs("compiled") as compiled:
        theirs = {"Trainer": tuned, "Trainer, compiled": compiled}
        rates = yield from turns({cell.best: Ours(cell, cell.best).rate, **theirs})
    had = sorted(theirs.keys() & rates.keys(), key=lambda name: statistics.median(rates[name]))
    bounds: Bounds = {(cell.best, name): None for name in had}
    if had and cell.batch == LAUNCH_BOUND:
        bounds[cell.best, had[-1]] = 5.0  # over the faster one
    yield from ratios(rates, bounds, cell.device)


def script(settings: dict[str, Any]) -> Iterator[Row]:
    """Ours against timm's training script, which trains all weights."""
    cell = cell_of(settings)
    yield Row("timm", None, "its script's loop, written down: its package does not hold the script")
    with cell.theirs("script") as theirs:
        rates = yield from turns({cell.best: Ours(cell, cell.best).rate, "timm": theirs})
    yield from ratios(rates, {(cell.best, "timm"): None}, cell.device)


def modes(settings: dict[str, Any]) -> Iterator[Row]:
    """The modes of all models against ``none``, and from them the time of the full grid."""
    cells = {
        f"{model}, {mode}": cell_of(settings, model=model, mode=mode)
        for model in settings["models"]
        for mode in MODES
    }
    rates = yield from turns({name: Ours(cell, cell.best).rate for name, cell in cells.items()})
    promised = OVER_NONE if settings["batch"] == LAUNCH_BOUND else {}
    bounds = {
        (name, f"{cell.model}, none"): promised.get(cell.mode)
        for name, cell in cells.items()
        if cell.mode != "none"
    }
    yield from ratios(rates, bounds, settings["device"])
    beside = attempt(_beside, "a further trial, beside its epochs and its test", settings)
    yield beside
    yield attempt(_grid, "the full grid", settings, rates, beside)


class Ours:
    """Training epochs of a trial, which is built when the first of them is asked for."""

    def __init__(self, cell: Cell, step: str) -> None:
        self.cell, self.step, self.images = cell, step, cell.batch * cell.steps
        self._training: Training | None = None

    def rate(self) -> float:
        """Images per second of an epoch. Raises ``Missing`` where there are no graphs."""
        return rate(synchronised(self.epoch, self.cell.device), self.images)

    def epoch(self) -> None:
        """All that a trial does in one, but for the evaluation."""
        device, config = self.cell.device, self.cell.config
        if self.step == "graph" and device != "cuda":
            raise Missing(f"--device {device} has no CUDA graphs")
        if self._training is None:
            settings = config.training.model_copy(update={"step": self.step})
            config = config.model_copy(update={"training": settings})
            self._training = started(config, device, self.images)
        train._train_epoch(self._training)
        if self._training.step != self.step:
            assert self._training.graph is not None
            raise RuntimeError(f"no graph: {self._training.graph.failure}")


def turns(sides: Mapping[str, Side]) -> Generator[Row, None, Rates]:
    """A row for each side, and the rates of those that could be had."""
    had: dict[str, Side] = {}
    for name, side in sides.items():
        try:
            side()
            had[name] = side
        except Missing as why:
            yield Row(name, None, f"missing: {why}")
        except Exception as error:  # noqa: BLE001  (of ours alone: the others can be compared)
            traceback.print_exc()
            yield Row(name, False, f"{type(error).__name__}: {first_line(error)}")
    measured = alternate(had, ROUNDS)
    for name, rates in measured.items():
        found = f"{statistics.median(rates):.1f} images/s ({min(rates):.1f} to {max(rates):.1f})"
        yield Row(name, None, found, {"images_per_s": rates})
    return measured


def ratios(rates: Rates, bounds: Bounds, device: str) -> Iterator[Row]:
    """A row for each pair of ``bounds`` that was measured."""
    for (over, under), bound in bounds.items():
        if over in rates and under in rates:
            on_gpu = bound is not None and device == "cuda"
            found = compare(f"{over} / {under}", f">= {bound or 0}", rates, over, under)
            yield Row(found.what, None, told(found, judged=on_gpu), {"ratios": found.ratios})


def told(found: Comparison, *, judged: bool) -> str:
    """``2.31 (2.20 to 2.40), target >= 2.0: met``."""
    words = f"{found.median:.2f} ({min(found.ratios):.2f} to {max(found.ratios):.2f})"
    verdict = "met" if found.met else "**missed**"
    return f"{words}, target {found.target}: {verdict}" if judged else words


def _share(name: str, cell: Cell, rates: list[float]) -> Row:
    """Of the rate that a large matrix product reaches in the same run."""
    peak = product_peak(COMPUTE_DTYPES[cell.dtype], cell.device)
    one = cell._replace(mode="none", batch=1)
    flop = step_flops(started(one.config, one.device, 1))
    share = statistics.median(rates) * flop / peak
    found = f"{share:.1%} of {peak / 1e12:.3g} TFLOP/s in {cell.dtype}"
    figures = {"share": share, "product_flop_per_s": peak, "flop_per_image": flop}
    return Row(name, None, f"{found}; {flop / 1e9:.3g} GFLOP an image", figures)


def _against_kernels(name: str, cell: Cell, ours: Ours, rates: list[float]) -> Row:
    if cell.device != "cuda":
        return Row(name, None, f"missing: --device {cell.device} launches no kernels of CUDA's")
    work = device_work(ours.epoch, cell.device)
    took = [1e3 * ours.images / rate / work["kernels_ms"] for rate in rates]
    judged = cell.batch == LAUNCH_BOUND and cell.mode != "int8"
    words = told(Comparison(name, "<= 1.15", took, {}, ""), judged=judged)
    return Row(name, None, f"{words}; {work['found']}", work)


def _beside(name: str, settings: dict[str, Any]) -> Row:
    """What trials cost that are not the first of their process, by mode."""
    seconds: dict[str, float] = {}
    for mode in ("none", *MODES):  # the first makes what a process makes once
        cell = cell_of(settings, model=settings["models"][0], mode=mode)
        config, step = cell.config, "graph" if cell.best == "graph" else "auto"
        few = {"num_train_epochs": 1, "step": step}
        sizes = {"train_size": cell.batch * cell.steps, "val_size": 20, "test_size": 20}
        config = config.model_copy(
            update={
                "seed": 42 if seconds else 1,
                "training": config.training.model_copy(update=few),
                "data": config.data.model_copy(update=sizes),
            }
        )
        folder, threads = Path(settings["folder"]), torch.get_num_threads()
        where = RunContext(study_dir=folder, device=cell.device, num_threads=threads)
        begun = time.perf_counter()
        results = execute(config, where, lambda row: None)
        took = time.perf_counter() - begun
        known = results["train"]["training_results"]
        seconds[mode] = took - known["train_time_s"] - known["eval_time_s"]
        release_memory()
    found = ", ".join(f"{mode} {value:.2f} s" for mode, value in seconds.items())
    return Row(name, None, found, {"seconds": seconds})


def _grid(name: str, settings: dict[str, Any], rates: Rates, beside: Row) -> Row:
    """144 trials one after the other, from the speed of their steps."""
    sides = [f"{model}, {mode}" for model in settings["models"] for mode in MODES]
    if len(settings["models"]) < 2 or not set(sides) <= rates.keys() or not beside.figures:
        return Row(name, None, "missing: it needs every mode of both models")
    images = GRID_TRIALS * GRID_STEPS * settings["batch"]
    stepping = sum(images / statistics.median(rates[side]) for side in sides) / 60
    around = GRID_TRIALS * len(settings["models"]) * sum(beside.figures["seconds"].values()) / 60
    trials = GRID_TRIALS * len(sides)
    found = Comparison(name, "<= 15", [stepping + around], {}, "min")
    words = (
        f"estimated, {trials} trials of {GRID_STEPS} steps one after the other: {stepping:.1f} min "
        f"of steps and {around:.1f} beside them, without evaluations, the start and the report"
    )
    if settings["device"] == "cuda":
        words += f"; target {found.target} min: {'met' if found.met else '**missed**'}"
    return Row(name, None, words, {"steps_min": stepping, "beside_min": around})
