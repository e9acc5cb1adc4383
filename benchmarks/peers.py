"""What people would use instead: PEFT and bitsandbytes as their documentation shows them.

``step`` and ``epoch`` are not tuned: default arguments, PIL images through torchvision's
transforms, and transformers' ``Trainer`` with two worker processes, in fp32, and once more under
bf16 autocast where our trials compute in bf16. ``captured``, ``tuned`` and ``compiled`` are what
somebody makes of them who wants a GPU to be busy, and ``script`` is timm's (``timm_script.py``).
Each runs in a process of its own, without the settings that ours gives to torch's threads
(tune_study/machine/environment.py).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.plain import captured, plain_model, plain_step, side_of
from benchmarks.steps import bare_step, config_of, first_images, started, synchronised
from benchmarks.timing import Comparison, alternate, compare, rate
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.errors import first_line
from tune_study.machine import environment, provenance
from tune_study.trial import train

WORKERS = 2
MORE_WORKERS = 8
LONGER = 5
"""An epoch takes this many times the steps of other measurements: ``Trainer`` starts its workers
anew for each, which weighs nothing in a real one and would flatter us in a short one."""


class Missing(Exception):
    """Why a side cannot be measured here, as a clause."""


@contextmanager
def peer(what: str, *arguments: object) -> Iterator[Callable[[], float]]:
    """() -> images per second of the next measurement of ``what``, a key of ``SIDES``.

    Where it can't be had, what is called raises ``Missing``.
    """
    command = [sys.executable, "-m", "benchmarks.peers", what, *map(str, arguments)]
    untouched = {k: v for k, v in os.environ.items() if k not in environment.set_by_prepare}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=untouched
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def measure() -> float:
            with contextlib.suppress(BrokenPipeError):  # its reason can be read all the same
                print(file=questions, flush=True)
            said = answers.readline().strip()
            try:
                return float(said)
            except ValueError:
                raise Missing(said or f"its process ended with {process.wait()}") from None

        try:
            yield measure
        finally:
            with contextlib.suppress(BrokenPipeError):  # of a question to a process that had ended
                questions.close()  # which ends one that has not


def serve(
    what: str, model: str, mode: str, batch: int, steps: int, device: str, dtype: str
) -> None:
    """The other end of :func:`peer`: measures once for every line that comes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print

    def answer(found: object) -> None:
        print(found, file=answers, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        try:
            side = Side(model, mode, batch, steps, device, dtype, folder)
            SIDES[what](side, sys.stdin, answer)
        except Missing as why:
            answer(why)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is why there is no figure)
            traceback.print_exc()
            answer(f"{type(error).__name__}: {first_line(error)}")


class Side(NamedTuple):
    """What is measured in this process."""

    model: str
    mode: str
    batch: int
    steps: int
    """Of one measurement."""
    device: str
    dtype: str
    folder: str
    """Empty, and away with the process."""

    @property
    def images(self) -> int:
        return self.batch * self.steps


def _plain(side: Side, asked: Iterable[str], answer: Callable[[object], None]) -> None:
    step = plain_step(side.model, side.mode, side.batch, side.device, side.dtype)
    work = synchronised(step, side.device, side.steps)
    for _ in asked:
        answer(rate(work, side.images))


def _captured(side: Side, asked: Iterable[str], answer: Callable[[object], None]) -> None:
    if side.device != "cuda":
        raise Missing(f"--device {side.device} has no CUDA graphs")
    step = plain_step(side.model, side.mode, side.batch, side.device, side.dtype, captured=True)
    work = synchronised(captured(step), side.device, side.steps)
    for _ in asked:
        answer(rate(work, side.images))


class Classifier(nn.Module):
    """The (loss, logits) that ``Trainer`` wants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


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
        from torchvision import transforms

        self.images, self.labels = pictures(images), labels.tolist()
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


def pictures(images: Tensor) -> list[Any]:
    """PIL images of uint8 [N, 3, H, W]."""
    from PIL import Image

    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def trainer_of(side: Side, ended: Callable[[float], bool], **arguments: Any) -> Any:
    """transformers' ``Trainer`` with ``arguments``, the rest its defaults.

    ``ended`` is told the seconds of each epoch, and says whether there is to be another one.
    """
    try:
        from transformers import Trainer, TrainerCallback, TrainingArguments
    except ModuleNotFoundError as error:
        raise Missing(f"no module {error.name}") from None
    emptied = synchronised(lambda: None, side.device)

    class Clock(TrainerCallback):
        begun = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            emptied()
            control.should_training_stop = not ended(time.perf_counter() - self.begun)
            return control

    data = load("digits", Place(), config_of(side.model, side.mode, side.batch, side.device).data)
    return Trainer(
        model=Classifier(plain_model(side.model, side.mode, side.device)),
        args=TrainingArguments(
            output_dir=side.folder,
            per_device_train_batch_size=side.batch,
            use_cpu=side.device == "cpu",
            bf16=side.dtype == "bf16",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            label_names=["labels"],
            **arguments,
        ),
        train_dataset=_Images(*first_images(data.train, side.images), side_of(side.model)),
        callbacks=[Clock()],
    )


def _epoch(side: Side, asked: Iterable[str], answer: Callable[[object], None]) -> None:
    """With two workers, which each epoch starts anew."""
    seconds: list[float] = []

    def ended(took: float) -> bool:
        seconds.append(took)
        return False

    trainer = trainer_of(side, ended, num_train_epochs=1, dataloader_num_workers=WORKERS)
    for _ in asked:
        trainer.train()
        answer(side.images / seconds[-1])


def workers() -> int:
    """For a side that is to keep a GPU busy: ``MORE_WORKERS``, or the cores where they are less."""
    return min(MORE_WORKERS, provenance.cores())


def _tuned(
    side: Side, asked: Iterable[str], answer: Callable[[object], None], *, compiled: bool = False
) -> None:
    """One call of ``train``, whose workers stay from epoch to epoch."""
    questions = iter(asked)

    def ended(took: float) -> bool:
        answer(side.images / took)
        return next(questions, None) is not None

    trainer = trainer_of(
        side,
        ended,
        num_train_epochs=1000,  # it ends when nobody asks any more
        optim="adamw_torch_fused",
        dataloader_num_workers=workers(),
        dataloader_persistent_workers=True,
        dataloader_pin_memory=True,
        torch_compile=compiled,
    )
    if next(questions, None) is not None:
        trainer.train()


def _script(side: Side, asked: Iterable[str], answer: Callable[[object], None]) -> None:
    from benchmarks.timm_script import epoch_of

    data = load("digits", Place(), config_of(side.model, side.mode, side.batch, side.device).data)
    images, labels = first_images(data.train, side.images)
    pairs = list(zip(pictures(images), labels.tolist(), strict=True))
    epoch = synchronised(
        epoch_of(side.model, pairs, side.batch, side.device, workers()), side.device
    )
    for _ in asked:
        answer(rate(epoch, side.images))


SIDES = {
    "step": _plain,
    "captured": _captured,
    "epoch": _epoch,
    "tuned": _tuned,
    "compiled": partial(_tuned, compiled=True),
    "script": _script,
}
"""By name: what answers each question with the images per second of a measurement."""


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
