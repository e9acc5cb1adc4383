"""The HParams page, read by TensorBoard's own code."""

import pytest
from tensorboard.plugins.hparams import api_pb2

from tests.tune_study.loggers import board
from tune_study.loggers import hparams
from tune_study.loggers.event_files import replace_run, scalar


def cell(mode="nf4", seed=42, r=8, rate=1e-4, layers=()):
    return {
        "trial_id": f"{mode}-{seed}-{r}",
        "model": "m",
        "lora": {"r": r},
        "quantization": {"mode": mode, "skip_layers": list(layers), "overrides": {}},
        "seed": seed,
        "training": {"learning_rate": rate},
        "data": {"image_size": None},
    }


PLAN = [cell(m, s, r) for s in (123, 42) for r in (16, 4) for m in ("none", "nf4")]


def test_axes_are_what_differs_and_always_mode_and_seed():
    assert [axis.name for axis in hparams.axes_of(PLAN)] == ["lora.r", "quantization.mode", "seed"]
    assert [axis.name for axis in hparams.axes_of(PLAN[:1])] == ["quantization.mode", "seed"]


def test_values_are_listed_in_order_and_a_seed_is_a_name():
    by_name = {axis.name: axis for axis in hparams.axes_of(PLAN)}
    assert by_name["lora.r"].values == [4.0, 16.0]
    assert by_name["seed"].values == ["42", "123"]
    assert by_name["quantization.mode"].values == ["nf4", "none"]
    assert all(axis.values == [] for axis in hparams.axes_of(PLAN, listed=False))


def test_values_of_several_kinds_are_text():
    mixed = [cell(), {**cell(), "data": {"image_size": 96}}, cell(layers=["blocks.0.*"])]
    by_name = {axis.name: axis for axis in hparams.axes_of(mixed)}
    assert by_name["data.image_size"].values == ["96", "None"]
    assert by_name["quantization.mode"].values == ["nf4", "nf4 without block 0"]
    assert set(by_name) == {"data.image_size", "quantization.mode", "seed"}


@pytest.fixture
def page(tmp_path):
    """A study with one trial running, one that ended and one that failed."""
    axes = hparams.axes_of(PLAN)
    replace_run(tmp_path / "study", [(0, hparams.experiment(axes))])
    ends = {
        PLAN[1]["trial_id"]: [hparams.session_end(failed=False)],
        PLAN[2]["trial_id"]: [hparams.session_end(failed=True)],
    }
    for entry in PLAN[:3]:
        name = entry["trial_id"]
        records = [hparams.session_start(name, entry, axes), *ends.get(name, [])]
        points = [(1, scalar("compare/weights_MB", 1.5)), (2, scalar("compare/weights_MB", 2.5))]
        replace_run(tmp_path / name, [*((0, record) for record in records), *points])
    return board.hparams(tmp_path)


def test_tensorboard_offers_the_values_to_tick(page):
    experiment, _ = page
    offered = {info.name: list(info.domain_discrete.items()) for info in experiment.hparam_infos}
    assert offered == {"lora_r": [4, 16], "quantization": ["nf4", "none"], "seed": ["42", "123"]}
    headings = {metric.name.tag: metric.display_name for metric in experiment.metric_infos}
    assert headings == hparams.METRICS


def test_every_trial_has_a_row_with_its_newest_values_also_while_it_runs(page):
    _, rows = page
    assert set(rows) == {entry["trial_id"] for entry in PLAN[:3]}
    running = rows[PLAN[0]["trial_id"]]
    assert running.hparams["quantization"].string_value == "none"
    assert running.hparams["lora_r"].number_value == 16
    (value,) = running.metric_values
    assert (value.name.tag, value.value) == ("compare/weights_MB", 2.5)


def test_the_row_tells_how_a_trial_ended(page):
    _, rows = page
    states = [rows[entry["trial_id"]].sessions[0].status for entry in PLAN[:3]]
    assert states == [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
