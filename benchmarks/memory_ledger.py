"""The ledger of a training step, predicted and measured, for docs/memory.md.

    python benchmarks/memory_ledger.py measure docs/figures/memory_ledger.json
    python benchmarks/memory_ledger.py draw docs/figures/memory_ledger.json FIGURE.png

Bytes do not depend on what the weights are, so the models start from random ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
MODES = ("none", "int8", "nf4", "nf4-dq")
BATCHES = (1, 8, 32)
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the study": {},
    "no LoRA dropout": {"lora": {"lora_dropout": 0.0}},
    "gradient checkpointing": {"training": {"gradient_checkpointing": True}},
    "fp32 compute": {"training": {"compute_dtype": "fp32"}},
}
CATEGORIES = {
    "step_weights_bytes": "frozen weights",
    "quantization_state_bytes": "quantization state",
    "adapter_bytes": "adapters and head",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activation_bytes": "activations",
}


def cells() -> list[tuple[str, str, int, str]]:
    """(model, mode, batch, variant): the grid, and the variants at batch 8."""
    grid = [(m, q, b, "as in the study") for b in BATCHES for m in MODELS for q in MODES]
    others = [v for v in VARIANTS if v != "as in the study"]
    return grid + [(m, q, 8, v) for m in MODELS for v in others for q in MODES]


def measure_cell(model: str, mode: str, batch: int, variant: str) -> dict[str, Any]:
    import torch

    from tune_study.config import parse_trial
    from tune_study.data.place import Place
    from tune_study.data.splits import load
    from tune_study.memory.predict import predict
    from tune_study.model.build import build_model
    from tune_study.trial import train

    changes = VARIANTS[variant]
    config = parse_trial(
        {
            "model": model,
            "dataset": "digits",
            "lora": {"r": 8, "lora_alpha": 16, **changes.get("lora", {})},
            "quantization": mode,
            "pretrained": False,
            "training": {"per_device_train_batch_size": batch, **changes.get("training", {})},
        }
    )
    device = torch.device("cpu")
    expected = predict(config, 10, device)
    built = build_model(config, 10)
    training = train.start(config, built, load("digits", Place(), config.data), device)
    measured = train.measure_memory(training)
    return {
        "model": model,
        "mode": mode,
        "batch": batch,
        "variant": variant,
        "weights_bytes": built.weights_bytes,
        "weights_bytes_fp32": built.bytes_fp32,
        "quantizable_bytes": built.quantizable_bytes,
        "measured": measured._asdict(),
        "predicted": {**expected.ledger._asdict(), "peak_train_bytes": expected.peak_train_bytes},
    }


def measure(target: Path) -> None:
    rows = []
    for cell in cells():
        rows.append(measure_cell(*cell))
        print(*cell, rows[-1]["measured"]["peak_train_bytes"], flush=True)
        target.write_text(json.dumps(rows, indent=1))


def draw(source: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in json.loads(source.read_text()) if r["variant"] == "as in the study"]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for axis, (model, batch) in zip(
        axes.flat, [(m, b) for m in MODELS for b in BATCHES], strict=True
    ):
        shown = [r for r in rows if r["model"] == model and r["batch"] == batch]
        base = [0.0] * len(shown)
        for colour, (name, label) in zip(colours, CATEGORIES.items(), strict=False):
            heights = [r["measured"][name] / 1e6 for r in shown]
            axis.bar([r["mode"] for r in shown], heights, bottom=base, color=colour, label=label)
            base = [b + h for b, h in zip(base, heights, strict=True)]
        peaks = [r["measured"]["peak_train_bytes"] / 1e6 for r in shown]
        modes = [r["mode"] for r in shown]
        axis.plot(modes, peaks, "k_", markersize=24, label="measured peak")
        axis.set_title(f"{model.split('_patch')[0]}, batch {batch}", fontsize=10)
        axis.set_ylabel("MB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle("Bytes of one training step, measured (LoRA r 8, dropout 0.1, bf16, CPU)")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["measure", target]:
            measure(Path(target))
        case ["draw", source, target]:
            draw(Path(source), Path(target))
        case _:
            sys.exit(__doc__)
