"""What treatments and configurations are called, and that no two share a name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import grids
from tune_study.config import TrialConfig, field_names, parse_trial
from tune_study.folder import names, schema
from tune_study.study import plan


def setting(mode="nf4", skip=(), overrides=None):
    return {"quantization": {"mode": mode, "skip_layers": list(skip), "overrides": overrides or {}}}


def blocks(*numbers):
    return [f"blocks.{number}.*" for number in numbers]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"quantization": "int8"}, "int8"),
        ({}, None),
        (setting(), "nf4"),
        ({"quantization": {"mode": "none"}}, "none"),
        (setting(skip=blocks(0, 1, 2, *range(4, 12))), "nf4 without blocks 0-2, 4-11"),
        (setting(skip=blocks(7)), "nf4 without block 7"),
        (setting(skip=blocks(11, 9, 10)), "nf4 without blocks 9-11"),
        (setting("nf4-dq", ["*.qkv", *blocks(3)]), "nf4-dq without block 3, *.qkv"),
        (setting(skip=["a, b"]), 'nf4 without "a, b"'),
        (
            setting("int8", [], {**dict.fromkeys(blocks(0, 1), "nf4"), "*.qkv": "none"}),
            "int8, blocks 0-1 nf4, *.qkv none",
        ),
        (setting("int8", blocks(5), {"*.fc1": "nf4"}), "int8 without block 5, *.fc1 nf4"),
    ],
)
def test_a_treatment_is_named_by_what_differs_from_its_mode(entry, name):
    assert names.treatment(entry) == name


def test_every_setting_of_the_sensitivity_grid_has_a_name_of_its_own():
    trials = plan.plan(grids.sensitivity())
    found = {trial.treatment for trial in trials}
    assert len(found) == 14
    assert {"none", "nf4", "nf4 without blocks 0-2, 4-11", "nf4 without blocks 1-11"} < found


PATTERNS = st.lists(
    st.sampled_from([*blocks(0, 1, 2, 10), "*.qkv", "a b", "a,b", "a", "b"]), max_size=4
)
OVERRIDES = st.dictionaries(
    st.sampled_from([*blocks(0, 1, 2), "*.qkv", "a b"]),
    st.sampled_from(["int8", "nf4"]),
    max_size=3,
)
SETTINGS = st.tuples(st.sampled_from(["none", "nf4", "nf4-dq"]), PATTERNS, OVERRIDES)


def meaning(mode, skip, overrides):
    """The same for two settings that no layer can tell apart by their lists alone."""
    runs = []
    for pattern, other in overrides.items():
        if runs and runs[-1][1] == other:
            runs[-1][0].add(pattern)
        else:
            runs.append(({pattern}, other))
    return mode, frozenset(skip), tuple((frozenset(p), m) for p, m in runs)


@given(SETTINGS, SETTINGS)
def test_two_treatments_share_a_name_when_they_mean_the_same(one, other):
    same = names.treatment(setting(*one)) == names.treatment(setting(*other))
    assert same == (meaning(*one) == meaning(*other))


def cell(**changes):
    values = {"model": "deit_tiny_patch16_224", "dataset": "cifar10", **changes}
    return parse_trial(values).model_dump(mode="json")


def called(*entries):
    return names.configurations([names.settings(entry) for entry in entries])


def test_a_configuration_is_named_by_what_varies():
    rate = {"training": {"learning_rate": 1e-3}}
    assert (
        called(cell(), cell(seed=1), cell(quantization="nf4"))
        == ["deit_tiny_patch16_224 · cifar10 · r 8"] * 3
    )
    assert called(cell(), cell(**rate), cell(seed=3, **rate)) == [
        "learning rate 0.0001",
        "learning rate 0.001",
        "learning rate 0.001",
    ]
    lora = [cell(lora={"r": r, "lora_alpha": 2 * r}) for r in (4, 8)]
    assert called(*lora) == ["r 4", "r 8"]
    assert called(*lora, cell(lora={"r": 8, "lora_alpha": 8})) == [
        "r 4 · alpha 8",
        "r 8 · alpha 16",
        "r 8 · alpha 8",
    ]
    sizes = [cell(data={"image_size": size}, pretrained=size is None) for size in (None, 96)]
    assert called(*sizes) == [
        "pretrained on · image size default",
        "pretrained off · image size 96",
    ]
    folders = [cell(dataset=f"folder:{path}") for path in ("/a/roses", "/b/tulips/")]
    assert called(*folders) == ["roses", "tulips"]
    assert called(*[cell(dataset=f"folder:{path}") for path in ("/a/x", "/b/x")]) == [
        "folder:/a/x",
        "folder:/b/x",
    ]
    assert called() == []


def test_long_values_are_cut_where_they_can_still_be_told_apart():
    patterns = ["blocks." + "a" * 60 + end for end in ("x", "y")]
    short = called(*[cell(lora={"target_modules": pattern}) for pattern in patterns])
    assert short[0].startswith("targets blocks.aaaa")
    assert max(map(len, short)) < 50
    middle = ["a" * 30 + letter + "a" * 30 for letter in "xy"]
    whole = called(*[cell(lora={"target_modules": pattern}) for pattern in middle])
    assert whole == [f"targets {pattern}" for pattern in middle]


VALUES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["a", "b", "a · r 1"]),
        "lora.r": st.integers(1, 2),
        "lora.lora_alpha": st.integers(1, 3),
        "data.image_size": st.sampled_from([None, 1, 96]),
        "training.learning_rate": st.sampled_from([1e-4, 1.0000001e-4, 1e-3]),
        "pretrained": st.booleans(),
        "seed": st.integers(0, 2),
        "quantization.mode": st.sampled_from(["none", "nf4"]),
    }
)


@given(st.lists(VALUES, max_size=8))
def test_configurations_share_a_name_when_they_are_equal(cells):
    found = names.configurations(cells)
    keys = [
        {field: value for field, value in one.items() if names.in_configuration(field)}
        for one in cells
    ]
    for i, one in enumerate(keys):
        for j, other in enumerate(keys):
            assert (one == other) == (found[i] == found[j])


def test_what_an_earlier_plan_lacks_is_what_it_meant():
    entry = cell()
    del entry["training"]["gradient_checkpointing"]
    assert names.settings(entry) == names.settings(cell())
    assert names.settings({"trial_id": "t", "quantization": "nf4"}) == {
        **schema.ABSENT,
        "quantization.mode": "nf4",
    }


def test_every_field_of_a_trial_is_a_column():
    columns = [column.name for column in schema.TRIALS]
    assert set(field_names()) <= set(columns)
    assert {*field_names()} == {*schema.SETTING_NAMES}
    usual = dict(TrialConfig(model="m", dataset="digits").configuration)
    for name, value in schema.ABSENT.items():
        assert usual[name] == value


def test_a_trial_is_told_apart_by_what_differs():
    entries = [
        {
            **cell(training={"learning_rate": rate}, quantization=mode, seed=seed),
            "trial_id": f"t{n}",
        }
        for n, (rate, mode, seed) in enumerate(
            [(1e-3, "nf4", 1), (1e-4, {"mode": "nf4", "skip_layers": blocks(2)}, 1)]
        )
    ]
    short, beside = names.told_apart(entries)
    assert short == {
        "t0": "learning rate 0.001 · nf4 · seed 1",
        "t1": "learning rate 0.0001 · nf4 without block 2 · seed 1",
    }
    assert beside == {
        "t0": "learning rate 0.001",
        "t1": "learning rate 0.0001, nf4 without block 2",
    }
    usual = [{**cell(lora={"r": r, "lora_alpha": r}), "trial_id": str(r)} for r in (4, 8)]
    assert set(names.told_apart(usual)[1].values()) == {""}


def test_the_configuration_of_a_trial_is_all_but_quantization_and_seed():
    base = {"model": "m", "dataset": "digits"}
    one = parse_trial(base).configuration
    assert {name for name, _ in one} == {
        name for name in field_names() if name != "seed" and not name.startswith("quantization.")
    }
    assert hash(one) == hash(parse_trial({**base, "seed": 3, "quantization": "nf4"}).configuration)
    for name, value in (("data", {"image_size": 96}), ("lora", {"lora_dropout": 0.5})):
        assert parse_trial({**base, name: value}).configuration != one
