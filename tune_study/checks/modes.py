"""The doctor's checks of a mode: its weights, its kernels, and whole epochs of a trial.

A check is a function that returns what it found and raises what is wrong; ``check`` makes of it one
that returns a ``Verdict``.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tune_study.config import TrialConfig, parse_trial
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.machine.device import without_bf16
from tune_study.model import quantize
from tune_study.model.build import build_model
from tune_study.study.compute_dtype import settle_compute_dtype
from tune_study.trial import checkpoint, train
from tune_study.trial.training import Training

ANOTHER_MODE = "choose another mode or device, and report this line"


class Verdict(NamedTuple):
    """One line of the table. ``remedy`` is empty when ``ok``."""

    check: str
    ok: bool
    found: str
    remedy: str = ""


class Wrong(Exception):
    """What a check found that should be otherwise, and a better remedy than its check's."""

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found)
        self.remedy = remedy


Arguments = ParamSpec("Arguments")


def check(
    title: str, remedy: str
) -> Callable[[Callable[Arguments, str]], Callable[Arguments, Verdict]]:
    """Makes a check's function return a ``Verdict``. ``{}`` in ``title`` is its first argument."""

    def decorated(find: Callable[Arguments, str]) -> Callable[Arguments, Verdict]:
        @functools.wraps(find)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Verdict:
            name = title.format(*args)
            try:
                return Verdict(name, True, find(*args, **kwargs))
            except Wrong as fault:
                return Verdict(name, False, str(fault), fault.remedy or remedy)
            # Whatever a library raises on this machine is what the check has found: it must be told
            # with its remedy, and must not hide the checks after it.
            except Exception as error:  # noqa: BLE001  (see above; Ctrl-C is no Exception)
                first_line = (str(error).strip().splitlines() or [""])[0]
                return Verdict(name, False, f"{type(error).__name__}: {first_line}", remedy)

        return checked

    return decorated


@check("weights of {}", "choose another mode or device, or install another bitsandbytes")
def dequantization(mode: str, device: torch.device) -> str:
    """Gaussian weights come back with the error that the mode has on a sound machine."""
    low, high = quantize.GAUSSIAN_ERROR_BANDS[mode]
    error = quantize.check_kernel(mode, 256, str(device))
    return f"relative error {error:.4f}, expected {low} to {high}"


@check(
    "train, eval, train of {}",
    "set support_avx512bf16_for_cpu = False on the 4-bit layers (quantize.quantize_linear does), "
    "or install another version of bitsandbytes",
)
def train_eval_train(mode: str, device: torch.device) -> str:
    """The gradient through a layer is the same before and after it was used for evaluation.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a 4-bit layer in the first evaluation, and
    the next training step raises or loses its gradient, unless that is switched off.
    """
    layer = quantized_layer(mode, device)
    pixels = drawn(16, 192).to(device)

    def gradient() -> Tensor:
        layer.train()
        leaf = pixels.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]

    before = gradient()
    layer.eval()
    with torch.inference_mode():
        layer(pixels)
    if not torch.equal(before, gradient()):
        raise Wrong("the gradient after evaluation is another one")
    if not float(before.norm()) > 0:
        raise Wrong("the gradient is zero")
    return "equal to the last bit"


@check("kernels of {}", "choose another mode or device, or install another bitsandbytes")
def kernels(mode: str, device: torch.device) -> str:
    """Which of bitsandbytes' operations run, and whether they are more than plain torch."""
    dtype = dtypes(device)[-1]
    layer = quantized_layer(mode, device, compute_dtype=dtype).train()
    rows = torch.ones(32 * 197, 192, device=device, dtype=dtype)
    # torch.compile, with which bitsandbytes wraps some of its plain torch, would hide that.
    with torch.compiler.set_stance("force_eager"):
        with Operations(device) as training:
            out = layer(rows.clone().requires_grad_())
            function = type(out.grad_fn).__name__.removesuffix("Backward")
            out.sum().backward()
        layer.eval()
        with torch.inference_mode(), Operations(device) as evaluation:
            layer(rows)
    return f"train: {function}: {training}; eval: {evaluation}"


class Operations(TorchDispatchMode):
    """Context: notes bitsandbytes' operations by first use in ``own``, and which are *own* kernels.

    That an operation is registered for the device tells nothing: bitsandbytes also registers
    functions of plain torch. But all that torch computes passes through here, and what a library of
    its own computes (through ctypes, Triton or Metal) does not. So an operation is own when memory
    that torch has only allocated holds a result all the same: it is read or returned, and nothing
    of torch has written it. Or when it calls an operation that is neither torch's nor
    bitsandbytes'. What an operation calls is judged by itself: ``gemm_4bit`` that dequantizes with
    an own kernel and then multiplies is plain torch. A kernel that writes into memory which torch
    has filled before would be missed; bitsandbytes 0.50 has none in a linear layer.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.own: dict[str, bool] = {}
        key = getattr(torch._C.DispatchKey, device.type.upper())
        self._backend = torch._C.DispatchKeySet(key)
        self._operations: list[str] = []
        """The running ones, each called by the one before."""
        self._blank: list[dict[int, Tensor]] = []
        """By address, for each running one: memory that nothing of torch has written."""

    def __str__(self) -> str:
        if not self.own:
            return "plain torch alone"
        words = {"own": True, "plain torch": False}
        groups = {
            word: [n for n, own in self.own.items() if own is of] for word, of in words.items()
        }
        return ", ".join(f"{word} ({', '.join(names)})" for word, names in groups.items() if names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "bitsandbytes":
            results = self._inside(name, func, args, kwargs)
        else:
            results = func(*args, **kwargs)
        if self._operations:
            self._note(name, func, args, kwargs, results)
        return results

    def _inside(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operation's kernel under this mode, which ``func`` itself would call again."""
        self.own.setdefault(name, False)
        self._operations.append(name)
        written = _written(func, args, kwargs)
        self._blank.append(_by_address(written))
        with self:
            results = func.redispatch(self._backend, *args, **kwargs)
        blank = self._blank.pop().keys()
        self.own[self._operations.pop()] |= bool(blank & _by_address([results, written]).keys())
        return results

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        """What ``func``, called by the running operation, tells about that one."""
        blank, returned = self._blank[-1], _by_address(results)
        if "empty" in name:
            blank |= returned
            return
        written = _by_address(_written(func, args, kwargs))
        whole = name in ("copy_", "fill_", "zero_") or "out" in kwargs
        overwritten = written if whole or func.namespace == "bitsandbytes" else {}
        used = blank.keys() & _by_address([args, kwargs]).keys()
        for address in overwritten.keys() & used:
            del blank[address]
        read = used - overwritten.keys()
        views = returned.keys() - written.keys()  # share the memory without a look at it
        foreign = func.namespace not in ("aten", "prim", "prims", "bitsandbytes")
        self.own[self._operations[-1]] |= foreign or bool(read - views)


def _by_address(nested: Any) -> dict[int, Tensor]:
    """The tensors in ``nested``, by where their memory begins; they keep it from being reused."""
    leaves = (leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor) and leaf.numel())
    return {leaf.untyped_storage().data_ptr(): leaf for leaf in leaves}


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that the schema of ``func`` says it writes into."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and argument.name in given
    ]


def dtypes(device: torch.device) -> list[torch.dtype]:
    """fp32, and bf16 where trials use it."""
    return [torch.float32] + ([] if without_bf16(device.type) else [torch.bfloat16])


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers on the CPU that ``dtype`` holds exactly, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).float()


def quantized_layer(
    mode: str,
    device: torch.device,
    shape: tuple[int, int] = (192, 192),
    compute_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Made as in a trial: from weights that lie on ``device``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = nn.Linear(*shape)
    return quantize.quantize_linear(original.to(device), mode, compute_dtype, device)


def small_trial(mode: str, device: torch.device) -> TrialConfig:
    """Three steps an epoch, the last one smaller."""
    trial = parse_trial(
        {
            "model": "vit_glyphs_patch4_32",
            "dataset": "digits",
            "quantization": mode,
            "data": {"train_size": 72, "val_size": 20, "test_size": 20},
            "training": {"per_device_train_batch_size": 32, "warmup_steps": 0},
        }
    )
    return settle_compute_dtype([trial], device.type)[0][0]


def _started(mode: str, device: torch.device) -> Training:
    config = small_trial(mode, device)
    data = load(config.dataset, Place(), config.data)
    return train.start(config, build_model(config, 10, device=device), data, device)


@check("epoch of {}", ANOTHER_MODE)
def epoch(mode: str, device: torch.device) -> str:
    """A trial of one epoch, from the building of the model through validation to the test."""
    training = _started(mode, device)
    row = next(train.fit(training))
    # The noise scale was not asked for, and few devices tell their energy: those are no numbers.
    missing = {*train.NO_NOISE_SCALE, "train_energy_j"}
    odd = [n for n, v in row.items() if n not in missing and not math.isfinite(v)]
    odd += [name for name, p in training.parameters.items() if not bool(p.isfinite().all())]
    if odd:
        raise Wrong(f"not finite after an epoch: {', '.join(odd)}")
    test_loss = train.test(training)["test_loss"]
    if not math.isfinite(test_loss):
        raise Wrong(f"the test loss is {test_loss}")
    return (
        f"losses: training {row['train_loss']:.4f}, validation {row['val_loss']:.4f}, "
        f"test {test_loss:.4f}"
    )


@check("checkpoint of {}", ANOTHER_MODE)
def checkpoint_round_trip(mode: str, device: torch.device) -> str:
    """A fresh build with an epoch's checkpoint is what was saved, and trains on as that does."""
    first = _started(mode, device)
    rows = train.fit(first)
    saved = next(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder) / "trial", first.state_dict(), {})
        if not checkpoint.is_whole(path, "trial"):
            raise Wrong("the checkpoint is not whole", "check the disk of the temporary folder")
        state, _ = checkpoint.load(path)
    best, ahead = first.best, next(rows)
    second = _started(mode, device)
    second.load_state_dict(state)
    loss = train.evaluate(second, second.data.val)[0]
    lost = "do not continue studies on this device, and report this line"
    if loss != saved["val_loss"]:
        raise Wrong(f"loaded, it evaluates to {loss!r} instead of {saved['val_loss']!r}", lost)
    if not all(torch.equal(second.best[name], tensor) for name, tensor in best.items()):
        raise Wrong("loaded, its best epoch is another one", lost)
    row = next(train.fit(second))
    parameters = [[p.detach().cpu() for p in t.parameters.values()] for t in (first, second)]
    most = max(float((a - b).abs().max()) for a, b in zip(*parameters, strict=True))
    if most or row["val_loss"] != ahead["val_loss"]:
        raise Wrong(
            f"a further epoch differs by up to {most:.1e} in a parameter",
            "compare accuracies by their spread over seeds, not to the last bit",
        )
    return f"two identical runs are equal to the last bit; {row['images_per_s']:.0f} images/s"


@check("peak of {}", "use a device whose allocator keeps count: cpu, cuda or mps")
def peak(mode: str, device: torch.device) -> str:
    measured = train.measure_memory(_started(mode, device))
    if measured.peak_train_bytes is None:
        raise Wrong("not to be had")
    return f"{measured.peak_train_bytes / 1e6:.1f} MB by {measured.peak_source}"
