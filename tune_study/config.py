"""What a trial is: frozen, validated records, and the id that names one.

A trial is a pure function of its ``TrialConfig``, the data, the weights and the machine. Where the
data and the weights lie, and the device, are therefore not part of it.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tune_study.errors import UserError
from tune_study.folder import names
from tune_study.folder.schema import MODES

Mode = Literal["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
BUILT_IN_DATASETS = ("digits", "cifar10", "cifar100")
SPLIT_SEED = 2024
"""The one seed of the train / validation / test split, the same for every trial of a data set."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSpec(_Record):
    """LoRA, in peft's words. ``target_modules`` is a regular expression over whole module names."""

    r: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_alpha: Annotated[int, Field(ge=1, le=65536)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Anchored: the bare word "proj" would also match the patch embedding's convolution.
    target_modules: str = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"

    @field_validator("target_modules")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return value


class QuantizationConfig(_Record):
    """Which ``nn.Linear`` of the transformer blocks is quantized, and how.

    ``skip_layers`` and ``overrides`` are shell patterns over layer names such as
    ``blocks.0.attn.qkv``: the former stay full precision, the latter get a mode of their own; the
    last matching override wins, and ``skip_layers`` wins over all.
    """

    mode: Mode = "none"
    skip_layers: tuple[str, ...] = ()
    overrides: dict[str, Mode] = Field(default_factory=dict)

    def mode_of(self, layer: str) -> str:
        """The mode of the layer called ``layer``, for example ``blocks.0.attn.qkv``."""
        if any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.skip_layers):
            return "none"
        matches = [m for p, m in self.overrides.items() if fnmatch.fnmatchcase(layer, p)]
        return matches[-1] if matches else self.mode


class DataConfig(_Record):
    """Sizes are image counts; ``None`` means all (train, test) or a tenth (validation)."""

    train_size: Annotated[int, Field(ge=1)] | None = None
    val_size: Annotated[int, Field(ge=1)] | None = None
    test_size: Annotated[int, Field(ge=1)] | None = None
    image_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels; ``None`` is the model's own."""
    augment: Literal["auto", "flip-crop", "crop", "none"] = "auto"
    """``auto`` is ``crop`` for digits, where a mirror image is another sign, else ``flip-crop``."""


class TrainingConfig(_Record):
    """Training constants, in the words of transformers' ``TrainingArguments``."""

    num_train_epochs: Annotated[int, Field(ge=1, le=10_000)] = 15
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=65536)] = 128
    """int8 looks for outlier columns in a whole batch, so its accuracy depends on it a little."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    early_stopping_patience: Annotated[int, Field(ge=0)] = 5
    """Epochs without a better validation accuracy before stopping; 0 never stops early."""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """Unless named, fp32 where the device has no kernel for bf16 (the command line says so)."""
    gradient_checkpointing: bool = False
    """Keeps only the blocks' inputs for backward and computes the rest a second time."""
    gradient_noise_scale: bool = False
    """Measures McCandlish's noise scale, from a step's micro-batches or the halves of its only one.
    The training is the same to the last bit."""


_JOINED_LATER = {"gradient_checkpointing": False, "gradient_noise_scale": False}
"""Left out of the hash while at their default, so that earlier studies keep their trial ids."""


class TrialConfig(_Record):
    """Everything that decides a trial's result, except data, weights and machine."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    dataset: Annotated[str, Field(min_length=1, max_length=1000)]
    lora: LoraSpec = LoraSpec()
    quantization: QuantizationConfig = QuantizationConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    pretrained: bool = True
    """``False`` starts from random weights, and every table and page says so."""
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        if value not in BUILT_IN_DATASETS and not value.startswith("folder:"):
            raise ValueError(f"choose one of {', '.join(BUILT_IN_DATASETS)} or folder:PATH")
        return value

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, data: Any, info: ValidationInfo) -> Any:
        """``quantization: "nf4"`` is short for ``quantization: {"mode": "nf4"}``."""
        if isinstance(data, Mapping) and isinstance(data.get("quantization"), str):
            return {**data, "quantization": {"mode": data["quantization"]}}
        return data

    @property
    def treatment(self) -> str:
        """The quantization setting by name: what is compared, and what its table calls it."""
        return str(names.treatment(self.model_dump(mode="json", include={"quantization"})))

    @property
    def configuration(self) -> tuple[tuple[str, Any], ...]:
        """The unit of inference: every field but quantization and seed, as (dotted name, value)."""
        told = names.settings(self.model_dump(mode="json"))
        return tuple((name, value) for name, value in told.items() if names.in_configuration(name))

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, however many micro-batches they come in."""
        settings = self.training
        return settings.per_device_train_batch_size * settings.gradient_accumulation_steps

    def with_micro_batch(self, micro: int) -> TrialConfig:
        """The same with micro-batches of ``micro`` images, a divisor of ``images_per_step``."""
        update = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.images_per_step // micro,
        }
        return self.model_copy(update={"training": self.training.model_copy(update=update)})

    @property
    def trial_id(self) -> str:
        """The axes in words, then 8 hex digits of a hash over the whole configuration."""
        values = self.model_dump(mode="json")
        for name, default in _JOINED_LATER.items():
            if values["training"][name] == default:
                del values["training"][name]
        overrides = values["quantization"]["overrides"]
        if len(overrides) > 1:  # their order decides: the last match wins
            values["quantization"]["overrides"] = list(overrides.items())
        canonical = json.dumps(values, sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        dataset = "folder_" + Path(self.dataset).name if ":" in self.dataset else self.dataset
        words = (
            _slug(self.model),
            _slug(dataset),
            f"r{self.lora.r}",
            self.quantization.mode.replace("-", "_"),
            f"s{self.seed}",
            digest,
        )
        return "-".join(words)


def _slug(text: str) -> str:
    """A file name's part: it cannot leave its folder, hide, or hold the ids' own separator."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).lstrip(".")[:80] or "_"


def parse_trial(values: Mapping[str, Any]) -> TrialConfig:
    """A validated ``TrialConfig``.

    Raises ``UserError`` naming the field, the value and what is allowed.
    """
    try:
        return TrialConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])[:_LONGEST]
    if first["type"] == "extra_forbidden":
        return f"unknown field {field}{_suggestion(field)}"
    if first["type"] == "missing":
        return f"{field} is missing: the grid must name a {field}"
    message = first["msg"].removeprefix("Value error, ")
    if field.endswith("mode"):
        message = f"choose one of {', '.join(MODES)}"
    return f"{field} = {_shown(first['input'])}: {message[0].lower()}{message[1:]}"


_LONGEST = 200
"""Characters of the user's own text that a sentence repeats."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _LONGEST


def _shown(value: Any) -> str:
    """``repr(value)``, cut."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print an integer of thousands of digits
        return f"a {type(value).__name__} that is too long to print"


def field_names(record: type[BaseModel] = TrialConfig, prefix: str = "") -> list[str]:
    """Every field by its dotted name, for example ``training.learning_rate``."""
    names = []
    for name, field in record.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _suggestion(key: str) -> str:
    names = field_names()
    by_last_word = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    close = by_last_word or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; the fields are {', '.join(names)}"


def parse_assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """``"training.num_train_epochs=3"`` -> ``("training.num_train_epochs", 3)``.

    The value is read as YAML, without tags and aliases: a few of these can unfold to gigabytes, and
    none is of use here. Raises ``UserError`` that begins with ``option``.
    """
    key, equals, value = text.partition("=")
    key, text = key.strip(), f"{option} {text[:_LONGEST]}"
    if not equals:
        raise UserError(f"{text}: write it as FIELD=VALUE, e.g. training.num_train_epochs=3")
    if key not in [*field_names(), "quantization"]:
        raise UserError(f"{text}: unknown field {key}{_suggestion(key)}")
    try:
        if any(isinstance(t, yaml.TagToken | yaml.AliasToken) for t in yaml.scan(value)):
            raise UserError(f"{text}: write the value out, without YAML's tags and aliases")
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):  # an impossible date is a ValueError
        raise UserError(f"{text}: the value {_shown(value)} is not valid YAML") from None
    # YAML 1.1 reads 1e-3 as text; a number is meant.
    if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", parsed):
        parsed = float(parsed)
    return key, parsed


def assign(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of ``values`` (nested dicts) in which the dotted ``key`` is ``value``."""
    head, _, rest = key.partition(".")
    if not rest:
        return {**values, head: value}
    inner = values.get(head, {})
    if head == "quantization" and isinstance(inner, str):
        inner = {"mode": inner}
    return {**values, head: assign(inner if isinstance(inner, Mapping) else {}, rest, value)}
