"""How the time and memory of the analysis grow with the study.

    python benchmarks/analysis_scaling.py   # 144 / 1,000 / 10,000 / 100,000 trials x 15 epochs

Each size runs in a process of its own: read the tables, compare the modes, measure and compare
convergence. ``process s`` is the whole life of that process, so the interpreter's start and all
imports are in it. The studies are invented numbers in the schema's columns, written to a temporary
folder beforehand; writing is not counted. Each figure is the median of ``--repeats`` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis import convergence, load, statistics
from tune_study import schema

MODES, SEEDS, EPOCHS = ("none", "int8", "nf4", "nf4-dq"), (42, 123, 456), 15


def synthetic_study(folder: Path, n_trials: int) -> None:
    """study.json and the parquet tables of ``n_trials`` finished trials."""
    rng = np.random.default_rng(0)
    number = np.arange(n_trials)
    configuration = number // (len(MODES) * len(SEEDS))
    trials = pd.DataFrame(
        {
            "trial_id": [f"trial-{i:08d}" for i in number],
            "model": np.where(configuration % 2, "deit_small_patch16_224", "deit_tiny_patch16_224"),
            "dataset": np.where(configuration % 4 < 2, "cifar10", "cifar100"),
            "lora_r": configuration // 4 + 1,
            "lora_alpha": 2 * (configuration // 4 + 1),
            "quantization": np.take(MODES, number % len(MODES)),
            "seed": np.take(SEEDS, number // len(MODES) % len(SEEDS)),
            "status": "completed",
            "simulated": False,
            "epochs_completed": EPOCHS,
            "test_accuracy": np.clip(rng.normal(0.9, 0.01, n_trials), 0, 1),
        }
    )
    epoch = np.tile(np.arange(1, EPOCHS + 1), n_trials)
    noise = rng.normal(0, 0.003, (2, len(epoch)))
    epochs = pd.DataFrame(
        {
            "trial_id": np.repeat(trials["trial_id"].to_numpy(), EPOCHS),
            "epoch": epoch,
            "train_loss": 2 * np.exp(-epoch / 3) + 0.1 + noise[0],
            "train_accuracy": np.clip(0.92 * (1 - np.exp(-epoch / 3)), 0, 1),
            "val_loss": 2 * np.exp(-epoch / 3) + 0.2 + noise[0],
            "val_accuracy": np.clip(0.9 * (1 - np.exp(-epoch / 3)) + noise[1], 0, 1),
        }
    )
    plan = [
        {
            "trial_id": row["trial_id"],
            "model": row["model"],
            "dataset": row["dataset"],
            "lora": {"r": row["lora_r"], "lora_alpha": row["lora_alpha"]},
            "quantization": {"mode": row["quantization"]},
            "seed": row["seed"],
        }
        for row in trials.to_dict("records")
    ]
    manifest = {"format": 1, "study": folder.name, "simulated": False, "plan": plan}
    (folder / "study.json").write_text(json.dumps(manifest))
    for name, frame, columns in (
        ("trials", trials, schema.TRIALS),
        ("epochs", epochs, schema.EPOCHS),
    ):
        names = [column.name for column in columns]
        frame.reindex(columns=names).astype(schema.dtypes(columns)).to_parquet(
            folder / f"{name}.parquet", index=False
        )


def analyse(folder: Path) -> dict[str, Any]:
    """Seconds per step, and this process's peak resident memory in bytes."""
    times, start = {}, time.perf_counter()
    study = load.read_study(folder)
    if study.problems:
        raise RuntimeError(study.problems[0])
    times["read"] = time.perf_counter() - start
    statistics.compare_modes(study.trials)
    times["compare"] = time.perf_counter() - start - times["read"]
    table = convergence.convergence_table(study.epochs, study.trials)
    convergence.compare_convergence(table)
    times["total"] = time.perf_counter() - start
    times["convergence"] = times["total"] - times["read"] - times["compare"]
    return {**times, "trials": len(study.trials), "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(n_trials: int, cores: int = 2, repeats: int = 3) -> dict[str, Any]:
    """Medians of :func:`analyse` of ``n_trials`` trials, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        synthetic_study(Path(folder), n_trials)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
        command = [sys.executable, __file__, "--analyse", folder, "--cores", str(cores)]
        rows = []
        for _ in range(repeats):
            start = time.perf_counter()
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | threads
            )
            process = time.perf_counter() - start
            rows.append({**json.loads(done.stdout), "process": process})
    return pd.DataFrame(rows).median().to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[144, 1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--analyse", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.analyse:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        print(json.dumps(analyse(options.analyse)))
        return
    print(
        "| trials | epochs rows | read s | compare s | convergence s | total s | process s "
        "| peak RSS MiB |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for n_trials in options.trials:
        row = measure(n_trials, options.cores, options.repeats)
        steps = ("read", "compare", "convergence", "total", "process")
        seconds = " | ".join(f"{row[k]:.2f}" for k in steps)
        print(
            f"| {row['trials']:,.0f} | {row['trials'] * EPOCHS:,.0f} | {seconds} "
            f"| {row['peak_rss_bytes'] / 2**20:,.0f} |"
        )


if __name__ == "__main__":
    main()
