"""The ledger of a training step from the configuration alone: nothing is allocated or computed.

The step runs on fake tensors, which have shapes and types and no content. Quantized layers are
stood in for by layers that hold what bitsandbytes' layers hold until the backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from functools import cache
from typing import Any, NamedTuple, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tune_study.config import TrialConfig
from tune_study.data.batches import preprocess
from tune_study.memory.step import Ledger
from tune_study.model.build import (
    add_lora,
    checkpoint_blocks,
    choose_attention,
    hold_in,
    learning_biases,
    preprocessing_of,
    trainable,
)
from tune_study.model.footprint import expected_state_bytes, expected_weights_bytes
from tune_study.model.layers import (
    COMPUTE_DTYPES,
    held_in_compute_dtype,
    plan_layers,
    skeleton_of,
)
from tune_study.model.quantize import INT8_THRESHOLD, autocasted, tell_peft

ADAM_STEP_BYTES = 4
_NEEDS_CONTENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
_KEEPS_A_POINTER = ("2.10.", "2.11.")
SOURCE_SIDE = 32
"""Side of the stored images in pixels; they are enlarged within the step."""


class Prediction(NamedTuple):
    """What a trial will hold, before it starts.

    Exact but for ``ledger.activation_bytes`` and ``peak_train_bytes``, whose measured errors stand
    in docs/memory.md.
    """

    weights_bytes: int
    """Base model as it will be built, quantization state included."""
    ledger: Ledger
    peak_train_bytes: int | None
    """``None``, as the activations, for a model whose shapes depend on the content of images."""


def predict(config: TrialConfig, num_classes: int, device: torch.device) -> Prediction:
    """The ledger and the peak of one training step of ``config`` on ``device``.

    Trials that differ only in what cannot change the bytes of a step share one prediction.
    Raises ``UserError`` for a model or setting that does not fit.
    """
    # A configuration holds a dictionary, so it cannot be a key itself; its text can.
    return _predict(of_a_step(config).model_dump_json(), num_classes, device.type)


def of_a_step(config: TrialConfig) -> TrialConfig:
    """``config`` with only what the bytes of a training step depend on, the classes aside."""
    settings = config.training
    static = settings.step == "graph" and "int8" in config.quantization.modes
    return TrialConfig(
        model=config.model,
        dataset="digits",
        lora=config.lora.of_a_step(),
        quantization=config.quantization,
        data={"image_size": config.data.image_size},  # type: ignore[arg-type]
        training={  # type: ignore[arg-type]
            "per_device_train_batch_size": settings.per_device_train_batch_size,
            "compute_dtype": settings.compute_dtype,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "step": "graph" if static else "auto",
        },
    )


@cache
def _predict(key: str, num_classes: int, device_type: str) -> Prediction:
    config = TrialConfig.model_validate_json(key)
    skeleton = skeleton_of(config.model, num_classes, config.data.image_size)
    weights = expected_weights_bytes(skeleton, config)
    state = expected_state_bytes(skeleton, config.quantization)
    step = _step(_as_computed(config).model_dump_json(), num_classes, device_type)
    ledger = Ledger(
        step_weights_bytes=weights - state - step.cast_biases - step.of_base,
        quantization_state_bytes=state,
        adapter_bytes=sum(step.parameters),
        gradient_bytes=sum(step.parameters),
        optimizer_bytes=2 * sum(step.parameters) + ADAM_STEP_BYTES * len(step.parameters),
        activation_bytes=step.activations,
    )
    most = None if step.most is None else ledger.at_rest_bytes + step.most
    return Prediction(weights, ledger, most)


def _as_computed(config: TrialConfig) -> TrialConfig:
    """``config`` with one mode of 4 bit for all of them: they differ in what lies at rest alone."""
    quantization = config.quantization
    overrides = {pattern: _computed(mode) for pattern, mode in quantization.overrides.items()}
    changed = {"mode": _computed(quantization.mode), "overrides": overrides}
    return config.model_copy(update={"quantization": quantization.model_copy(update=changed)})


def _computed(mode: str) -> str:
    return "nf4" if "4" in mode else mode


class _Step(NamedTuple):
    """A step on fake tensors. Bytes, ``None`` where shapes depend on the content of images."""

    parameters: list[int]
    """Of each tensor that learns."""
    of_base: int
    """Of those, the biases of the base model."""
    cast_biases: int
    activations: int | None
    most: int | None


@cache
def _step(key: str, num_classes: int, device_type: str) -> _Step:
    config, device = TrialConfig.model_validate_json(key), torch.device(device_type)
    skeleton = skeleton_of(config.model, num_classes, config.data.image_size)
    model = _stand_in(skeleton, config, device)
    parameters = [p.numel() * p.element_size() for p in trainable(model).values()]
    of_base = sum(p.numel() * p.element_size() for p in learning_biases(model))
    activations = most = None
    with contextlib.suppress(*_NEEDS_CONTENT):
        activations, most = _fake_step(model, skeleton, config, device)
    return _Step(parameters, of_base, _cast_biases(model), activations, most)


class _Matmul8(torch.autograd.Function):
    """Shapes, types and lifetimes of bitsandbytes' 8-bit product while training.

    On the CPU that is ``MatMul8bitFp``, which dequantizes the weights and multiplies in floating
    point; elsewhere ``MatMul8bitLt``, which quantizes its input too. Outlier columns are a matter
    of content, and left out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.dtype, ctx.shape, ctx.features = x.dtype, x.shape, (out_features, x.shape[-1])
        # Both keep their input on the context, outside of autograd's saved tensors, until the
        # whole graph is dropped; the first even where no gradient will flow.
        if x.device.type == "cpu":
            ctx.kept = x
            return linear(x, x.new_empty(ctx.features))
        ctx.kept = x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[0] else None
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        weight = gradient.new_empty(ctx.features, dtype=ctx.dtype)
        return (gradient.to(ctx.dtype) @ weight).view(ctx.shape), None


class _Static8(_Matmul8):
    """The same of ``outliers.Product``, where steps are a graph: it keeps nothing of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.dtype, ctx.shape, ctx.features = x.dtype, x.shape, (out_features, x.shape[-1])
        return x.new_empty(*x.shape[:-1], out_features)


class _Matmul4(torch.autograd.Function):
    """As ``MatMul4Bit``, which keeps nothing but the codes, and those are at rest anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.features = (out_features, x.shape[-1])
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ gradients[0].new_empty(ctx.features), None


class _StandIn(nn.Linear):
    """Seen by PEFT as the quantized layer that it stands in for."""

    bias_dtype: torch.dtype = torch.float32
    place: torch.device = torch.device("meta")

    def dequantize(self) -> Tensor:
        """As ``quantize.dequantize``: a new tensor."""
        return torch.empty(self.out_features, self.in_features, device=self.place)

    def with_bias(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """As ``quantize.outside_autocast``: what learns is added, what does not is cast."""
        if self.bias is not None and self.bias.requires_grad:
            return out + self.bias.to(out.dtype)
        self.bias_dtype = dtype
        return out


class _Int8(_StandIn, bnb.nn.Linear8bitLt):
    product = _Matmul8

    def forward(self, x: Tensor) -> Tensor:
        x = autocasted(x)
        return self.with_bias(cast(Tensor, self.product.apply(x, self.out_features)), x.dtype)


class _FourBit(_StandIn, bnb.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        x = autocasted(x)
        out = _Matmul4.apply(x.to(self.compute_dtype), self.out_features)
        return self.with_bias(cast(Tensor, out).to(x.dtype), self.compute_dtype)


def _stand_in(skeleton: nn.Module, config: TrialConfig, device: torch.device) -> PeftModel:
    """The model of ``config`` with LoRA, on the ``meta`` device."""
    base = copy.deepcopy(skeleton)
    base.requires_grad_(False)
    choose_attention(base, config, device)
    dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    hold_in(dtype, held_in_compute_dtype(base, config))
    modes = plan_layers(base, config.quantization)
    for name, mode in modes.items():
        plain = cast(nn.Linear, base.get_submodule(name))
        shape, bias = (plain.in_features, plain.out_features), plain.bias is not None
        layer: nn.Module
        if mode == "int8":
            layer = _Int8(
                *shape, bias=bias, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta"
            )
            if config.training.step == "graph":
                layer.product = _Static8
        else:
            layer = _FourBit(*shape, bias=bias, compute_dtype=dtype, device="meta")
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer.requires_grad_(False))
    tell_peft(base, set(modes.values()))
    if config.training.gradient_checkpointing:
        checkpoint_blocks(base, config.model)
    # LoRA's initialisation seeds torch; a prediction must leave no trace.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return add_lora(base, config)


def _cast_biases(model: nn.Module) -> int:
    """Bytes that biases lose when bitsandbytes casts them, at a layer's first forward pass."""
    return sum(
        module.bias.numel() * (4 - module.bias_dtype.itemsize)
        for module in model.modules()
        if isinstance(module, _StandIn) and module.bias is not None
    )


class _Held(TorchDispatchMode):
    """Follows the storages that operations make: bytes held now, and the most ever held."""

    def __init__(self, at_rest: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in at_rest}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:  # a view
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


@cache
def _outlive_trials() -> None:
    """Lets the first ``FakeTensorMode`` of the process be entered by a thread that stays.

    torch 2.10 and 2.11, built for CUDA and without a GPU, keep a pointer into that thread, and
    crash when another one enters the next after its end (pytorch pull request 178950). Each trial
    is a thread of its worker.
    """
    if not torch.__version__.startswith(_KEEPS_A_POINTER):
        return
    entered = threading.Event()

    def stay() -> None:
        with FakeTensorMode():
            entered.set()
        threading.Event().wait()

    threading.Thread(target=stay, name="fake tensors", daemon=True).start()
    entered.wait()


def _make_fake(
    model: nn.Module, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Gives every parameter and buffer a device, and no content. Returns them."""
    fakes: list[Tensor] = []
    for module in model.modules():
        stands_in = isinstance(module, _StandIn)
        if isinstance(module, _StandIn):
            module.place = device
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or (stands_in and name == "weight"):
                    continue  # nothing reads the weights of a stand-in
                if stands_in and not tensor.requires_grad:
                    tensor = tensor.to(dtype)  # bitsandbytes has cast it by then
                fake: Any = FakeTensor(mode, tensor.detach(), device)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, tensor.requires_grad)
                tensors[name] = fake
                fakes.append(fake)
    return fakes


def _fake_step(
    model: nn.Module, skeleton: nn.Module, config: TrialConfig, device: torch.device
) -> tuple[int, int]:
    """(bytes held when the backward pass begins, most bytes of forward and backward)."""
    _outlive_trials()
    mode = FakeTensorMode()
    dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    at_rest = _make_fake(model, mode, device, dtype)
    model.train()
    batch = config.training.per_device_train_batch_size
    half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    how = preprocessing_of(skeleton, config)
    with mode:
        shape = (batch, 3, SOURCE_SIDE, SOURCE_SIDE)
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        with _Held([*at_rest, images, labels]) as held:
            loss = _loss(model, images, labels, how, half)
            activations = held.now
            loss.backward()
    return activations, held.most


def _loss(model: nn.Module, images: Tensor, labels: Tensor, how: Any, half: Any) -> Tensor:
    """As ``train._forward``: the same lifetimes, so that no tensor outlives its use."""
    pixels = preprocess(images, how)
    with half:
        scores = model(pixels)
    return cross_entropy(scores.float(), labels)
