"""What a trial is: frozen, validated records, and the id that names one.

A trial is a pure function of its ``TrialConfig``, the data, the weights and the machine. Where the
data and the weights lie, and the device, are therefore not part of it.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

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
AUGMENTATIONS = ("auto", "flip-crop", "crop", "none")
CODE = "code:"
"""What names a function of the grid's own file: its images, or what transforms them."""
CODE_NAME = f"{CODE}FUNCTION"
SPLIT_SEED = 2024
"""The one seed of the train / validation / test split, the same for every trial of a data set."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[int, Field(ge=1, le=65536)]
INITIALISATIONS = ("default", "gaussian", "orthogonal", "olora", "pissa", "loftq")
_NO_INITIALISATION = {
    "false": "PEFT has it for debugging: the adapters would change the model before any training; ",
    "eva": "it needs the activations of training images before there is a model to train; ",
    "corda": "it needs the activations of training images before there is a model to train; ",
    "lora_ga": "it needs gradients of training images before there is a model to train; ",
    "mica": "it freezes B, which PEFT does for full-precision layers alone; ",
}
"""What else PEFT has, and why it is not to be had here."""
_NOT_OFFERED = {
    "fan_in_fan_out": "timm's linear layers keep their weights as [out, in]",
    "modules_to_save": "the new head is trained whole, and nothing else",
    "layers_pattern": "blocks are called blocks.N",
    "target_parameters": "timm's Vision Transformers keep their weights in linear layers",
    "layer_replication": "it makes another model of the one that is studied",
    "trainable_token_indices": "a Vision Transformer has no token embedding",
    "alora_invocation_tokens": "a Vision Transformer has no invocation tokens",
    "use_qalora": "PEFT has it for GPTQ alone",
    "velora_config": "PEFT has it for full-precision layers alone",
    "kasa_config": "PEFT has it for full-precision layers alone",
    "monteclora_config": "PEFT has it for full-precision layers alone",
    "use_bdlora": "it is for serving a model from several devices",
    "megatron_config": "timm's models are not Megatron's",
    "arrow_config": "it routes between adapters, and a trial has one",
    "loftq_config": "its bits are those of quantization.mode; lora.loftq_iter has its steps",
}
"""Fields of PEFT's ``LoraConfig`` that make no sense here, and why."""


class LoraSpec(_Record):
    """LoRA, in peft's words. ``target_modules`` is a regular expression over whole module names."""

    r: Rank = 8
    lora_alpha: Alpha = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Anchored: the bare word "proj" would also match the patch embedding's convolution.
    target_modules: str = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    exclude_modules: str | None = None
    """Of ``target_modules``, those that get no adapter; a regular expression as well."""
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Adapts these blocks alone, N of ``blocks.N``; in a staged model those of every stage."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Another ``r`` for the layers whose name ends so, e.g. ``{"mlp.fc[12]": 4}``; the first
    regular expression that matches counts."""
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """The same of ``lora_alpha``."""
    use_rslora: bool = False
    """Scales by ``lora_alpha / sqrt(r)`` and not by ``lora_alpha / r`` (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Learns the magnitude of every row apart from its direction (Liu et al. 2024)."""
    init_lora_weights: str = "default"
    """How the adapters begin: ``default``, ``gaussian``, ``orthogonal``, ``olora``, ``pissa``,
    ``pissa_niter_N`` or ``loftq``."""
    loftq_iter: Annotated[int, Field(ge=1, le=100)] = 1
    """Alternating steps of ``loftq``, which LoftQ's paper calls T; without effect elsewhere."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model learn as well: all, or those of the adapted layers."""
    lora_bias: bool = False
    """Gives the adapters' B a bias of its own."""

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value or ():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"not a regular expression ({error})") from None
        return value

    @field_validator("layers_to_transform")
    @classmethod
    def _names_a_layer(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value == ():
            raise ValueError("name at least one block, or null for all")
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _is_an_initialisation(cls, value: Any) -> Any:
        value = "default" if value is True else value  # as PEFT writes it
        if value in INITIALISATIONS or re.fullmatch(r"pissa_niter_\d{1,3}", str(value)):
            return value
        why = _NO_INITIALISATION.get(str(value).lower(), "")
        raise ValueError(f"{why}choose one of {', '.join(INITIALISATIONS)} or pissa_niter_N")

    @model_validator(mode="after")
    def _go_together(self) -> LoraSpec:
        if self.lora_bias and (self.use_dora or self.init_lora_weights != "default"):
            raise ValueError(
                "lora.lora_bias = true: PEFT has it for plain LoRA in its default initialisation "
                "alone; leave lora.use_dora false and lora.init_lora_weights default"
            )
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(
                f"lora.init_lora_weights = orthogonal: it needs even ranks, and one is {odd[0]}; "
                f"choose lora.r = {odd[0] + 1} or another initialisation"
            )
        return self

    @property
    def begins_with_weights(self) -> bool:
        """Whether the adapters begin with a part of the base layers' weights, and not drawn."""
        return self.init_lora_weights.startswith(("pissa", "olora", "loftq"))

    def rank_of(self, layer: str) -> int:
        """The rank of the layer called ``layer``, for example ``blocks.0.attn.qkv``."""
        return _of_pattern(self.rank_pattern, layer, self.r)

    def scaling_of(self, layer: str) -> float:
        """What the product of B and A is multiplied by, as PEFT does."""
        alpha, r = _of_pattern(self.alpha_pattern, layer, self.lora_alpha), self.rank_of(layer)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def of_a_step(self) -> LoraSpec:
        """The same with only what the bytes and the time of a training step depend on."""
        names = "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "loftq_iter"
        plain = LoraSpec(lora_alpha=1)
        return self.model_copy(update={name: getattr(plain, name) for name in names})


def ends_as(pattern: str, layer: str) -> bool:
    """Whether a whole end of the layer's name matches, as in PEFT's ``rank_pattern``."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def _of_pattern(patterns: Mapping[str, int], layer: str, otherwise: int) -> int:
    """As PEFT's ``get_pattern_key``: the first pattern that means the layer."""
    matching = (pattern for pattern in patterns if ends_as(pattern, layer))
    return patterns[found] if (found := next(matching, None)) is not None else otherwise


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

    @property
    def modes(self) -> set[str]:
        """Of all layers: the mode, and those of the overrides."""
        return {self.mode, *self.overrides.values()}


def is_code(value: str) -> bool:
    """Whether ``value`` is ``code:`` and the name of a function."""
    return value.startswith(CODE) and value.removeprefix(CODE).isidentifier()


class Columns(NamedTuple):
    """Of a table of images, as the user names them; ``None`` finds them by what they hold."""

    image: str | None = None
    label: str | None = None


class DataConfig(_Record):
    """Sizes are image counts; ``None`` means all (train, test) or a tenth (validation)."""

    train_size: Annotated[int, Field(ge=1)] | None = None
    val_size: Annotated[int, Field(ge=1)] | None = None
    test_size: Annotated[int, Field(ge=1)] | None = None
    image_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels; ``None`` is the model's own."""
    augment: str = Field(default="auto", json_schema_extra={"enum": [*AUGMENTATIONS, CODE_NAME]})
    """``auto`` is ``flip-crop`` for CIFAR, else ``crop``: of digits, and of images that are not
    known, a mirror image may be of another class. ``code:`` names a function of the grid's file."""
    image_column: str | None = Field(default=None, min_length=1, max_length=200)
    """Of a data set of the hub's kind; ``None`` is its only one of images."""
    label_column: str | None = Field(default=None, min_length=1, max_length=200)
    """The same of labels; ``None`` is the only one of classes, or the one called so."""

    @field_validator("augment")
    @classmethod
    def _known_augment(cls, value: str) -> str:
        if value not in AUGMENTATIONS and not is_code(value):
            raise ValueError(f"choose one of {', '.join(AUGMENTATIONS)} or {CODE_NAME}")
        return value

    @property
    def transform(self) -> str | None:
        """The function of the user's in place of an augmentation, where one is named."""
        return self.augment.removeprefix(CODE) if is_code(self.augment) else None

    @property
    def columns(self) -> Columns:
        """Of images and of labels, as they are named."""
        return Columns(self.image_column, self.label_column)


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
    step: Literal["auto", "eager", "graph"] = "auto"
    """How a training step is given to a GPU: kernel by kernel, or on CUDA as one graph. ``auto`` is
    eager."""


_ON_THE_HUB = re.compile(
    r"(?P<hub>(https?://)?(huggingface\.co|hf\.co)/|hf[-_]hub:)?"
    r"((?P<owner>[^/:\s]+)/)?(?P<name>[^/:\s]+)/?"
)
_JOINED_LATER = {
    "data": ("image_column", "label_column"),
    "training": ("gradient_checkpointing", "gradient_noise_scale", "step"),
    "lora": (
        "exclude_modules",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "loftq_iter",
        "bias",
        "lora_bias",
    ),
}
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

    @field_validator("model")
    @classmethod
    def _one_name(cls, value: str) -> str:
        """``timm/NAME`` on the hub is timm's NAME: a model has one name, and so one trial id."""
        found = _ON_THE_HUB.fullmatch(value)
        if found is None or not (found["hub"] or found["owner"] == "timm"):
            return value
        name, owner = found["name"], found["owner"] or "timm"
        return name if owner == "timm" and "@" not in name else f"hf-hub:{owner}/{name}"

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        known = value in BUILT_IN_DATASETS or value.startswith(("folder:", "hf:"))
        if not known and not is_code(value):
            raise ValueError(
                f"choose one of {', '.join(BUILT_IN_DATASETS)}, folder:PATH, hf:NAME, hf:./PATH or "
                f"{CODE_NAME}"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, data: Any, info: ValidationInfo) -> Any:
        """``quantization: "nf4"`` is short for ``quantization: {"mode": "nf4"}``."""
        if isinstance(data, Mapping) and isinstance(data.get("quantization"), str):
            return {**data, "quantization": {"mode": data["quantization"]}}
        return data

    @model_validator(mode="after")
    def _noise_scale_is_measured(self) -> TrialConfig:
        lora = self.lora
        if self.training.gradient_noise_scale and (
            lora.use_dora or lora.lora_bias or lora.bias != "none"
        ):
            raise ValueError(
                "training.gradient_noise_scale = true: it is measured inside this project's own "
                "pass of LoRA's A and B, which has no part in lora.use_dora, lora.lora_bias and "
                "lora.bias; leave either out"
            )
        return self

    @model_validator(mode="after")
    def _has_columns(self) -> TrialConfig:
        for name, value in self.data.columns._asdict().items():
            if value is not None and not self.dataset.startswith("hf:"):
                raise ValueError(
                    f"data.{name}_column = {value}: {self.dataset} has no columns; leave it out, "
                    "or name a data set with hf:"
                )
        return self

    @property
    def data_name(self) -> str:
        """What its images and labels go by in study.json: one table may have several columns."""
        named = self.data.columns._asdict()
        words = [f"data.{name}_column={value}" for name, value in named.items() if value]
        return f"{self.dataset} ({', '.join(words)})" if words else self.dataset

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

    @property
    def unquantized(self) -> TrialConfig:
        """The same in full precision: with what a quantized trial is compared."""
        return self.model_copy(update={"quantization": QuantizationConfig()})

    def on(self, dataset: str) -> TrialConfig:
        """The same on another data set, or on one under another name."""
        return self if dataset == self.dataset else self.model_copy(update={"dataset": dataset})

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
        for record, joined in _JOINED_LATER.items():
            plain = _DEFAULTS[record].model_dump(mode="json")
            for name in joined:
                if values[record][name] == plain[name]:
                    del values[record][name]
        for record, name in _ORDERED:
            patterns = values[record].get(name, {})
            if len(patterns) > 1:
                values[record][name] = list(patterns.items())
        canonical = json.dumps(values, sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        dataset = self.dataset
        if dataset.startswith("hf:"):
            dataset = "hf_" + Path(dataset.removeprefix("hf:")).name
        elif ":" in dataset and not is_code(dataset):
            dataset = "folder_" + Path(dataset).name  # folder_folder_leaves, as it always was
        words = (
            _slug(self.model),
            _slug(dataset),
            f"r{self.lora.r}",
            self.quantization.mode.replace("-", "_"),
            f"s{self.seed}",
            digest,
        )
        return "-".join(words)


_DEFAULTS: dict[str, _Record] = {
    "data": DataConfig(),
    "lora": LoraSpec(),
    "training": TrainingConfig(),
}
_ORDERED = (
    ("quantization", "overrides"),
    ("lora", "rank_pattern"),
    ("lora", "alpha_pattern"),
)
"""Patterns whose order decides: the last match of an override wins, the first of the others."""


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
    if first["type"] == "value_error" and field in ("", "lora"):
        return message  # of fields that do not go together: it names them
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
    if why := _NOT_OFFERED.get(key.removeprefix("lora.")):
        return f": {why}"
    names = field_names()
    by_last_word = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    close = by_last_word or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; the fields are {', '.join(names)}"


def parse_assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """``"training.num_train_epochs=3"`` -> ``("training.num_train_epochs", 3)``.

    Names, paths and patterns are taken as they stand, unless they are quoted; other values are read
    as YAML, without tags and aliases: a few of these can unfold to gigabytes, and none is of use
    here. Nothing of a value is cut off as a comment. Raises ``UserError`` that begins with
    ``option``.
    """
    key, equals, value = text.partition("=")
    key, value, text = key.strip(), value.strip(), f"{option} {text[:_LONGEST]}"
    if not equals:
        raise UserError(f"{text}: write it as FIELD=VALUE, e.g. training.num_train_epochs=3")
    if key not in [*field_names(), "quantization"]:
        raise UserError(f"{text}: unknown field {key}{_suggestion(key)}")
    if _holds_text(key) and value not in ("", "null") and value[0] not in "'\"":
        return key, value
    try:
        tokens = list(yaml.scan(value))
        if any(isinstance(t, yaml.TagToken | yaml.AliasToken) for t in tokens):
            raise UserError(f"{text}: write the value out, without YAML's tags and aliases")
        read = max((t.end_mark.index for t in tokens if t.start_mark != t.end_mark), default=0)
        parsed = yaml.safe_load(value) if not value[read:].strip() else value
    except (yaml.YAMLError, ValueError, RecursionError):  # an impossible date is a ValueError
        raise UserError(f"{text}: the value {_shown(value)} is not valid YAML") from None
    # YAML 1.1 reads 1e-3 as text; a number is meant.
    if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", parsed):
        parsed = float(parsed)
    return key, parsed


def _holds_text(key: str) -> bool:
    """Whether any text is a value of the field."""
    record: Any = TrialConfig
    for name in key.split("."):
        record = record.model_fields[name].annotation
    return record is str or {*get_args(record)} == {str, type(None)}


def assign(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of ``values`` (nested dicts) in which the dotted ``key`` is ``value``."""
    head, _, rest = key.partition(".")
    if not rest:
        return {**values, head: value}
    inner = values.get(head, {})
    if head == "quantization" and isinstance(inner, str):
        inner = {"mode": inner}
    return {**values, head: assign(inner if isinstance(inner, Mapping) else {}, rest, value)}
