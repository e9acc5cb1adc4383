"""A study from the command line that is killed and continued, in MLflow and TensorBoard."""

import pandas as pd
import pytest

from tests.tune_study.loggers import board

from . import harness


@pytest.mark.slow
@pytest.mark.ci
def test_killed_and_continued_every_epoch_stands_once_in_mlflow_and_tensorboard(
    tmp_path, monkeypatch
):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setitem(harness.ENVIRONMENT, "PYTHONUNBUFFERED", "1")
    monkeypatch.delitem(harness.ENVIRONMENT, "MLFLOW_TRACKING_URI", raising=False)
    options = ("--simulate", "--log", "mlflow", "--set", "training.num_train_epochs=40")
    process = harness.start(tmp_path, *options)
    harness.wait_for(process, tmp_path, "epoch 5/40")
    harness.kill(process, "everything")
    for _ in range(2):  # the second has nothing to do, and writes the report again
        code, output = harness.finish(harness.start(tmp_path, *options), tmp_path)
        assert code == 0, output
    check(tmp_path / "smoke-simulated")


def check(folder):
    """Raises ``AssertionError`` unless every epoch of the four trials stands once everywhere."""
    from mlflow import MlflowClient

    trials = list(pd.read_parquet(folder / "trials.parquet")["trial_id"])
    assert len(trials) == 4

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.sqlite3'}")
    experiment = client.get_experiment_by_name("smoke-simulated").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == sorted(trials)
    assert len(client.search_runs([experiment])) == 4
    for run in runs.values():
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [metric.step for metric in history] == list(range(1, 41))

    harness.no_epoch_twice(folder)
    _, rows = board.hparams(folder / "tensorboard")
    assert sorted(rows) == sorted(trials)
    modes = [f"modes/{mode}" for mode in ("none", "int8", "nf4", "nf4-dq")]
    ((_, charts),) = board.charts(folder / "tensorboard", modes).items()
    for mode in modes:
        assert [step for step, _ in charts["validation accuracy"][mode]] == list(range(1, 41))
    images = board.images(folder / "tensorboard" / "report")
    figures = {f"report/{path.stem}" for path in (folder / "report/figures").glob("*.png")}
    assert set(images) == figures
    assert all(len(found) == 1 for found in images.values())
