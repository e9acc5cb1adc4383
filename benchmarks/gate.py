"""Is a step that a CUDA graph replays the eager one? ``python -m benchmarks.accelerator --gate``.

``training.step=auto`` takes the graph once every row of this is green on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.processes import Row, attempt
from benchmarks.repeats import repeated
from benchmarks.steps import MODES, config_of, started
from tune_study.checks.modes import drawn, quantized_layer, small_trial
from tune_study.config import TrialConfig
from tune_study.machine.resources import release_memory
from tune_study.model.outliers import make_static
from tune_study.trial import train
from tune_study.trial.context import RunContext
from tune_study.trial.execution import execute
from tune_study.trial.graph import WARM_UP, step_of
from tune_study.trial.training import Training

STEPS = 20
EPOCHS = 2
OUTLIERS = (0, 1, 3, 100)
LAST = 7
"""Images of the last, smaller batch."""
CASES = {
    "a step": {},
    "with the noise scale": {"gradient_noise_scale": True},
    "accumulation 2": {"gradient_accumulation_steps": 2},
}


def gates(settings: dict[str, Any]) -> Iterator[Row]:
    """A mode's rows: equal steps, a trial twice, killed and continued, out of memory.

    int8's begin with its products, static against bitsandbytes' own: the eager steps to which
    captured ones are compared are static, too.
    """
    device, folder = settings["device"], Path(settings["folder"])
    for mode in MODES:
        config = _with(config_of(settings["models"][0], mode, settings["batch"], device))
        if mode == "int8":
            for columns in OUTLIERS:
                yield attempt(_product, f"int8: a product with {columns} outliers", columns, device)
        for words, changed in CASES.items():
            name = f"{mode}: {words}, eager and captured"
            yield attempt(_equal, name, _with(config, **changed), device)
            release_memory()
        trial = _trial(mode, device)
        yield from repeated({mode: trial}, folder, device)
        for words, check in (("before", _before_capture), ("during", _during_capture)):
            name = f"{mode}: out of memory {words} the capture"
            yield attempt(check, name, trial, folder / f"{mode}-{words}", device)


def _with(config: TrialConfig, **training: Any) -> TrialConfig:
    """``config`` with a graph, and ``training`` changed; of accumulated images as many."""
    settings = config.training
    micro = settings.per_device_train_batch_size // training.get("gradient_accumulation_steps", 1)
    changed = {
        "step": "graph",
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        **training,
    }
    return config.model_copy(update={"training": settings.model_copy(update=changed)})


def _trial(mode: str, device: str) -> TrialConfig:
    """Two epochs of steps before, by and after the graph, and evaluations of five batches."""
    trial = small_trial(mode, torch.device(device))
    trial = _with(trial, num_train_epochs=EPOCHS, per_device_eval_batch_size=4)
    images = (WARM_UP + 2) * trial.images_per_step + LAST
    return trial.model_copy(update={"data": trial.data.model_copy(update={"train_size": images})})


def _equal(name: str, config: TrialConfig, device: str) -> Row:
    found = {}
    for step in ("eager", "graph"):
        settings = config.training.model_copy(update={"step": step})
        found[step] = _trained(config.model_copy(update={"training": settings}), device)
        release_memory()
    eager, graph = found["eager"], found["graph"]
    differ = [what for what, tensor in eager.items() if not _same(tensor, graph[what])]
    if not differ:
        return Row(name, True, f"equal to the last bit: {len(eager)} tensors, {STEPS} steps twice")
    by = {what: float((eager[what].double() - graph[what].double()).abs().max()) for what in differ}
    told = f"{len(differ)} of {len(eager)} tensors differ: {', '.join(differ[:3])}"
    return Row(name, False, told, {"differ_by": by})


def _same(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))


def _product(name: str, columns: int, device: str) -> Row:
    """A layer's output and its gradient, of rows with outliers in that many columns."""
    layer: Any = quantized_layer("int8", torch.device(device), (384, 384), torch.bfloat16)
    rows = drawn(32, 197, 384).clamp(-5, 5)
    rows[0, 0, :columns] = torch.linspace(6, 30, columns)
    gradient = drawn(32, 197, 384, seed=2).to(device, torch.bfloat16)
    found = {}
    for which in ("bitsandbytes' own", "static"):
        if which == "static":
            make_static(layer)
        leaf = rows.to(device, torch.bfloat16).requires_grad_()
        out = layer(leaf)
        found[which] = [out.detach(), *torch.autograd.grad(out, leaf, gradient)]
    pairs = zip(("output", "gradient"), *found.values(), strict=True)
    differ = {w: float((a - b).abs().max()) for w, a, b in pairs if not torch.equal(a, b)}
    told = " and ".join(f"{what} differs by {most:.1e}" for what, most in differ.items())
    return Row(name, not differ, told or "static and bitsandbytes' own equal to the last bit")


def _trained(config: TrialConfig, device: str) -> dict[str, Tensor]:
    """What epochs leave: learned tensors, AdamW's, generators, what was kept of each step; and an
    evaluation of the last state."""
    training = started(config, device, STEPS * config.images_per_step + LAST)
    training.outliers = training.outliers or make_static(training.model)
    found: dict[str, Tensor] = {}
    watches = {"monitor": training.monitor, "noise scale": training.noise}
    for epoch in range(EPOCHS):
        for name, watch in watches.items():
            if watch is not None:
                watch.end_epoch = _kept(watch, found, f"{name}, epoch {epoch + 1}")  # type: ignore[method-assign]
        train._train_epoch(training)
    evaluation = train.evaluate(training, training.data.train)
    found["evaluation"] = torch.tensor(evaluation, dtype=torch.float64)
    graphs = training.graph, training.evaluation
    if step_of(config) == "graph" and not all(graph and graph.captured for graph in graphs):
        raise RuntimeError(f"no graph: {[graph and graph.failure for graph in graphs]}")
    found |= {name: p.detach().cpu().clone() for name, p in training.parameters.items()}
    for number, state in training.optimizer.state_dict()["state"].items():
        found |= {f"AdamW's {key} {number}": value.cpu().clone() for key, value in state.items()}
    generators = training.state_dict()["generators"]
    return found | {f"generator {name}": state.clone() for name, state in generators.items()}


def _kept(watch: Any, found: dict[str, Tensor], name: str) -> Callable[[], Any]:
    ended = type(watch).end_epoch

    def end() -> Any:
        found[name] = watch._records[: watch._kept].cpu().clone()
        return ended(watch)

    return end


def _planted(when: Callable[[int], bool]) -> Any:
    """``step_on_device`` that runs out of memory once, in the call for which ``when`` is true."""
    step, calls, planted = train.step_on_device, [], []

    def failing(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if not planted and when(len(calls)):
            planted.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Planted by the gate")
        return step(training, images, labels)

    return patch.object(train, "step_on_device", failing)


def _run(trial: TrialConfig, folder: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """(resource_metrics, warnings) of a trial that completed."""
    results = execute(trial, RunContext(study_dir=folder, device=device), lambda row: None)
    if results["status"] != "completed":
        raise RuntimeError(f"the trial ended as {results['status']}")
    return results["train"]["resource_metrics"], results["warnings"]


def _before_capture(name: str, trial: TrialConfig, folder: Path, device: str) -> Row:
    """In an eager step: half the micro-batch, and then a graph all the same."""
    with _planted(lambda call: call == WARM_UP - 1):
        taken, _ = _run(trial, folder, device)
    half = trial.training.per_device_train_batch_size // 2
    good = (taken["batch_size"], taken["step"]) == (half, "graph")
    return Row(name, good, f"went on with micro-batches of {taken['batch_size']}, {taken['step']}")


def _during_capture(name: str, trial: TrialConfig, folder: Path, device: str) -> Row:
    """The same micro-batch, eager, and said."""
    with _planted(lambda call: call == WARM_UP + 1):
        taken, warnings = _run(trial, folder, device)
    whole = trial.training.per_device_train_batch_size
    said = any("could not be captured as a CUDA graph" in warning for warning in warnings)
    good = said and (taken["batch_size"], taken["step"]) == (whole, "eager")
    return Row(name, good, f"went on with micro-batches of {taken['batch_size']}, {taken['step']}")
