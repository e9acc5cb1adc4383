"""What a treatment and a configuration are called: one wording for tables, report and displays.

A **treatment** is a quantization setting: mode, skipped layers, overrides. A **configuration** is
every other field of a trial but its seed. Both are given here as flat settings, by the dotted names
that ``--set`` uses.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tune_study.folder import schema

SHORT = {
    "model": "model",
    "dataset": "dataset",
    "lora.r": "lora_r",
    "lora.lora_alpha": "lora_alpha",
}
"""Fields whose column in the trials table has a short name as well."""
LONG = {short: field for field, short in SHORT.items()}
_NO_PART = ("trial_id", "seed", "quantization")
_WORDS = {
    "dataset": "data set",
    "lora.r": "rank",
    "lora.target_modules": "targets",
    "training.num_train_epochs": "epochs",
    "training.per_device_train_batch_size": "batch",
    "training.gradient_accumulation_steps": "accumulation",
    "training.per_device_eval_batch_size": "eval batch",
    "training.early_stopping_patience": "patience",
    "lora.init_lora_weights": "init",
    "lora.use_rslora": "rsLoRA",
    "lora.use_dora": "DoRA",
}
_USUAL = ("model", "dataset", "lora.r")
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.\*")
_LONGEST = 40
"""Characters of a value that a name repeats, where that still tells it from the others."""


def settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A trial of study.json's plan, nested as there, as ``{dotted field: value}``.

    A field that its version did not have yet holds the value that this meant. A list or a
    dictionary is its JSON text, so that all values can be compared, grouped and put into a table.
    """
    flat: dict[str, Any] = dict(schema.ABSENT)
    for name, value in entry.items():
        if name == "quantization" and isinstance(value, str):
            value = {"mode": value}
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": _plain(own) for inner, own in value.items()}
        elif name != "trial_id":
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else value


def in_configuration(field: str) -> bool:
    """Whether a dotted field is part of the configuration."""
    return field.partition(".")[0] not in _NO_PART


def treatment(entry: Mapping[str, Any]) -> Any:
    """The name of a trial's quantization setting; ``entry`` is nested as in study.json.

    The mode itself when no layer is skipped or overridden, else ``nf4 without blocks 0-2, 4-11`` or
    ``int8, blocks 0-1 nf4, *.qkv none``. Two settings have one name only if they mean the same.
    """
    setting = entry.get("quantization")
    if not isinstance(setting, Mapping):
        return setting
    mode, skipped = setting.get("mode"), setting.get("skip_layers")
    overrides = setting.get("overrides")
    words = []
    if isinstance(skipped, list | tuple) and skipped:
        words.append(f" without {_layers(map(str, skipped))}")
    if isinstance(overrides, Mapping):
        words += [f", {_layers(names)} {other}" for names, other in _runs(overrides)]
    return f"{mode}{''.join(words)}" if words else mode


def mode_in(name: str) -> str | None:
    """The mode of a treatment's name; ``None`` for a mode that is not known."""
    mode = re.split(r",| without ", name, maxsplit=1)[0]
    return mode if mode in schema.MODES else None


def in_order(treatments: Iterable[str]) -> list[str]:
    """Modes as the schema orders them, then what leaves out layers, by block, then the rest."""
    return sorted(treatments, key=_place)


def _place(name: str) -> tuple[Any, ...]:
    mode = mode_in(name)
    rank = len(schema.MODES) if mode is None else schema.MODES.index(mode)
    if name == mode:
        return 0, rank
    left = {
        number
        for low, high in re.findall(r"(\d+)(?:-(\d+))?", name.partition(" without block")[2])
        for number in range(int(low), int(high or low) + 1)
    }
    # One block at a time: by the block that is quantized, the first that is not left out.
    first = next(number for number in range(len(left) + 1) if number not in left)
    return 1, rank, first if left else -1, name


def _runs(overrides: Mapping[str, Any]) -> list[tuple[list[str], Any]]:
    """Neighbours of one mode together: their order among themselves decides nothing."""
    runs = itertools.groupby(overrides.items(), key=operator.itemgetter(1))
    return [([pattern for pattern, _ in run], mode) for mode, run in runs]


def _layers(patterns: Iterable[str]) -> str:
    """``blocks 0-2, 4-11`` for patterns of whole blocks; others as they are, quoted if need be."""
    numbers, others = set(), []
    for pattern in patterns:
        if found := _BLOCK.fullmatch(pattern):
            numbers.add(int(found[1]))
        else:
            others.append(pattern if re.fullmatch(r"[^\s,\"]+", pattern) else json.dumps(pattern))
    spans = [f"{low}-{high}" if high > low else f"{low}" for low, high in _spans(sorted(numbers))]
    blocks = [f"block{'s' * (len(numbers) > 1)} {', '.join(spans)}"] if spans else []
    return ", ".join([*blocks, *sorted(set(others))])


def _spans(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of following numbers: 0, 1, 2, 4 are (0, 2) and (4, 4)."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans


def configurations(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of ``cells``, the flat settings of trials: what differs among them.

    ``deit_tiny_patch16_224 · r 8 · learning rate 0.001``; where nothing differs, model, data set
    and rank. Equal configurations have equal names, and different ones different names.
    """
    return _configurations(cells, varying_fields(cells))


def _configurations(cells: Sequence[Mapping[str, Any]], varying: list[str]) -> list[str]:
    if not cells:
        return []
    fields = _named_by(cells, varying) or [name for name in _USUAL if name in cells[0]]
    words = {name: _values(name, {_key(cell.get(name)) for cell in cells}) for name in fields}
    names: dict[tuple[Any, ...], str] = {}
    taken: set[str] = set()
    found = []
    for cell in cells:
        own = tuple(_key(cell.get(name)) for name in varying)
        if own not in names:
            name = " · ".join(words[field][_key(cell.get(field))] for field in fields)
            count = 1
            while name in taken:  # values that hold our own dots could make two the same
                count += 1
                name = f"{name} ({count})"
            taken.add(name)
            names[own] = name
        found.append(names[own])
    return found


def told_apart(plan: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Two names for each trial of a plan, by trial id: for a display, and beside its id.

    The first is short and tells the trial from all others of the plan: ``learning rate 0.001 ·
    nf4 · seed 42``. The second is what the id does not say in words, and empty where it says all.
    """
    cells = [settings(entry) for entry in plan]
    treatments = [str(treatment(entry)) for entry in plan]
    said = {"model", "dataset", "lora.r"}
    varying = varying_fields(cells)
    beside = [name for name in _named_by(cells, varying) if name not in said]
    names, short, rest = _configurations(cells, varying), {}, {}
    for entry, cell, own, name in zip(plan, cells, treatments, names, strict=True):
        trial_id = str(entry["trial_id"])
        short[trial_id] = f"{name} · {own} · seed {cell.get('seed')}"
        words = [words_of(field, cell.get(field)) for field in beside]
        if own != cell.get("quantization.mode"):
            words.append(own)
        rest[trial_id] = ", ".join(words)
    return short, rest


def varying_fields(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields of the configuration that have more than one value, in the schema's order."""
    names = dict.fromkeys([*schema.SETTING_NAMES, *(name for cell in cells for name in cell)])
    return [
        name
        for name in names
        if in_configuration(name) and len({_key(cell.get(name)) for cell in cells}) > 1
    ]


def _key(value: Any) -> Any:
    """Told apart by type too: 1, 1.0 and True are one key of a dictionary, and no one's setting."""
    return (type(value).__name__, value)


def _named_by(cells: Sequence[Mapping[str, Any]], varying: list[str]) -> list[str]:
    """Without an alpha that the rank decides: the two are one axis."""
    if not {"lora.r", "lora.lora_alpha"} <= set(varying):
        return varying
    ranks = {_key(cell.get("lora.r")) for cell in cells}
    both = {(_key(cell.get("lora.r")), _key(cell.get("lora.lora_alpha"))) for cell in cells}
    if len(both) > len(ranks):
        return varying
    return [name for name in varying if name != "lora.lora_alpha"]


def _values(field: str, keys: Iterable[Any]) -> dict[Any, str]:
    """Each value of a field in words, long ones cut where all can still be told apart."""
    keys = list(keys)
    for most in (_LONGEST, None):
        found = {key: words_of(field, key[1], most) for key in keys}
        if len(set(found.values())) == len(found):
            break
    return found


def words_of(field: str, value: Any, most: int | None = _LONGEST) -> str:
    """``learning rate 0.001``, ``r 8``, ``cifar10``: a setting as a name holds it."""
    text = _value(value)
    if field == "dataset" and most is not None and text.startswith(("folder:", "hf:.", "hf:/")):
        text = text.rstrip("/").rpartition("/")[2].removeprefix("folder:") or text
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
    if field in ("model", "dataset"):
        return text
    return f"r {text}" if field == "lora.r" else f"{field_in_words(field)} {text}"


def field_in_words(field: str) -> str:
    """``training.learning_rate`` -> ``learning rate``."""
    if field in _WORDS:
        return _WORDS[field]
    return field.rpartition(".")[2].removeprefix("lora_").removeprefix("use_").replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.15g}" if isinstance(value, float) else str(value)
