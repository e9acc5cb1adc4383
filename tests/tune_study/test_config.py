import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tune_study.config import (
    SPLIT_SEED,
    QuantizationConfig,
    TrialConfig,
    assign,
    field_names,
    parse_assignment,
    parse_trial,
)
from tune_study.errors import UserError, first_line, printed

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"model": "deit_tiny_patch16_224", "dataset": "cifar10"}


def test_trial_id_names_the_axes_and_ends_in_eight_hex_digits():
    trial = parse_trial({**GOOD, "lora": {"r": 4}, "quantization": "nf4-dq", "seed": 7})
    *words, digest = trial.trial_id.split("-")
    assert words == ["deit_tiny_patch16_224", "cifar10", "r4", "nf4_dq", "s7"]
    assert len(digest) == 8
    int(digest, 16)


@pytest.mark.parametrize("name", field_names())
def test_every_field_changes_the_id(name):
    """Two configurations that differ anywhere must not share an id."""
    other = {
        "model": "deit_small_patch16_224",
        "dataset": "cifar100",
        "lora.target_modules": "blocks.*",
        "quantization.mode": "int8",
        "quantization.skip_layers": ["blocks.0.*"],
        "quantization.overrides": {"blocks.0.*": "int8"},
        "pretrained": False,
        "data.augment": "none",
        "training.compute_dtype": "fp32",
        "lora.lora_dropout": 0.5,
        "training.gradient_checkpointing": True,
        "training.gradient_noise_scale": True,
        "training.step": "graph",
        "lora.exclude_modules": ".*qkv",
        "lora.layers_to_transform": [0, 3],
        "lora.rank_pattern": {"qkv": 2},
        "lora.alpha_pattern": {"qkv": 2},
        "lora.use_rslora": True,
        "lora.use_dora": True,
        "lora.init_lora_weights": "pissa",
        "lora.bias": "all",
        "lora.lora_bias": True,
        "data.image_column": "photo",
        "data.label_column": "kind",
    }
    good = {**GOOD, "dataset": "hf:x"} if "column" in name else GOOD
    value = other.get(name, 77 if "rate" not in name and "decay" not in name else 0.077)
    changed = parse_trial(assign(good, name, value))
    assert changed.trial_id != parse_trial(good).trial_id


def test_id_is_the_same_for_the_same_configuration_written_otherwise():
    short = parse_trial({**GOOD, "quantization": "nf4"})
    long = parse_trial(
        {"seed": 42, "quantization": {"mode": "nf4"}, "lora": {"r": 8, "lora_alpha": 16}, **GOOD}
    )
    assert short == long
    assert short.trial_id == long.trial_id
    assert TrialConfig.model_validate(json.loads(short.model_dump_json())) == short


@pytest.mark.parametrize("name", ["../../etc/passwd", "/root", "..", ".hidden", "a b\n<script>"])
def test_id_is_a_plain_file_name_whatever_the_names_are(name):
    trial = parse_trial({"model": name, "dataset": f"folder:{name}"})
    assert "/" not in trial.trial_id
    assert not trial.trial_id.startswith(".")
    assert trial.trial_id.isprintable()
    assert "<" not in trial.trial_id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": {"r": 0}}, ["lora.r", "0", "greater than or equal to 1"]),
        ({"quantization": "nf5"}, ["quantization.mode", "nf5", "int8", "nf4-dq", "fp4-dq"]),
        ({"dataset": "mnist"}, ["dataset", "mnist", "cifar10", "folder:PATH", "code:FUNCTION"]),
        ({"dataset": "code:"}, ["dataset = 'code:': choose one of", "or code:FUNCTION"]),
        ({"dataset": "code:a.b"}, ["dataset = 'code:a.b': choose one of"]),
        (
            {"data": {"augment": "mirror"}},
            ["data.augment = 'mirror': choose one of auto, flip-crop, crop, none or code:FUNCTION"],
        ),
        ({"data": {"augment": "code:"}}, ["data.augment = 'code:': choose one of auto"]),
        (
            {"data": {"label_column": "kind"}, "dataset": "code:x"},
            ["data.label_column = kind: code:x has no columns"],
        ),
        (
            {"data": {"label_column": "kind"}},
            ["data.label_column = kind: cifar10 has no columns", "name a data set with hf:"],
        ),
        ({"data": {"image_column": ""}, "dataset": "hf:x"}, ["data.image_column", "1 character"]),
        ({"lora": {"target_modules": "("}}, ["lora.target_modules", "regular expression"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "nan"]),
        ({"training": {"num_epochs": 3}}, ["training.num_epochs", "training.num_train_epochs"]),
        ({"modle": "x"}, ["modle", "did you mean model"]),
        (
            {"lora": {"init_lora_weights": "pisa"}},
            ["lora.init_lora_weights = 'pisa'", "choose one of default, gaussian", "pissa_niter_N"],
        ),
        ({"lora": {"init_lora_weights": "EVA"}}, ["it needs the activations", "choose one of"]),
        ({"lora": {"init_lora_weights": "lora_ga"}}, ["it needs gradients of training images"]),
        ({"lora": {"init_lora_weights": False}}, ["for debugging", "choose one of default"]),
        ({"lora": {"init_lora_weights": "mica"}}, ["it freezes B"]),
        ({"lora": {"layers_to_transform": []}}, ["lora.layers_to_transform", "at least one block"]),
        ({"lora": {"exclude_modules": "("}}, ["lora.exclude_modules", "regular expression"]),
        ({"lora": {"rank_pattern": {"(": 2}}}, ["lora.rank_pattern", "regular expression"]),
        ({"lora": {"rank_pattern": {"qkv": 0}}}, ["lora.rank_pattern.qkv", "0", "equal to 1"]),
        ({"lora": {"use_qalora": True}}, ["unknown field lora.use_qalora: PEFT has it for GPTQ"]),
        ({"lora": {"loftq_config": {}}}, ["lora.loftq_iter"]),
        (
            {"lora": {"init_lora_weights": "orthogonal", "r": 3}},
            [
                "lora.init_lora_weights = orthogonal: it needs even ranks, and one is 3",
                "lora.r = 4",
            ],
        ),
        (
            {"lora": {"lora_bias": True, "use_dora": True}},
            ["lora.lora_bias = true", "leave lora.use_dora false"],
        ),
        (
            {"lora": {"use_dora": True}, "training": {"gradient_noise_scale": True}},
            ["training.gradient_noise_scale = true", "lora.use_dora", "leave either out"],
        ),
        (
            {"lora": {"bias": "all"}, "training": {"gradient_noise_scale": True}},
            ["training.gradient_noise_scale = true", "lora.bias"],
        ),
    ],
)
def test_wrong_values_are_refused_with_field_value_and_what_is_allowed(change, words):
    with pytest.raises(UserError) as refused:
        parse_trial({**GOOD, **change})
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_pefts_true_is_the_default_initialisation():
    as_in_peft = parse_trial({**GOOD, "lora": {"init_lora_weights": True}})
    assert as_in_peft == parse_trial(GOOD)


def test_a_trial_of_an_earlier_study_keeps_its_id():
    """As a study wrote it on 2026-11-27, before LoRA had more than four fields."""
    values = {
        "model": "vit_small_patch14_dinov2",
        "dataset": "cifar10",
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
        },
        "quantization": {"mode": "none", "skip_layers": [], "overrides": {}},
        "seed": 42,
        "pretrained": True,
        "data": {
            "train_size": 480,
            "val_size": 500,
            "test_size": 500,
            "image_size": 112,
            "augment": "auto",
        },
        "training": {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 128,
            "learning_rate": 0.0005,
            "weight_decay": 0.01,
            "warmup_steps": 5,
            "max_grad_norm": 1.0,
            "early_stopping_patience": 5,
            "compute_dtype": "bf16",
            "gradient_checkpointing": False,
            "gradient_noise_scale": False,
        },
    }
    assert parse_trial(values).trial_id == "vit_small_patch14_dinov2-cifar10-r8-none-s42-e56d47b1"


def test_the_trials_of_the_published_study_keep_their_ids():
    plan = json.loads((ROOT / "docs/results/study.json").read_text())["plan"]
    assert len(plan) == 144
    for entry in plan:
        values = {name: value for name, value in entry.items() if name != "trial_id"}
        assert parse_trial(values).trial_id == entry["trial_id"]


def test_the_order_of_rank_patterns_changes_the_id():
    ids = {
        parse_trial({**GOOD, "lora": {field: dict(pairs)}}).trial_id
        for field in ("rank_pattern", "alpha_pattern")
        for pairs in (
            [("qkv", 2), ("blocks.0.*", 4)],
            [("blocks.0.*", 4), ("qkv", 2)],
        )
    }
    assert len(ids) == 4


def test_records_are_frozen():
    with pytest.raises(ValidationError):
        parse_trial(GOOD).seed = 3


def test_mode_of_layer_skip_wins_and_the_last_override_counts():
    config = QuantizationConfig(
        mode="nf4",
        skip_layers=("blocks.0.*",),
        overrides={"blocks.1*": "int8", "blocks.11.*": "fp4", "blocks.0.*": "int8"},
    )
    modes = {name: config.mode_of(f"{name}.attn.qkv") for name in ("blocks.0", "blocks.2")}
    assert modes == {"blocks.0": "none", "blocks.2": "nf4"}
    assert config.mode_of("blocks.1.attn.qkv") == "int8"
    assert config.mode_of("blocks.11.attn.qkv") == "fp4"


def test_set_reads_yaml_values():
    assert parse_assignment("training.learning_rate=1e-3") == ("training.learning_rate", 1e-3)
    assert parse_assignment("pretrained=false") == ("pretrained", False)
    assert parse_assignment("quantization.skip_layers=[blocks.0.*]")[1] == ["blocks.0.*"]
    assert parse_assignment("data.train_size=null") == ("data.train_size", None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("dataset=folder:my #1", "folder:my #1"),
        ("dataset=folder:a: b", "folder:a: b"),
        ("dataset=folder:[exp] d", "folder:[exp] d"),
        ("dataset=folder:it's", "folder:it's"),
        ('dataset="folder:quoted #2"', "folder:quoted #2"),
        ("dataset='folder:é: x'", "folder:é: x"),
        ("dataset=folder:a=b", "folder:a=b"),
        ("dataset=hf:./a b@x", "hf:./a b@x"),
        ("data.label_column=yes", "yes"),
        ("data.label_column=7", "7"),
        ("model=yes", "yes"),
        ("model=123", "123"),
        ("lora.target_modules=[ab].*", "[ab].*"),
        ("lora.target_modules=.*\\.qkv # all", ".*\\.qkv # all"),
        ("lora.target_modules=*.x", "*.x"),
        ("seed=1 # one", "1 # one"),
        ("seed=1 ", 1),
        ("data.train_size= null", None),
        ("quantization.overrides={a: nf4}", {"a": "nf4"}),
        ("quantization.skip_layers=[a] # b", "[a] # b"),
    ],
)
def test_set_takes_a_value_whole(text, value):
    assert parse_assignment(text)[1] == value


@pytest.mark.parametrize("text", ["epochs=3", "training.learning_rate", "=3", "lora.r=[", ""])
def test_set_refuses_in_one_sentence(text):
    with pytest.raises(UserError, match="--set"):
        parse_assignment(text)


def test_assign_reaches_into_the_short_form_of_quantization():
    values = assign({**GOOD, "quantization": "nf4"}, "quantization.skip_layers", ["blocks.0.*"])
    assert parse_trial(values).quantization == QuantizationConfig(
        mode="nf4", skip_layers=("blocks.0.*",)
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(" \n"), "ValueError"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_an_error_says_is_its_first_line_or_its_name(error, line):
    assert first_line(error) == line


def test_a_mistake_is_printed_as_one_plain_line():
    assert printed(UserError("--name \x1b[2Jé\nx")) == "error: --name  [2Jé x"


@given(st.text(max_size=60))
def test_any_set_text_is_a_trial_or_a_user_error(text):
    with contextlib.suppress(UserError):
        parse_trial(assign(GOOD, *parse_assignment(text)))


@given(
    st.dictionaries(
        st.sampled_from(["model", "dataset", "lora", "quantization", "seed", "data", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.text(max_size=9), inner, max_size=2)
            ),
            max_leaves=4,
        ),
    )
)
def test_any_values_are_a_trial_or_a_user_error(values):
    with contextlib.suppress(UserError):
        assert parse_trial(values).trial_id


@pytest.mark.parametrize(
    ("name", "least", "most", "too_little", "too_much"),
    [
        ("lora.r", 1, 1024, 0, 1025),
        ("lora.lora_alpha", 1, 65536, 0, 65537),
        ("lora.lora_dropout", 0, 0.999, -0.001, 1),
        ("lora.loftq_iter", 1, 100, 0, 101),
        ("seed", 0, 2**31 - 1, -1, 2**31),
        ("data.train_size", 1, 10**9, 0, None),
        ("data.val_size", 1, 10**9, 0, None),
        ("data.test_size", 1, 10**9, 0, None),
        ("data.image_size", 8, 2048, 7, 2049),
        ("training.num_train_epochs", 1, 10_000, 0, 10_001),
        ("training.per_device_train_batch_size", 1, 65536, 0, 65537),
        ("training.gradient_accumulation_steps", 1, 4096, 0, 4097),
        ("training.per_device_eval_batch_size", 1, 65536, 0, 65537),
        ("training.learning_rate", 1e-9, 10, 0, 10.001),
        ("training.weight_decay", 0, 10, -0.001, 10.001),
        ("training.warmup_steps", 0, 10**9, -1, None),
        ("training.max_grad_norm", 1e-9, 1e9, 0, None),
        ("training.early_stopping_patience", 0, 10**9, -1, None),
        ("model", "m", "m" * 200, "", "m" * 201),
        ("dataset", "folder:x", "folder:" + "x" * 993, "", "folder:" + "x" * 994),
    ],
)
def test_a_field_takes_its_range_and_nothing_beyond(name, least, most, too_little, too_much):
    for value in (least, most):
        assert parse_trial(assign(GOOD, name, value))
    for value in (too_little, too_much):
        if value is not None:
            with pytest.raises(UserError):
                parse_trial(assign(GOOD, name, value))


def test_defaults():
    """An id is a hash of them, and cannot say which one has changed."""
    assert parse_trial(GOOD).model_dump(mode="json") == {
        **GOOD,
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
            "exclude_modules": None,
            "layers_to_transform": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": "default",
            "loftq_iter": 1,
            "bias": "none",
            "lora_bias": False,
        },
        "quantization": {"mode": "none", "skip_layers": [], "overrides": {}},
        "seed": 42,
        "pretrained": True,
        "data": {
            "train_size": None,
            "val_size": None,
            "test_size": None,
            "image_size": None,
            "augment": "auto",
            "image_column": None,
            "label_column": None,
        },
        "training": {
            "num_train_epochs": 15,
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 128,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "warmup_steps": 100,
            "max_grad_norm": 1.0,
            "early_stopping_patience": 5,
            "compute_dtype": "bf16",
            "gradient_checkpointing": False,
            "gradient_noise_scale": False,
            "step": "auto",
        },
    }
    assert SPLIT_SEED == 2024


def test_a_step_has_the_same_images_however_they_come():
    trial = parse_trial(
        assign(
            assign(GOOD, "training.per_device_train_batch_size", 6),
            "training.gradient_accumulation_steps",
            4,
        )
    )
    assert trial.images_per_step == 24
    smaller = trial.with_micro_batch(3)
    assert smaller.training.per_device_train_batch_size == 3
    assert smaller.training.gradient_accumulation_steps == 8
    assert smaller.images_per_step == 24


def test_the_order_of_overrides_changes_the_id_and_that_of_other_fields_does_not():
    overrides = [("blocks.*", "int8"), ("blocks.0.*", "nf4")]
    ids = {
        parse_trial(assign(GOOD, "quantization.overrides", dict(pairs))).trial_id
        for pairs in (overrides, overrides[::-1])
    }
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [("a/b c", "a_b_c"), ("...x", "x"), ("m" * 90, "m" * 80), ("...", "_"), ("a-b", "a_b")],
)
def test_a_models_name_in_an_id(name, part):
    assert parse_trial({**GOOD, "model": name}).trial_id.split("-")[0] == part


def test_a_folder_of_images_is_named_by_its_last_part():
    trial = parse_trial({**GOOD, "dataset": "folder:/a/flowers"})
    assert trial.trial_id.split("-")[1] == "folder_flowers"
    for name, part in (
        ("folder:flowers", "folder_folder_flowers"),  # ids stay as they began
        ("hf:flowers", "hf_flowers"),
        ("hf:owner/flowers", "hf_flowers"),
        ("hf:owner/flowers@small", "hf_flowers_small"),
        ("hf:./a/flowers", "hf_flowers"),
    ):
        assert parse_trial({**GOOD, "dataset": name}).trial_id.split("-")[1] == part
    told = dict(trial.configuration)
    assert (told["model"], told["dataset"]) == ("deit_tiny_patch16_224", "folder:/a/flowers")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2E4", -2e4),
        ("1.e3", 1e3),
        ("+1.5e+3", 1.5e3),
        ("e3", "e3"),
        ("x1e3", "x1e3"),
        ("1e3x", "1e3x"),
        ("a=b", "a=b"),
    ],
)
def test_an_exponent_is_a_number_where_the_whole_text_is_one(text, value):
    assert parse_assignment(f" seed = {text}") == ("seed", value)


@pytest.mark.parametrize("text", ["seed=!!int 1", "quantization.skip_layers=[&a x, *a]"])
def test_set_takes_no_tags_and_aliases(text):
    with pytest.raises(UserError, match="without YAML's tags and aliases"):
        parse_assignment(text)


def test_a_field_that_is_missing_or_unknown_is_named():
    for values, words in (
        ({"dataset": "digits"}, "model is missing: the grid must name a model"),
        ({**GOOD, "zzz": 1}, "unknown field zzz; the fields are model, dataset, "),
        ({**GOOD, "data": {"r": 1}}, "unknown field data.r; did you mean lora.r?"),
    ):
        with pytest.raises(UserError) as refused:
            parse_trial(values)
        assert str(refused.value).startswith(words)


def test_what_a_sentence_repeats_of_the_user_is_cut():
    with pytest.raises(UserError) as refused:
        parse_trial({**GOOD, "dataset": "x" * 1000})
    assert 200 <= len(str(refused.value)) < 310
    with pytest.raises(UserError, match="a int that is too long to print"):
        parse_trial({**GOOD, "seed": 10**5000})


def test_a_tables_columns_tell_its_images_and_labels_apart():
    trial = parse_trial({**GOOD, "dataset": "hf:x"})
    assert trial.data_name == "hf:x"
    named = parse_trial({**GOOD, "dataset": "hf:x", "data": {"label_column": "kind"}})
    assert named.data_name == "hf:x (data.label_column=kind)"
    assert named.data.columns == (None, "kind")
