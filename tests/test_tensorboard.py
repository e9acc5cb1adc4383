import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tune_study.files import write_json
from tune_study.tensorboard import METRICS, TensorBoardCallback, axes_of


@pytest.fixture
def trial(tiny):
    config = tiny("nf4-dq")

    class Trial(SimpleNamespace):
        __hash__ = object.__hash__

    values = {"trial_id": config.trial_id, "trial": config.model_dump(mode="json")}
    return Trial(config=values, local_path=None)


def test_axes_are_what_differs_and_always_mode_and_seed(tiny):
    cells = [
        tiny(m, lora={"r": r}).model_dump(mode="json") for m in ("none", "nf4") for r in (2, 4)
    ]
    assert axes_of(cells) == ["lora.r", "quantization.mode", "seed"]
    assert axes_of(cells[:1]) == ["quantization.mode", "seed"]


def row(epoch, accuracy):
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "best_val_accuracy": accuracy,
        "weights_bytes": 1000,
        "peak_train_bytes": float("nan"),
        "training_iteration": epoch,
    }


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_scalars_and_hparams_are_there_while_the_trial_runs(trial, tmp_path):
    callback = TensorBoardCallback(tmp_path, ["model", "quantization.mode"])
    callback.log_trial_start(trial)
    callback.log_trial_result(0, trial, row(1, 0.5))
    folder = tmp_path / "tensorboard" / trial.config["trial_id"]
    found = events(folder)
    for _ in range(100):  # its writer thread flushes every five seconds
        if "accuracy/validation" in found.Tags()["scalars"]:
            break
        time.sleep(0.2)
        found.Reload()
    assert [e.value for e in found.Scalars("accuracy/validation")] == [0.5]
    assert "compare/peak_train_bytes" not in found.Tags()["scalars"]  # unknown is not 0
    content = found.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in content
    start = content["_hparams_/session_start_info"]
    assert b"nf4-dq" in start
    assert b"vit_glyphs_patch4_32" in start
    experiment = content["_hparams_/experiment"]
    assert all(metric.encode() in experiment for metric in METRICS)


def test_no_epoch_appears_twice_after_a_restart_and_the_test_result_comes_last(trial, tmp_path):
    for epochs in ((1, 2), (1, 2, 3)):  # the second run replays the first two
        callback = TensorBoardCallback(tmp_path, ["model", "quantization.mode"])
        callback.log_trial_start(trial)
        for epoch in epochs:
            callback.log_trial_result(0, trial, row(epoch, epoch / 10))
    callback.log_trial_result(0, trial, row(3, 0.3))  # a retry reports it again
    (tmp_path / trial.config["trial_id"]).mkdir()
    results = {"train": {"test_metrics": {"test_accuracy": 0.7}}}
    write_json(tmp_path / trial.config["trial_id"] / "results.json", results)
    callback.log_trial_end(trial)
    found = events(tmp_path / "tensorboard" / trial.config["trial_id"])
    assert [e.step for e in found.Scalars("accuracy/validation")] == [1, 2, 3]
    assert [e.value for e in found.Scalars("compare/test_accuracy")] == pytest.approx([0.7])
