"""A trial's results.json, whatever it holds."""

import pytest

from tune_study.folder import schema
from tune_study.folder.files import write_json
from tune_study.folder.results import (
    AXES,
    PLANNED,
    axes,
    flatten,
    measured,
    read_results,
    status_of,
)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"status": "completed"}, "completed"),
        ({"status": "interrupted"}, "interrupted"),
        ({"status": "done"}, "pending"),
        ({"status": ["completed"]}, "pending"),
        ({}, "pending"),
    ],
)
def test_the_status_is_a_word_of_the_schema(tmp_path, content, status):
    (tmp_path / "trial").mkdir()
    write_json(tmp_path / "trial" / "results.json", content)
    assert read_results(tmp_path, "trial") == content
    assert status_of(tmp_path, "trial") == status


@pytest.mark.parametrize("text", [None, "", "[1]", "null", '{"status": "comp'])
def test_what_is_no_record_is_an_empty_one(tmp_path, text):
    (tmp_path / "trial").mkdir()
    if text is not None:
        (tmp_path / "trial" / "results.json").write_text(text)
    assert read_results(tmp_path, "trial") == {}
    assert status_of(tmp_path, "trial") == "pending"


def test_nested_records_get_dotted_names():
    nested = {"a": 1, "lora": {"r": 4, "deep": {"x": None}}, "none": {}, "many": [{"y": 2}]}
    flat = {"a": 1, "lora.r": 4, "lora.deep.x": None, "none": {}, "many": [{"y": 2}]}
    assert flatten(nested) == flat


def test_the_axes_are_those_of_the_plan():
    entry = {
        "trial_id": "t",
        "model": "m",
        "dataset": "d",
        "lora": {"r": 4, "lora_alpha": 8},
        "quantization": {"mode": "nf4"},
        "seed": 7,
    }
    expected = {
        "trial_id": "t",
        "model": "m",
        "dataset": "d",
        "lora_r": 4,
        "lora_alpha": 8,
        "quantization": "nf4",
        "seed": 7,
    }
    assert {name: axes(entry)[name] for name in AXES} == expected
    assert tuple(expected) == AXES
    assert tuple(axes(entry)) == PLANNED
    assert axes({**entry, "quantization": "int8"})["quantization"] == "int8"
    nothing = {**dict.fromkeys(PLANNED), **schema.ABSENT, "trial_id": "t"}
    assert axes({"trial_id": "t", "lora": 3}) == nothing


def test_the_measured_columns_come_from_every_part_and_never_the_axes():
    results = {
        "status": "completed",
        "simulated": False,
        "run": {"device": "cpu", "config": {}, "seed": 9},
        "train": {
            "training_results": {"val_accuracy": 0.5, "no_column": 1},
            "test_metrics": {"test_loss": None, "test_accuracy": 0.25},
            "model_metrics": {"weights_bytes": 3, "model": "another"},
            "resource_metrics": {"batch_size": 4},
            "epochs": [],
        },
    }
    assert measured(results) == {
        "device": "cpu",
        "val_accuracy": 0.5,
        "test_accuracy": 0.25,
        "weights_bytes": 3,
        "batch_size": 4,
        "status": "completed",
        "simulated": False,
        "error": None,
    }
    assert measured({"train": 3}) == {"status": None, "simulated": None, "error": None}
