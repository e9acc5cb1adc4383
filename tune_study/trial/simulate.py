"""Trials that are drawn, not trained: to test the analysis, and to plan a study. Always marked.

The model of a trial with configuration c (all but quantization and seed), treatment m and seed s:

    accuracy = 0.90 + a_c + effect_m + b_cm + u_cs + e_cms

a_c ~ N(0, 0.02) is the configuration's, effect_m is planted (0 unless told: ``nf4=-0.01`` in every
configuration, ``nf4=-0.02@training.learning_rate=0.01`` in those of this level, added up), b_cm ~
N(0, 0.002) is how the effect differs between configurations by chance (0 for ``none``), and u_cs,
e_cms ~ N(0, seed_sd) are the seed's, shared by its modes and not. The validation accuracy of epoch
t approaches it as 1 - exp(-t / 2). Losses follow the accuracies; bytes are the exact expected ones
of the weights; what has no model is missing. Every draw depends on the settings alone, so the same
study is drawn in any order and after any restart. Nothing here loads torch, unless it has to count
what the command tells its workers (``known.py``).
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from tune_study.config import LoraSpec, TrialConfig
from tune_study.folder.files import write_json
from tune_study.machine.provenance import commit, versions
from tune_study.trial.context import Simulation

BASE_ACCURACY, CONFIGURATION_SD, INTERACTION_SD, EPOCHS_TO_LEARN = 0.90, 0.02, 0.002, 2.0
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}


def draw(config: TrialConfig, simulation: Simulation) -> tuple[list[dict[str, Any]], float]:
    """(the epochs' rows, the test accuracy) of one trial, by the model above."""
    mode, names = config.treatment, _names(config)
    accuracy = BASE_ACCURACY + CONFIGURATION_SD * _normal("configuration", *names)
    if mode != "none":
        accuracy += simulation.effect(config)
        accuracy += INTERACTION_SD * _normal("interaction", *names, mode)
    accuracy += simulation.seed_sd * _normal("seed", *names, config.seed)
    accuracy += simulation.seed_sd * _normal("trial", *names, mode, config.seed)
    test = float(np.clip(accuracy, 0, 1))
    rows = []
    for epoch in range(1, config.training.num_train_epochs + 1):
        learned = 1 - math.exp(-epoch / EPOCHS_TO_LEARN)
        noise = 0.1 * simulation.seed_sd * _normal("epoch", *names, mode, config.seed, epoch)
        val = float(np.clip(accuracy * learned + noise, 0, 1))
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 0.9 * (1 - val) + 0.1,
                "train_accuracy": min(1.0, val + 0.01),
                "val_loss": (1 - val) + 0.1,
                "val_accuracy": val,
                "learning_rate": config.training.learning_rate,
                "images_per_s": math.nan,
            }
        )
    return rows, test


def _names(config: TrialConfig) -> tuple[Any, ...]:
    """What the draws of a configuration belong to: model, data set, rank, alpha, and each other
    setting that is not the default, so that a field that joins changes no study from before it.
    """
    lora = config.lora
    like = LoraSpec(r=lora.r, lora_alpha=lora.lora_alpha)
    usual = TrialConfig(model=config.model, dataset=config.dataset, lora=like)
    other = [own for own in config.configuration if own not in usual.configuration]
    return config.model, config.dataset, lora.r, lora.lora_alpha, *other


def _normal(*names: object) -> float:
    """A standard normal draw that belongs to ``names``."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return float(np.random.default_rng(int.from_bytes(digest[:16], "big")).standard_normal())


def execute(
    config: TrialConfig,
    simulation: Simulation,
    study_dir: Path,
    report: Any,
    epoch_s: float = 0.0,
    known: dict[str, Any] | None = None,
) -> None:
    """Reports the drawn epochs, ``epoch_s`` apart, and writes a trial's files as a real one.

    ``known`` is as in ``results_of``.
    """
    folder = study_dir / config.trial_id
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    rows, _ = draw(config, simulation)
    for row in rows:
        time.sleep(epoch_s)
        report({**row, "best_val_accuracy": max(r["val_accuracy"] for r in rows[: row["epoch"]])})
    write_json(folder / "results.json", results_of(config, simulation, known=known))


def results_of(
    config: TrialConfig,
    simulation: Simulation,
    epochs: int | None = None,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The drawn results.json; for a trial that ended after ``epochs``, without a test.

    ``known`` is what ``known_of`` says of ``config``; it is counted here where nobody has.
    """
    if known is None:
        from tune_study.trial.known import known_of

        known = known_of(config)
    rows, test = draw(config, simulation)
    rows = rows[:epochs]
    best = max(rows, key=lambda row: row["val_accuracy"])
    return {
        "trial_id": config.trial_id,
        "status": "completed",
        "simulated": True,
        "error": None,
        "run": {
            "config": config.model_dump(mode="json"),
            "device": None,
            "simulation": simulation.model_dump(mode="json"),
        },
        "train": {
            "training_results": {
                "epochs_completed": len(rows),
                "best_epoch": best["epoch"],
                "val_accuracy": best["val_accuracy"],
            },
            "test_metrics": {"test_accuracy": test} if epochs is None else {},
            "model_metrics": {"num_classes": CLASSES.get(config.dataset), **known["weights"]},
            "resource_metrics": dict.fromkeys(
                ("peak_source", "energy_source"), "simulated: nothing was run"
            ),
            "epochs": rows,
        },
        "meta": {"versions": versions(), "commit": commit(), "hardware": known["hardware"]},
    }
