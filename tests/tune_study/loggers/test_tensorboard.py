import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2

from tests.tune_study.loggers import board
from tune_study.folder.files import write_json
from tune_study.loggers.hparams import axes_of
from tune_study.loggers.tensorboard import SCALARS, TensorBoardCallback


@pytest.fixture
def plan(tiny):
    configs = [tiny(mode) for mode in ("none", "nf4-dq")]
    return [{"trial_id": c.trial_id, **c.model_dump(mode="json")} for c in configs]


@pytest.fixture
def trial(plan):
    trial_id = plan[-1]["trial_id"]

    class Trial(SimpleNamespace):
        __hash__ = object.__hash__

    return Trial(config={"trial_id": trial_id, "trial": plan[-1]}, local_path=None)


def row(epoch, accuracy):
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "best_val_accuracy": accuracy,
        "weights_bytes": 1_500_000,
        "peak_train_bytes": float("nan"),
        "training_iteration": epoch,
    }


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_scalars_and_hparams_are_there_while_the_trial_runs(trial, plan, tmp_path):
    callback = TensorBoardCallback(tmp_path, axes_of(plan))
    callback.log_trial_start(trial)
    callback.log_trial_result(0, trial, row(1, 0.5))
    folder = tmp_path / "tensorboard" / trial.config["trial_id"]
    found = events(folder)
    for _ in range(100):  # its writer thread flushes every five seconds
        if {"accuracy/validation", "compare/weights_MB"} <= set(found.Tags()["scalars"]):
            break
        time.sleep(0.2)
        found.Reload()
    assert [e.value for e in found.Scalars("accuracy/validation")] == [0.5]
    assert [e.value for e in found.Scalars("compare/weights_MB")] == [1.5]
    assert "compare/peak_train_MB" not in found.Tags()["scalars"]  # unknown is not 0
    _, rows = board.hparams(tmp_path / "tensorboard")
    row_ = rows[trial.config["trial_id"]]
    assert row_.hparams["quantization"].string_value == "nf4-dq"
    assert row_.sessions[0].status == api_pb2.STATUS_UNKNOWN


def test_no_epoch_appears_twice_after_a_restart_and_the_test_result_comes_last(
    trial, plan, tmp_path
):
    for epochs in ((1, 2), (1, 2, 3)):  # the second run replays the first two
        callback = TensorBoardCallback(tmp_path, axes_of(plan))
        callback.log_trial_start(trial)
        for epoch in epochs:
            callback.log_trial_result(0, trial, row(epoch, epoch / 10))
    callback.log_trial_result(0, trial, row(3, 0.3))  # a retry reports it again
    (tmp_path / trial.config["trial_id"]).mkdir()
    measured = {
        "test_metrics": {"test_accuracy": 0.7},
        "model_metrics": {"weights_bytes": 1_500_000, "quantization_error": 0.09},
    }
    results = {"status": "completed", "train": measured}
    write_json(tmp_path / trial.config["trial_id"] / "results.json", results)
    callback.log_trial_end(trial)
    found = events(tmp_path / "tensorboard" / trial.config["trial_id"])
    assert [e.step for e in found.Scalars("accuracy/validation")] == [1, 2, 3]
    assert [e.step for e in found.Scalars("compare/weights_MB")] == [1, 2, 3]
    assert [(e.step, e.value) for e in found.Scalars("compare/test_accuracy")] == [
        (3, pytest.approx(0.7))
    ]
    # no epoch has reported it
    assert [e.step for e in found.Scalars("compare/quantization_error")] == [3]
    _, rows = board.hparams(tmp_path / "tensorboard")
    assert rows[trial.config["trial_id"]].sessions[0].status == api_pb2.STATUS_SUCCESS


@pytest.mark.parametrize(
    ("status", "expected"),
    [("error", api_pb2.STATUS_FAILURE), ("interrupted", api_pb2.STATUS_UNKNOWN)],
)
def test_a_failed_trial_is_no_success_and_an_interrupted_one_has_not_ended(
    trial, plan, tmp_path, status, expected
):
    callback = TensorBoardCallback(tmp_path, axes_of(plan))
    callback.log_trial_start(trial)
    (tmp_path / trial.config["trial_id"]).mkdir()
    write_json(tmp_path / trial.config["trial_id"] / "results.json", {"status": status})
    callback.log_trial_end(trial)
    _, rows = board.hparams(tmp_path / "tensorboard")
    assert rows[trial.config["trial_id"]].sessions[0].status == expected


def test_every_column_has_its_tag_and_bytes_are_shown_as_megabytes(trial, plan, tmp_path):
    callback = TensorBoardCallback(tmp_path, axes_of(plan))
    columns = {name: float(number) for number, name in enumerate(SCALARS, start=1)}
    in_megabytes = ("weights_bytes", "peak_train_bytes", "activation_bytes")
    columns |= {name: columns[name] * 1e6 for name in in_megabytes}
    callback.log_trial_result(0, trial, {**columns, "epoch": 1})
    (tmp_path / trial.config["trial_id"]).mkdir()
    measured = {"test_metrics": {"test_accuracy": 0.5, "test_loss": 1.5}}
    results = {"status": "pruned", "train": {**measured, "model_metrics": {"weights_bytes": 9}}}
    write_json(tmp_path / trial.config["trial_id"] / "results.json", results)
    callback.log_trial_end(trial)
    found = events(tmp_path / "tensorboard" / trial.config["trial_id"])
    values = {tag: [e.value for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert values == {
        **{tag: [float(number)] for number, tag in enumerate(SCALARS.values(), start=1)},
        "compare/test_accuracy": [0.5],
        "compare/test_loss": [1.5],
    }
    _, rows = board.hparams(tmp_path / "tensorboard")
    assert rows[trial.config["trial_id"]].sessions[0].status == api_pb2.STATUS_SUCCESS
    callback.log_trial_end(trial)  # twice is no error


def test_a_trial_begins_its_run_anew(trial, plan, tmp_path):
    stale = tmp_path / "tensorboard" / trial.config["trial_id"] / "events.old"
    stale.parent.mkdir(parents=True)
    stale.touch()
    callback = TensorBoardCallback(tmp_path, axes_of(plan))
    callback.log_trial_start(trial)
    first = callback._trial_writer[trial]
    assert not stale.exists()
    callback.log_trial_start(trial)
    assert callback._trial_writer[trial] is not first
