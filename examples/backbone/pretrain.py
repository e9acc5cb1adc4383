"""Make the demo's backbone again: `python -m examples.backbone.pretrain`.

Trains the ViT to tell procedural glyphs apart (glyphs.py), writes its weights as fp16
safetensors, probes them on digits (probe.py), and writes `record.json` beside the weights.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from torch import nn

from examples.backbone.glyphs import Glyphs, make_glyphs, render
from examples.backbone.probe import evaluate_on_digits
from tune_study.model.backbone import MODEL_NAME, NUM_GLYPHS, RECORD_FILE, WEIGHTS_FILE

LIBRARIES = ("torch", "timm", "bitsandbytes", "scikit-learn", "safetensors", "numpy")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the defaults are those of the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=NUM_GLYPHS)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--easing-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    # Two threads wait for each other when another process wants a core: on two cores of which
    # one was taken, they managed 34 images/s and one thread 290. On idle cores take them all.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=WEIGHTS_FILE, help="a .safetensors file")
    probe = parser.add_mutually_exclusive_group()
    probe.add_argument("--no-probe", action="store_true", help="glyph accuracy only")
    probe.add_argument(
        "--probe-only", action="store_true", help="no training: probe the shipped weights again"
    )
    options = parser.parse_args(arguments)
    if options.output == WEIGHTS_FILE and options.classes != NUM_GLYPHS:
        # The registered configuration names the head's size, so timm could not load the file.
        parser.error(f"the shipped file has {NUM_GLYPHS} classes; give --output for others")
    if options.probe_only and options.output != WEIGHTS_FILE:
        parser.error(
            f"--probe-only is for the shipped weights: leave out --output {options.output}"
        )
    return options


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero; a factor in 0..1."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def distortion(step: int, options: argparse.Namespace) -> float:
    """Strength of the glyphs' distortion, 0..1: from none to full over the first steps.

    Started at full strength, the loss stays at chance for hundreds of steps.
    """
    return min(1.0, step / max(1, options.easing_steps))


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices only: decaying norms, biases and tokens gains nothing."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "token" not in n]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))


def train(model: nn.Module, glyphs: Glyphs, options: argparse.Namespace) -> None:
    """Train in place on fresh samples: no image is ever seen twice."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    optimizer = make_optimizer(model, options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.warmup_steps, options.steps)
    )
    model.train()
    start, shown_loss = time.perf_counter(), 0.0
    for step in range(1, options.steps + 1):
        labels = torch.randint(options.classes, (options.batch_size,), generator=generator)
        images = render(glyphs, labels, generator, distortion(step, options))
        # On the CPU that made the shipped weights, bf16 runs 2.5 times as fast as fp32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        shown_loss += loss.detach().item()
        if step % 100 == 0:
            rate = step * options.batch_size / (time.perf_counter() - start)
            print(f"step {step} loss {shown_loss / 100:.3f} {rate:.0f} images/s", flush=True)
            shown_loss = 0.0


@torch.inference_mode()
def glyph_accuracy(model: nn.Module, glyphs: Glyphs, seed: int, per_class: int = 10) -> float:
    """Top-1 accuracy in 0..1 on fresh samples, `per_class` of each class, in fp32."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(glyphs.kind)).repeat(per_class)
    # render degrades by position in the batch, so the order must not follow the classes.
    labels = labels[torch.randperm(len(labels), generator=generator)]
    right = sum(
        (model(render(glyphs, part, generator)).argmax(1) == part).sum().item()
        for part in labels.split(256)
    )
    return right / len(labels)


def save_fp16(model: nn.Module, file: Path) -> None:
    """Write all parameters as fp16 safetensors, whole or not at all."""
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read, which a wheel would carry along.
    temporary.chmod(0o644)
    os.replace(temporary, file)


def describe_machine() -> str:
    """Cores and CPU model in words, and nothing that names the machine."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [n for n in information.read_text().splitlines() if n.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{os.cpu_count()} CPU cores, {model}"


def make_record(options: argparse.Namespace, **figures: Any) -> dict[str, Any]:
    """What was run, on what, and what came out; the output path is left out on purpose."""
    names = ("steps", "batch_size", "classes", "learning_rate", "weight_decay", "warmup_steps")
    settings = {n: getattr(options, n) for n in (*names, "easing_steps", "seed", "threads")}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    return {
        "model": MODEL_NAME,
        "command": f"python -m examples.backbone.pretrain {flags}",
        **settings,
        **environment(),
        **figures,
    }


def environment() -> dict[str, Any]:
    """The part of a record that says where its figures come from."""
    return {
        "machine": describe_machine(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def digits_record(model: nn.Module) -> dict[str, Any]:
    """The record's `digits` part, which `--probe-only` may make elsewhere than the weights."""
    return {**environment(), **evaluate_on_digits(model)}


def probe_again() -> None:
    """Replace the `digits` part of the shipped weights' record."""
    record = json.loads(RECORD_FILE.read_text())
    record["digits"] = digits_record(timm.create_model(MODEL_NAME, pretrained=True))
    RECORD_FILE.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["digits"], indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, evaluate what was saved, and write the record."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if options.probe_only:
        probe_again()
        return
    # Torch's fused attention has a slow bf16 backward on CPUs: this doubles the speed.
    set_fused_attn(False)
    torch.manual_seed(options.seed)
    glyphs = make_glyphs(options.classes, options.seed)
    model = timm.create_model(MODEL_NAME, num_classes=options.classes)
    start = time.perf_counter()
    train(model, glyphs, options)
    duration_s = round(time.perf_counter() - start)
    save_fp16(model, options.output)
    # What is judged is what is shipped: the weights as fp16 rounded them.
    overlay = {"file": str(options.output), "num_classes": options.classes}
    model = timm.create_model(
        MODEL_NAME, pretrained=True, num_classes=options.classes, pretrained_cfg_overlay=overlay
    )
    accuracy = glyph_accuracy(model, glyphs, options.seed + 2)
    print(f"glyph accuracy {accuracy:.4f} after {duration_s} s", flush=True)
    record = make_record(
        options,
        duration_s=duration_s,
        images_seen=options.steps * options.batch_size,
        parameters=sum(p.numel() for p in model.parameters()),
        file_bytes=options.output.stat().st_size,
        glyph_accuracy=round(accuracy, 4),
    )
    if not options.no_probe:
        record["digits"] = digits_record(model)
    target = RECORD_FILE if options.output == WEIGHTS_FILE else options.output.with_suffix(".json")
    target.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
