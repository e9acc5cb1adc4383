"""The doctor's checks of products: what a trial multiplies, and the gradient through it.

Each is computed on the device in fp32, and in bf16 where trials use it, and compared with float64
on the CPU (a tensor moves there first: MPS has no float64) by the relative Frobenius error,
||ours - exact|| / ||exact||. How much is allowed (``allowed``):

    4 u(dtype)             operands, intermediate and result rounded to the dtype, which changes
                           each by at most u: 2**-8 in bf16, 2**-24 in fp32
    + 32 sqrt(K) 2**-24    a sum of K terms in fp32, whose roundings add up like a random walk

An x86 CPU comes to a quarter of it in bf16 and a fortieth in fp32 (int8, which also rounds inputs:
0.4); a sum that loses a sixth of its terms to 0.4 itself, and TF32 in place of fp32 to 3e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from tune_study.checks.modes import Wrong, check, drawn, dtypes, quantized_layer, small_trial
from tune_study.data.batches import preprocess
from tune_study.data.place import Place, Preprocessing
from tune_study.data.splits import load
from tune_study.model import quantize
from tune_study.model.build import build_model, trainable
from tune_study.model.lora import dropped, kept_share, speed_up

BLOCK_SHAPES = {"qkv": (192, 576), "proj": (192, 192), "fc1": (192, 768), "fc2": (768, 192)}
"""(in_features, out_features) of DeiT-tiny's block layers."""
IMAGES, TOKENS = 200, 197
"""LoRA's gradients are products over images x tokens: here 39,400, more than the 32,768 beyond
which torch before 2.14 multiplies wrongly on M1 and M2."""
INT8_INPUT_ERROR = 0.02
"""LLM.int8() also rounds the inputs, to 127 steps of a row's largest value: an error of 0.7 % for
Gaussian rows, of 1.4 % when that value is just below the threshold of 6."""
GREY_LEVELS = 2
"""The CPU multiplies by whole numbers: in each direction a half may be rounded the other way."""
REMEDY = "choose another device or version of torch (on a Mac 2.14 or later), and report this line"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Error(NamedTuple):
    """Of one result: relative, and the most that is allowed."""

    what: str
    error: float
    allowed: float


def allowed(dtype: torch.dtype, terms: int) -> float:
    """The relative error that a sound device may have in a sum of ``terms`` products."""
    unit = torch.finfo(dtype).eps / 2
    return 4 * unit + 32 * math.sqrt(terms) * 2**-24


def judged(errors: Sequence[Error]) -> str:
    """The largest of the errors, by what is allowed. Raises ``Wrong`` with all that are more."""
    bad = [e for e in errors if not e.error <= e.allowed]  # so that a NaN is bad
    if bad:
        found = ", ".join(f"{e.what} by {e.error:.1e} (allowed {e.allowed:.1e})" for e in bad)
        raise Wrong(f"too far off: {found}")
    worst = max(errors, key=lambda e: e.error / e.allowed)
    return f"largest error {worst.error:.1e} of allowed {worst.allowed:.1e}, in {worst.what}"


def relative(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||; ``exact`` is float64 on the CPU."""
    return float((ours.detach().cpu().double() - exact).norm() / exact.norm())


def through(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], gradient: Tensor
) -> list[Tensor]:
    """``function`` of ``leaves``, and the gradients of all leaves for the output's ``gradient``."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.device, out.dtype))]


def errors(
    names: str, dtype: torch.dtype, terms: int, ours: Sequence[Tensor], exact: Sequence[Tensor]
) -> list[Error]:
    limit = allowed(dtype, terms)
    return [
        Error(f"{name} in {SHORT[dtype]}", relative(a, b), limit)
        for name, a, b in zip(names.split(), ours, exact, strict=True)
    ]


def at(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A trial's precision: ``train.autocast_of``, for a dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@check("products of {}", REMEDY)
def block_layers(mode: str, device: torch.device) -> str:
    """The quantized layers of a block: y of training and of evaluation, and dx.

    Against the product with the weights that the layer stands for.
    """
    found = []
    for dtype in dtypes(device):
        for name, (fan_in, fan_out) in BLOCK_SHAPES.items():
            layer = quantized_layer(mode, device, (fan_in, fan_out), dtype)
            x = drawn(2, TOKENS, fan_in, dtype=dtype)
            x[..., 5] *= 8  # a column of outliers, which int8 computes in 16 bit
            gradient = drawn(2, TOKENS, fan_out, seed=2, dtype=dtype)
            weight = quantize.dequantize(layer).cpu().double()
            bias: Any = layer.bias
            bias = bias.detach().cpu().double()
            exact = through(lambda t, w=weight, b=bias: linear(t, w, b), [x.double()], gradient)
            with at(device, dtype):
                ours = through(layer.train(), [x.to(device, dtype)], gradient)
                layer.eval()
                with torch.inference_mode():
                    ours.insert(1, layer(x.to(device, dtype)))
            exact.insert(1, exact[0])
            names = f"{name}:y {name}:y(eval) {name}:dx"
            found += errors(names, dtype, max(fan_in, fan_out), ours, exact)
    if mode == "int8":
        found = [
            e if "dx" in e.what else e._replace(allowed=e.allowed + INT8_INPUT_ERROR) for e in found
        ]
    return judged(found)


@check("products of LoRA", REMEDY)
def lora_layer(device: torch.device) -> str:
    """y, dx, dA and dB of ``lora.speed_up``'s pass with dropout, over 39,400 rows."""
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(192, 96)),
        LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["0"]),
    )
    layer = model.base_model.model[0].to(device).train()
    speed_up(model, [layer])
    base, scaling = layer.base_layer, layer.scaling["default"]
    a, b = (getattr(layer, f"lora_{name}")["default"].weight for name in "AB")
    p = layer.lora_dropout["default"].p
    with torch.no_grad():
        a.copy_(0.1 * drawn(*a.shape, seed=2))
        b.copy_(0.1 * drawn(*b.shape, seed=3))  # 0 before the first step
    found = []
    for dtype in dtypes(device):
        x = drawn(IMAGES, TOKENS, 192, dtype=dtype)
        gradient = drawn(IMAGES, TOKENS, 96, seed=4, dtype=dtype)
        leaf = x.to(device).requires_grad_()
        torch.manual_seed(0)
        with at(device, dtype):
            y = layer(leaf)
        ours = [y, *torch.autograd.grad(y, [leaf, a, b], gradient.to(device, y.dtype))]
        torch.manual_seed(0)  # the same mask again
        _, mask = dropped(leaf.detach().to(dtype), p)
        factor = mask.cpu().double() / kept_share(p, device)
        weight, bias = (t.detach().cpu().double() for t in (base.weight, base.bias))

        def plain(x: Tensor, a: Tensor, b: Tensor, w=weight, c=bias, f=factor) -> Tensor:
            return linear(x, w, c) + scaling * linear(linear(x * f, a), b)

        exact = through(plain, [t.detach().cpu().double() for t in (leaf, a, b)], gradient)
        found += errors("y dx dA dB", dtype, IMAGES * TOKENS, ours, exact)
    return judged(found)


@check("attention", REMEDY)
def attention(device: torch.device) -> str:
    """``scaled_dot_product_attention`` of DeiT-tiny's heads: y, dq, dk, dv."""
    found = []
    for dtype in dtypes(device):
        q, k, v, gradient = (drawn(8, 3, TOKENS, 64, seed=s, dtype=dtype) for s in range(4))
        ours = through(
            scaled_dot_product_attention, [t.to(device, dtype) for t in (q, k, v)], gradient
        )
        exact = through(scaled_dot_product_attention, [t.double() for t in (q, k, v)], gradient)
        found += errors("y dq dk dv", dtype, TOKENS, ours, exact)
    return judged(found)


@check("head and loss", REMEDY)
def head_and_loss(device: torch.device) -> str:
    """The head's linear layer and the cross-entropy behind it: the loss, dx, dW, db."""
    labels = torch.arange(32) % 10

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scores = linear(x, weight, bias)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return cross_entropy(scores, labels.to(x.device))

    found = []
    for dtype in dtypes(device):
        leaves = [drawn(*s, dtype=dtype, seed=2) for s in ((32, 192), (10, 192), (10,))]
        leaves[1] /= 8
        with at(device, dtype):
            ours = through(loss, [t.to(device) for t in leaves], torch.ones(()))
        exact = through(loss, [t.double() for t in leaves], torch.ones(()))
        found += errors("loss dx dW db", dtype, 192, ours, exact)
    return judged(found)


@check("resize", REMEDY)
def resize(device: torch.device) -> str:
    """``preprocess`` of uint8 images, larger and smaller, in grey levels.

    Against one direction after the other, in whole grey levels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    levels = {}
    for size in (224, 20):
        for interpolation in ("bicubic", "bilinear"):
            how = Preprocessing(size, interpolation, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
            mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in how[2:])
            exact = images.double()
            for sides in ((32, size), (size, size)):
                exact = nn.functional.interpolate(
                    exact, size=sides, mode=interpolation, antialias=True
                )
                exact = exact.round().clamp(0, 255)
            ours = preprocess(images.to(device), how).cpu().double()
            difference = (ours * std + mean) * 255 - exact
            levels[f"{interpolation} to {size} px"] = float(difference.abs().max())
    found = ", ".join(f"{name} {most:.2g}" for name, most in levels.items())
    found = f"largest differences in grey levels of 255: {found}; allowed {GREY_LEVELS}"
    # The normalisation and its inverse cost some bits of fp32.
    if not all(most <= GREY_LEVELS + 0.001 for most in levels.values()):
        raise Wrong(found)
    return found


@check("gradient of a step", REMEDY)
def whole_gradient(device: torch.device) -> str:
    """Every trainable tensor's gradient of the shipped model in fp32, without dropout."""
    config = small_trial("none", device)
    config = config.model_copy(
        update={
            "lora": config.lora.model_copy(update={"lora_dropout": 0.0}),
            "training": config.training.model_copy(update={"compute_dtype": "fp32"}),
        }
    )
    images, labels = (t[:8] for t in load(config.dataset, Place(), config.data).train)
    gradients = []
    for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        built = build_model(config, 10, device=where)
        model = built.model.to(dtype).train()
        parameters = trainable(model)
        with torch.no_grad():
            for seed, parameter in enumerate(parameters.values()):
                parameter.copy_(0.1 * drawn(*parameter.shape, seed=seed))  # B is 0 at the start
        pixels = preprocess(images, built.preprocessing).to(where, dtype)
        loss = cross_entropy(model(pixels), labels.to(where))
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    names = " ".join(parameters)
    terms = len(images) * 65  # tokens of the shipped model
    return judged(errors(names, torch.float32, terms, *gradients))
