"""What people would use instead: PEFT and bitsandbytes as their documentation shows them.

Nothing here is tuned: default arguments, PIL images through torchvision's transforms, and
transformers' ``Trainer`` with two worker processes, in fp32, and once more under bf16 autocast
where our trials compute in bf16. It runs in a process of its own, without the settings that ours
gives to torch's threads (tune_study/machine/environment.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import numpy as np
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.steps import bare_step, config_of, started, synchronised
from benchmarks.timing import Comparison, alternate, compare, rate
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.machine import environment
from tune_study.trial import train

WORKERS = 2
LONGER = 5
"""An epoch takes this many times the steps of other measurements: ``Trainer`` starts its workers
anew for each, which weighs nothing in a real one and would flatter us in a short one."""


@contextmanager
def peer(what: str, *arguments: object) -> Iterator[Callable[[], float]]:
    """() -> images per second of the next measurement of ``what``: step or epoch."""
    command = [sys.executable, "-m", "benchmarks.peers", what, *map(str, arguments)]
    untouched = {k: v for k, v in os.environ.items() if k not in environment.set_by_prepare}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=untouched
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def measure() -> float:
            print(file=questions, flush=True)
            return float(answers.readline())

        yield measure  # leaving closes the questions, and so ends the other end


def serve(
    what: str, model: str, mode: str, batch: int, steps: int, device: str, dtype: str
) -> None:
    """The other end of :func:`peer`: measures once for every line that comes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    images = batch * steps
    with tempfile.TemporaryDirectory() as folder:
        if what == "epoch":
            measure = trainer_epoch(model, mode, batch, images, device, dtype, folder)
        else:
            work = synchronised(plain_step(model, mode, batch, device, dtype), device, steps)

            def measure() -> float:
                return rate(work, images)

        for _ in sys.stdin:
            print(measure(), file=answers, flush=True)


def side_of(name: str) -> int:
    """Pixels of the model's images, as timm has them."""
    return timm.get_pretrained_cfg(name).input_size[-1]


class Classifier(nn.Module):
    """The (loss, logits) that ``Trainer`` wants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def plain_model(name: str, mode: str, device: str) -> nn.Module:
    """timm, bitsandbytes' layers with their defaults, PEFT's LoRA."""
    model = timm.create_model(name, pretrained=False, num_classes=10)
    if mode != "none":
        for block in model.blocks:
            for parent, child in (
                (block.attn, "qkv"),
                (block.attn, "proj"),
                (block.mlp, "fc1"),
                (block.mlp, "fc2"),
            ):
                linear = getattr(parent, child)
                shape = linear.in_features, linear.out_features
                if mode == "int8":
                    layer: Any = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
                else:
                    layer = bnb.nn.LinearNF4(*shape)
                layer.load_state_dict(linear.state_dict())
                setattr(parent, child, layer)
        setattr(model, "is_loaded_in_8bit" if mode == "int8" else "is_loaded_in_4bit", True)
    model.requires_grad_(False)
    targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets, modules_to_save=["head"]
    )
    return get_peft_model(model.to(device), lora).to(device)


def plain_step(name: str, mode: str, batch: int, device: str, dtype: str) -> Callable[[], None]:
    """Forward, backward and optimizer on one fixed batch."""
    model = plain_model(name, mode, device).train()
    pixels = torch.randn(batch, 3, side_of(name), side_of(name), device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            scores = model(pixels)
        cross_entropy(scores.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_against_plain(
    model: str, mode: str, batch: int, dtype: str, steps: int, rounds: int, device: str
) -> Comparison:
    """Our bare step against the plain one, which computes in ``dtype``."""
    step = bare_step(started(config_of(model, mode, batch, device), device, batch))
    ours = synchronised(step, device, steps)
    with peer("step", model, mode, batch, steps, device, dtype) as theirs:
        measured = alternate({"ours": lambda: rate(ours, steps * batch), "plain": theirs}, rounds)
    what = f"bare step / plain PEFT + bitsandbytes step in {dtype}, {mode}"
    return compare(what, ">= 2.0" if dtype == "fp32" else ">= 1.0", measured, "ours", "plain")


class _Images(torch.utils.data.Dataset):
    """PIL images through torchvision's transforms, one by one."""

    def __init__(self, images: Tensor, labels: Tensor, side: int) -> None:
        from PIL import Image
        from torchvision import transforms

        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        self.images = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[-1], padding=1),
                transforms.RandomHorizontalFlip(),
                transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.transform(self.images[index])
        return {"pixel_values": pixels, "labels": self.labels[index]}


def trainer_epoch(
    name: str, mode: str, batch: int, images: int, device: str, dtype: str, folder: str
) -> Callable[[], float]:
    """() -> images per second of one epoch of transformers' ``Trainer``."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        begun = ended = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    data = load("digits", Place(), config_of(name, mode, batch, device).data)
    dataset = _Images(data.train.images[:images], data.train.labels[:images], side_of(name))
    clock = Clock()
    trainer = Trainer(
        model=Classifier(plain_model(name, mode, device)),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            use_cpu=device == "cpu",
            bf16=dtype == "bf16",
            dataloader_num_workers=WORKERS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            label_names=["labels"],
        ),
        train_dataset=dataset,
        callbacks=[clock],
    )

    def epoch() -> float:
        trainer.train()
        return len(dataset) / (clock.ended - clock.begun)

    return epoch


def epoch_against_trainer(
    model: str, mode: str, batch: int, dtype: str, steps: int, rounds: int, device: str
) -> Comparison:
    """A trial's training epoch, against ``Trainer`` in ``dtype`` on the same images."""
    steps *= LONGER
    training = started(config_of(model, mode, batch, device), device, batch * steps)
    images = len(training.data.train.labels)
    epoch = synchronised(lambda: train._train_epoch(training), device)
    with peer("epoch", model, mode, batch, steps, device, dtype) as theirs:
        measured = alternate({"ours": lambda: rate(epoch, images), "Trainer": theirs}, rounds)
    target = ">= 1.5" if device == "cpu" else ">= 5.0"
    what = f"epoch / transformers' Trainer in {dtype}, {mode}"
    return compare(what, target if dtype == "fp32" else ">= 1.0", measured, "ours", "Trainer")


if __name__ == "__main__":
    kind, name, mode, batch, steps, device, dtype = sys.argv[1:]
    serve(kind, name, mode, int(batch), int(steps), device, dtype)
