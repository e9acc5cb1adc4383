import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tune_study.config import (
    QuantizationConfig,
    TrialConfig,
    assign,
    field_names,
    parse_assignment,
    parse_trial,
)
from tune_study.errors import UserError, first_line, printed

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
    }
    value = other.get(name, 77 if "rate" not in name and "decay" not in name else 0.077)
    changed = parse_trial(assign(GOOD, name, value))
    assert changed.trial_id != parse_trial(GOOD).trial_id


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
        ({"dataset": "mnist"}, ["dataset", "mnist", "cifar10", "folder:PATH"]),
        ({"lora": {"target_modules": "("}}, ["lora.target_modules", "regular expression"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "nan"]),
        ({"training": {"num_epochs": 3}}, ["training.num_epochs", "training.num_train_epochs"]),
        ({"modle": "x"}, ["modle", "did you mean model"]),
    ],
)
def test_wrong_values_are_refused_with_field_value_and_what_is_allowed(change, words):
    with pytest.raises(UserError) as refused:
        parse_trial({**GOOD, **change})
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


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
