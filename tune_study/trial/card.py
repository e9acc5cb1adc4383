"""README.md of a saved adapter: what it is of, what it gets, how it was made; no template."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.statistics.inference import t_interval
from tune_study.folder.files import mapping, write_whole
from tune_study.folder.results import measured

FILE = "README.md"


def write_card(
    adapter: Path, results: Mapping[str, Any], command: str | None, accuracies: Sequence[float] = ()
) -> None:
    """Writes the model card into the folder of a saved ``adapter``.

    ``results`` is results.json. ``accuracies`` are the test accuracies of the trials of its study
    that differ from this one in the seed alone, itself included.
    """
    lines = "\n".join(_lines(adapter, results, command, accuracies))
    write_whole(
        adapter / FILE, lambda temporary: temporary.write_text(lines + "\n", encoding="utf-8")
    )


def _lines(
    adapter: Path, results: Mapping[str, Any], command: str | None, accuracies: Sequence[float]
) -> list[str]:
    config = results["run"]["config"]
    file_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    row, numbers = measured(results), mapping(results, "train", "model_metrics")
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    mode, seed = config["quantization"]["mode"], config["seed"]
    facts = {
        "trial": results["trial_id"],
        "base model": f"{base} (timm)" if config["pretrained"] else f"{base}, RANDOM weights",
        "base weights": _of_base(mode, row),
        "data set": _of_data(config["dataset"], numbers),
        "LoRA": ", ".join(f"{name} {value}" for name, value in config["lora"].items()),
        "test accuracy": f"{row['test_accuracy']:.4f} (seed {seed})",
        **_over_seeds(accuracies),
        "adapter": f"{file_bytes:,} bytes, head included",
        "peak of a training step": _bytes(row.get("peak_train_bytes")),
        "training": ", ".join(f"{k} {v}" for k, v in config["training"].items()),
        "command": command or "unknown",
        "versions": ", ".join(f"{k} {v}" for k, v in results["meta"]["versions"].items()),
    }
    return [
        *_front_matter(base),
        f"# LoRA adapter of {_plain(config['model'])}, {mode}, on {_plain(config['dataset'])}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_plain(value)} |" for name, value in facts.items()),
        "",
        *_loading(base, config, numbers.get("num_classes")),
    ]


def _front_matter(base: str) -> list[str]:
    """For the hub, which links the base model if it has it."""
    there = [f"base_model: {base}"] if "/" in base else []
    kind = ["library_name: peft", "pipeline_tag: image-classification"]
    return ["---", *there, *kind, "tags: [lora, timm, tune-study]", "---"]


def _of_base(mode: str, row: Mapping[str, Any]) -> str:
    weights, full = _bytes(row.get("weights_bytes")), _bytes(row.get("weights_bytes_fp32"))
    if mode == "none":
        return f"{weights}, not quantized"
    return f"{weights} in {mode} ({row.get('quantized_layers')} layers), {full} in fp32"


def _of_data(dataset: str, numbers: Mapping[str, Any]) -> str:
    parts = [f"{numbers.get(f'{part}_images')} {part}" for part in ("train", "val", "test")]
    sha256 = str(numbers.get("data_sha256"))[:12]
    return f"{dataset}, {numbers.get('num_classes')} classes, images: {', '.join(parts)} ({sha256})"


def _over_seeds(accuracies: Sequence[float]) -> dict[str, str]:
    values = np.array([value for value in accuracies if math.isfinite(value)], np.float64)
    if len(values) < 2:
        return {"over seeds": "one seed: no interval"}
    low, high = t_interval(values)
    interval = "no spread, so no interval"
    if math.isfinite(low):
        interval = f"95 % interval {low:.4f} to {high:.4f} (Student's t over seeds)"
    return {f"over {len(values)} seeds": f"mean test accuracy {values.mean():.4f}, {interval}"}


def _loading(base: str, config: Mapping[str, Any], classes: Any) -> list[str]:
    size = config["data"]["image_size"]
    name = f"hf-hub:{base}" if "/" in base else base
    options = f", pretrained=True, num_classes={classes}" + (f", img_size={size}" if size else "")
    return [
        "```python",
        "import timm",
        "from peft import PeftModel",
        "",
        f"base = timm.create_model({name!r}{options})",
        'model = PeftModel.from_pretrained(base, "FOLDER OF THIS FILE").eval()',
        "```",
        "",
        "A base that was quantized is to be quantized the same way before the adapter is put on: "
        "docs/your-own.md of tune-study does it, and measures the accuracy above anew.",
    ]


def _bytes(value: Any) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:,.0f} bytes" if known else "unknown"


def _plain(value: Any) -> str:
    """Within one cell of a table, and without HTML of someone's folder name."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;")
