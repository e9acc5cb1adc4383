"""Where the layers of a timm model are, which of them are meant, and whether they act.

A plain Vision Transformer has them in ``blocks.N``, a staged one (Swin) in ``layers.S.blocks.N``.
Some models read a layer's weight without calling the layer (``F.linear(x, self.qkv.weight)`` in
BEiT, EVA and SwinV2): an adapter there would have no effect, and no error would tell.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from functools import cache
from itertools import groupby
from typing import Any, cast

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tune_study.config import LoraSpec, QuantizationConfig, TrialConfig, ends_as
from tune_study.errors import UserError, first_line
from tune_study.model import backbone  # noqa: F401  (registers the demo's backbone with timm)
from tune_study.model.hub import refuse_unknown_model
from tune_study.model.weights import classifier_names

BLOCK_LAYERS = re.compile(r"(.*\.)?blocks\.\d+\..+")

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_BLOCK = re.compile(r"(?:(.*)\.)?blocks\.(\d+)\.")


@cache
def skeleton_of(model: str, num_classes: int, image_size: int | None) -> nn.Module:
    """The timm model without any numbers, on the ``meta`` device. Raises ``UserError``."""
    refuse_unknown_model(model)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta"):
            return timm.create_model(model, num_classes=num_classes, **options)
    except Exception as error:  # a model can be the user's own code, which may raise anything
        raise UserError(f"model = {model}: timm cannot build it so: {error}") from error


@cache
def called_linears(model: str, image_size: int | None) -> frozenset[str]:
    """Names of the ``nn.Linear`` layers that a forward pass calls, seen on the ``meta`` device."""
    with torch.random.fork_rng(devices=[]):  # looking must leave no trace
        skeleton = copy.deepcopy(skeleton_of(model, 10, image_size)).eval()
        called: set[str] = set()

        def note(name: str) -> Any:
            return lambda module, inputs: called.add(name)

        for name, module in skeleton.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(note(name))
        channels, *native = resolve_model_data_config(skeleton)["input_size"]
        sides = native if image_size is None else [image_size, image_size]
        try:
            with torch.no_grad():
                skeleton(torch.empty(1, channels, *sides, device="meta"))
        except Exception as error:  # as above
            raise UserError(
                f"model = {model}: it does not take images of {' x '.join(map(str, sides))} px "
                f"({first_line(error)[:200]}); see data.image_size, or the input_size in its "
                "default_cfgs"
            ) from error
    return frozenset(called)


def adapted(model: nn.Module, target_modules: str, name: str) -> tuple[str, list[str]]:
    """(PEFT's pattern, the names) of the linear layers that ``target_modules`` means.

    The regular expression is held against whole names; where none matches, against names from
    ``blocks`` on, so that one setting serves plain and staged models. Where it matches modules that
    hold linear layers and none of these, such as ``blocks\\.0\\.attn``, they are meant. The head is
    trained whole and gets no adapter. Raises ``UserError`` when nothing is left; ``name`` is the
    model's.
    """
    pattern, matching, names = _matching(model, target_modules)
    if not names:
        raise UserError(
            f"lora.target_modules = {target_modules}: {_why_none(model, matching, name)}; "
            "choose a timm Vision Transformer or other targets, such as "
            r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
        )
    if matching != names:  # PEFT would take, or refuse, all that the pattern matches
        pattern = "|".join(map(re.escape, names))
    return pattern, names


def passed_over(model: nn.Module, target_modules: str) -> list[str]:
    """Names of the modules that ``target_modules`` matches and that get no adapter of their own.

    Modules that hold adapted layers are none of these: the layers are what is meant.
    """
    _, matching, names = _matching(model, target_modules)
    return [n for n in matching if not any(f"{layer}.".startswith(f"{n}.") for layer in names)]


def _matching(model: nn.Module, target_modules: str) -> tuple[str, list[str], list[str]]:
    """(pattern, names of all modules that it matches, those of the linear layers that it means)."""
    modules = dict(model.named_modules())
    heads = [f"{head}." for head in classifier_names(model)]

    def linears(names: Iterable[str]) -> list[str]:
        return [
            name
            for name in names
            if isinstance(modules[name], nn.Linear) and not f"{name}.".startswith(tuple(heads))
        ]

    staged = rf"(?:.+\.)?(?=blocks\.)(?:{target_modules})"
    both = {
        pattern: [name for name in modules if name and re.fullmatch(pattern, name)]
        for pattern in (target_modules, staged)
    }
    for pattern, matching in both.items():
        if names := linears(matching):
            return pattern, matching, names
    for pattern, matching in both.items():
        within = tuple(f"{name}." for name in matching)
        if within and (names := linears(name for name in modules if name.startswith(within))):
            return pattern, matching, names
    return target_modules, both[target_modules] or both[staged], []


def _why_none(model: nn.Module, matching: list[str], name: str) -> str:
    if not matching:
        return f"no linear layer of {name} has such a name"
    first = model.get_submodule(matching[0])
    if isinstance(first, nn.Linear):
        return f"of {name} it matches {matching[0]} alone, the head, which is trained whole anyway"
    return (
        f"of {name} it matches {matching[0]}, a {type(first).__name__}, and no linear layer, which "
        "alone gets an adapter"
    )


def adapted_layers(model: nn.Module, lora: LoraSpec, name: str) -> tuple[str, list[str]]:
    """``adapted``, without what ``lora`` excludes. Raises ``UserError`` for a pattern that matches
    none of the layers, and for a rank that an initialisation cannot have."""
    pattern, names = adapted(model, lora.target_modules, name)
    kept = [layer for layer in names if _is_kept(layer, lora)]
    if not kept:
        raise UserError(
            f"lora.exclude_modules = {lora.exclude_modules} and lora.layers_to_transform = "
            f"{lora.layers_to_transform} leave no layer of {name} to adapt; choose among targets "
            f"such as {names[0]}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for part in getattr(lora, field):
            if not any(ends_as(part, layer) for layer in kept):
                raise UserError(
                    f"lora.{field}: {part} matches no adapted layer; their names are such as "
                    f"{kept[0]}"
                )
    for layer in kept if lora.begins_with_weights else ():
        linear, r = cast(nn.Linear, model.get_submodule(layer)), lora.rank_of(layer)
        most = min(linear.in_features, linear.out_features)
        if r > most:
            raise UserError(
                f"lora.init_lora_weights = {lora.init_lora_weights}: {layer} has {most} singular "
                f"values, fewer than its rank {r}; choose lora.r = {most} or less"
            )
    if len(kept) < len(names):
        pattern = "|".join(map(re.escape, kept))
    return pattern, kept


def _is_kept(layer: str, lora: LoraSpec) -> bool:
    if lora.exclude_modules is not None and re.fullmatch(lora.exclude_modules, layer):
        return False
    if lora.layers_to_transform is None:
        return True
    block = _BLOCK.match(layer)
    return block is not None and int(block[2]) in lora.layers_to_transform


def refuse_without_effect(model: nn.Module, config: TrialConfig) -> None:
    """Raises ``UserError`` for layers to be adapted or quantized that ``model`` never calls.

    ``model`` is the timm model of ``config`` before quantization, or its skeleton.
    """
    called = called_linears(config.model, config.data.image_size)
    why = f"{config.model} never calls it as a layer (timm reads its weight)"
    for name in plan_layers(model, config.quantization):
        if name not in called:
            raise UserError(
                f"quantization.mode = {config.quantization.mode}: {name} cannot be quantized, for "
                f"{why}; leave such layers out with "
                f"--set 'quantization.skip_layers=[\"*.{_kind(name)}\"]'"
            )
    names = adapted_layers(model, config.lora, config.model)[1]
    for name in names:
        if name not in called:
            raise UserError(
                f"lora.target_modules = {config.lora.target_modules}: an adapter on {name} would "
                f"have no effect, for {why}; {_others(names, called)}"
            )


def _others(names: Iterable[str], called: Collection[str]) -> str:
    kinds = sorted({re.escape(_kind(name)) for name in names if name in called})
    if not kinds:
        return "choose other targets or another model"
    return f"adapt the others with --set 'lora.target_modules=blocks\\.\\d+\\.({'|'.join(kinds)})'"


def _kind(name: str) -> str:
    """``layers.0.blocks.1.attn.qkv`` -> ``attn.qkv``."""
    return name[found.end() :] if (found := _BLOCK.match(name)) else name


def block_ranges(names: Iterable[str]) -> str:
    """The blocks of the layers called ``names``: ``0-11``, ``3``, ``0,2-4``, or ``none``.

    Of a staged model with the stage before: ``0/0-1,1/0-1,2/0-5``.
    """
    blocks = sorted({_place(name) for name in names})
    words = []
    for stage, places in groupby(blocks, key=lambda place: place[0]):
        runs: list[list[int]] = []
        for _, block in places:
            if runs and runs[-1][-1] == block - 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        prefix = "" if stage < 0 else f"{stage}/"
        words += [
            prefix + (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}") for run in runs
        ]
    return ",".join(words) or "none"


def _place(name: str) -> tuple[int, int]:
    """(stage, block) of a block's layer; the stage is -1 in a model that has none."""
    found = _BLOCK.match(name)
    if found is None:
        raise ValueError(f"{name} is in no block")
    stage = re.findall(r"\d+", found[1] or "")
    return (int(stage[-1]) if stage else -1), int(found[2])


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain ``nn.Linear`` layers inside the transformer blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and BLOCK_LAYERS.fullmatch(name)
    }


def held_in_compute_dtype(model: nn.Module, config: TrialConfig) -> list[Tensor]:
    """The frozen weights and biases of block layers that stay plain and compute under autocast.

    It would cast them anew in every step, and autograd would keep the copies. ``model`` is the timm
    model of ``config`` before quantization, or its skeleton. Biases that ``lora.bias`` lets learn
    are left out, and so are DoRA's layers, whose weights PEFT reads at full precision.
    """
    quantized = plan_layers(model, config.quantization)
    called = called_linears(config.model, config.data.image_size)
    dora = adapted_layers(model, config.lora, config.model)[1] if config.lora.use_dora else []
    held = []
    for name, layer in block_linears(model).items():
        if name in called and name not in quantized and name not in dora:
            held.append(layer.weight)
            if layer.bias is not None and config.lora.bias == "none":
                held.append(layer.bias)
    return held


def plan_layers(model: nn.Module, config: QuantizationConfig) -> dict[str, str]:
    """{layer name: mode} of every block layer that is to be quantized.

    Raises ``UserError`` when the model has no block layers, or a pattern matches none of them.
    """
    names = list(block_linears(model))
    if config.mode == "none" and not config.overrides:
        return {}
    if not names:
        raise UserError(
            f"quantization.mode = {config.mode}: {type(model).__name__} has no linear layers in "
            "blocks.N; choose a timm Vision Transformer"
        )
    for pattern in (*config.skip_layers, *config.overrides):
        only_this = QuantizationConfig(mode="none", overrides={pattern: "int8"})
        if all(only_this.mode_of(name) == "none" for name in names):
            raise UserError(
                f"quantization pattern {pattern!r} matches no layer of this model; write one for "
                f"its layers, {names[0]} to {names[-1]}"
            )
    modes = {name: config.mode_of(name) for name in names}
    return {name: mode for name, mode in modes.items() if mode != "none"}
