"""A trial's results.json, whatever it holds."""

import pytest

from tune_study.folder.files import write_json
from tune_study.folder.results import flatten, read_results, status_of


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
