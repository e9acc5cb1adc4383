"""The state of a trial between two epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tune_study.config import TrialConfig
from tune_study.data.batches import Preprocessing, normalisation
from tune_study.data.splits import Dataset
from tune_study.data.transform import Transform
from tune_study.machine.device import random_states, set_random_states
from tune_study.model.initial import Factors
from tune_study.model.noise_scale import NoiseScale
from tune_study.model.outliers import Outliers
from tune_study.trial.gradients import GradientFlowMonitor
from tune_study.trial.graph import GraphedStep
from tune_study.trial.schedule import Schedule, hold_rate

Row = dict[str, float]


@dataclass
class Training:
    """All that a trial is made of. ``state_dict`` holds what its epochs change."""

    config: TrialConfig
    model: nn.Module
    preprocessing: Preprocessing
    data: Dataset
    device: torch.device
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    generator: torch.Generator
    """Batch order and augmentation. Dropout draws from torch's global generator."""
    monitor: GradientFlowMonitor
    noise: NoiseScale | None = None
    """Only where the configuration asks for it."""
    history: list[Row] = field(default_factory=list)
    layer_gradients: list[list[float]] = field(default_factory=list)
    """Mean gradient norm of each trainable tensor, per epoch."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The trainable parameters at the best epoch, on the CPU."""
    best_epoch: int = 0
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """What the adapters took of the base when they began (``BuiltModel.factors``)."""
    transform: Transform | None = None
    """The user's own, in the place of an augmentation."""
    graph: GraphedStep | None = None
    """Takes the steps on full batches, where ``training.step`` is ``graph``."""
    evaluation: GraphedStep | None = None
    """Takes the full batches of evaluations, in such a trial."""
    outliers: Outliers | None = None
    """What the int8 layers of such a trial have met."""
    joules: Callable[[], float] = lambda: math.nan
    """What the device has taken so far (``EnergyMeter``); NaN where nothing counts it."""

    @property
    def step(self) -> str:
        """How steps are given to the device: ``eager`` or ``graph``."""
        return "graph" if self.graph is not None and self.graph.failure is None else "eager"

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """The constants of ``preprocess``, made once."""
        return normalisation(self.preprocessing, self.device)

    @property
    def best_accuracy(self) -> float:
        return self.history[self.best_epoch - 1]["val_accuracy"] if self.best_epoch else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {
            "adapter": {name: p.detach().cpu() for name, p in self.parameters.items()},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": {
                "batches": self.generator.get_state(),
                **random_states(self.device),
            },
            "monitor": self.monitor.state_dict(),
            "history": self.history,
            "layer_gradients": self.layer_gradients,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where ``state_dict`` was taken."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        hold_rate(self.optimizer, self.device)
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generators"]["batches"])
        set_random_states(state["generators"], self.device)
        self.monitor.load_state_dict(state["monitor"])
        self.best = dict(state["best"])
        self.history = list(state["history"])
        self.layer_gradients = list(state["layer_gradients"])
        self.best_epoch = int(state["best_epoch"])
