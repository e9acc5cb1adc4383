"""Trials in MLflow (a real SQLite store) and W&B (offline), and what a failing tracker does."""

import sys
from types import SimpleNamespace

import pytest

from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.loggers import trackers

CREATED = "2026-11-25T00:00:00+00:00"


@pytest.fixture
def config(tiny):
    return tiny("nf4")


def row(epoch):
    return {
        "epoch": epoch,
        "val_accuracy": epoch / 10,
        "grad_norm_cv": float("nan"),
        "training_iteration": epoch,
    }


def results(folder, config, status, epochs):
    rows = [row(epoch) for epoch in range(1, epochs + 1)]
    measured = {"test_metrics": {"test_accuracy": 0.7}} if status == "completed" else {}
    trial = folder / config.trial_id
    trial.mkdir(parents=True, exist_ok=True)
    error = "RuntimeError: it broke" if status == "error" else None
    content = {"status": status, "error": error, "train": {**measured, "epochs": rows}}
    write_json(trial / "results.json", content)


class Session:
    """One start of a study, as Tune's callbacks see it."""

    def __init__(self, folder, config, *connected):
        self.said = []
        self.folder, self.config = folder, config
        self.callback = trackers.Trackers(connected, folder, self.said.append)
        values = {"trial_id": config.trial_id, "trial": config.model_dump(mode="json")}
        self.trial = SimpleNamespace(config=values)

    def run(self, epochs, status=None):
        """``status=None`` is a kill: nobody is told of an end."""
        self.callback.on_trial_start(0, [], self.trial)
        for epoch in epochs:
            self.callback.on_trial_result(0, [], self.trial, row(epoch))
        if status is not None:
            results(self.folder, self.config, status, max(epochs, default=0))
            self.callback.on_trial_complete(0, [], self.trial)
        return self


class Service:
    """A tracker in memory that fails when told to."""

    name, errors = "service", (ConnectionError,)

    def __init__(self):
        self.calls, self.broken = [], False

    def status(self, trial_id):
        ends = [call[2] for call in self.calls if call[0] == "end"]
        return ends[-1] if ends else None

    def start(self, trial_id, params):
        self._add("start", trial_id)
        return max((call[2] for call in self.calls if call[0] == "epoch"), default=0)

    def epoch(self, trial_id, epoch, metrics):
        self._add("epoch", trial_id, epoch)

    def end(self, trial_id, status, metrics, error):
        self._add("end", trial_id, status)

    def close(self):
        self._add("close", "")

    def _add(self, *call):
        if self.broken:
            raise ConnectionError("https://me:secret@host is down\nTraceback")
        self.calls.append(call)

    def epochs(self):
        return [call[2] for call in self.calls if call[0] == "epoch"]


def test_a_tracker_that_fails_is_said_once_and_caught_up_at_the_next_start(tmp_path, config):
    service = Service()
    first = Session(tmp_path, config, service).run([1])
    service.broken = True
    first.run([1, 2], "completed")
    first.callback.close([config])
    assert first.said == [
        "service: https://host is down; the study goes on without it",
        "service: it misses some of this; the same command brings it up to date",
    ]
    assert service.epochs() == [1]
    service.broken = False
    second = Session(tmp_path, config, service)
    second.callback.catch_up([config])
    second.callback.close([config])
    assert service.epochs() == [1, 2]
    assert service.calls[-2:] == [("end", config.trial_id, "completed"), ("close", "")]
    assert second.said == []


def test_an_error_of_ours_is_not_taken_for_a_tracker_s(tmp_path, config):
    class Wrong(Service):
        def epoch(self, trial_id, epoch, metrics):
            raise KeyError("a mistake")

    with pytest.raises(KeyError):
        Session(tmp_path, config, Wrong()).run([1])


def test_what_had_ended_before_is_logged_too(tmp_path, config):
    results(tmp_path, config, "completed", 3)
    service = Service()
    session = Session(tmp_path, config, service)
    session.callback.catch_up([config])
    session.callback.catch_up([config])
    assert [call[0] for call in service.calls] == ["start", "epoch", "epoch", "epoch", "end"]


def test_a_tracker_is_told_numbers_and_parameters_alone(tmp_path, config):
    told = []

    class Asked(Service):
        def start(self, trial_id, params):
            told.append(params)
            return 0

        def epoch(self, trial_id, epoch, metrics):
            told.append(metrics)

        def end(self, trial_id, status, metrics, error):
            told.append((status, metrics, error))

    session = Session(tmp_path, config, Asked())
    session.trial.config["trial"]["trial_id"] = config.trial_id
    session.callback.on_trial_start(0, [], session.trial)
    given = {"epoch": 1, "val_accuracy": 1, "train_loss": "x", "val_loss": None, "other": 3}
    session.callback.on_trial_result(0, [], session.trial, {**given, "best_val_accuracy": True})
    results(tmp_path, config, "error", 1)
    session.callback.on_trial_error(0, [], session.trial)
    params, epoch, (status, final, error) = told
    assert "trial_id" not in params
    assert params["lora.r"] == 4
    assert epoch == {"epoch": 1.0, "val_accuracy": 1.0}
    assert (status, final, error) == ("error", {}, "RuntimeError: it broke")
    results(tmp_path, config, "completed", 1)
    session.run([], "completed")
    assert told[-1] == ("completed", {"final/test_accuracy": 0.7}, "")
    session.callback.on_trial_complete(0, [], session.trial)
    assert len(told) == 5  # it has ended already


def test_what_has_not_ended_is_not_caught_up(tmp_path, config):
    results(tmp_path, config, "interrupted", 3)
    service = Service()
    Session(tmp_path, config, service).callback.catch_up([config])
    assert service.calls == []


def test_an_error_is_one_line_of_300_letters_without_a_password():
    assert trackers.plainly(ValueError("x" * 400)) == "x" * 300
    assert trackers.plainly(ValueError("at http://me:secret@host/a@b")) == "at http://host/a@b"


def test_trackers_are_connected_to_the_study_by_its_creation(tmp_path):
    assert trackers.opened([], tmp_path, print) is None
    write_json(tmp_path / "study.json", {"created": CREATED})
    asked = []
    module = SimpleNamespace(connect=lambda *given: asked.append(given) or Service())
    found = trackers.opened([module], tmp_path, print)
    assert asked == [(tmp_path, CREATED)]
    assert isinstance(found, trackers.Trackers)


def test_unknown_and_missing_trackers_are_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="--log comet: choose one of mlflow, wandb"):
        trackers.modules(["comet"])
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "tune_study.loggers.mlflow", raising=False)
    with pytest.raises(UserError, match=r"mlflow is not installed; pip install 'tune-study\[mlf"):
        trackers.modules(["mlflow"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One SQLite file for all tests: MLflow takes seconds to make its tables."""
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.sqlite3'}"


@pytest.fixture
def mlflow(store, tmp_path, monkeypatch):
    """``mlflow()`` connects anew, as every start of a study does; its client is for looking."""
    from tune_study.loggers.mlflow import connect

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return lambda: connect(tmp_path, CREATED)


def runs_of(connected):
    return connected._client.search_runs([connected._experiment])


def test_one_mlflow_run_per_trial_with_each_epoch_once_after_kills(mlflow, tmp_path, config):
    Session(tmp_path, config, mlflow()).run([1])
    (run,) = runs_of(mlflow())
    assert (run.info.status, run.info.run_name) == ("RUNNING", config.trial_id)
    Session(tmp_path, config, mlflow()).run([1, 2], "interrupted")
    (run,) = runs_of(mlflow())
    assert run.info.status == "KILLED"
    Session(tmp_path, config, mlflow()).run([1, 2, 3], "completed")
    connected = mlflow()
    (run,) = runs_of(connected)
    assert run.info.status == "FINISHED"
    assert run.data.params["quantization.mode"] == "nf4"
    assert run.data.metrics["final/test_accuracy"] == pytest.approx(0.7)
    assert "grad_norm_cv" not in run.data.metrics  # unknown is not 0
    assert "training_iteration" not in run.data.metrics
    history = connected._client.get_metric_history(run.info.run_id, "val_accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert connected.status(config.trial_id) == "completed"


def test_a_failed_trial_is_failed_in_mlflow_until_it_is_run_again(mlflow, tmp_path, config):
    Session(tmp_path, config, mlflow()).run([1], "error")
    (run,) = runs_of(mlflow())
    assert run.info.status == "FAILED"
    assert run.data.tags["tune_study.error"] == "RuntimeError: it broke"
    Session(tmp_path, config, mlflow()).run([1, 2], "completed")
    (run,) = runs_of(mlflow())
    assert (run.info.status, run.data.tags["tune_study.error"]) == ("FINISHED", "")


def test_two_studies_of_one_name_share_no_run(mlflow, tmp_path, config):
    from tune_study.loggers.mlflow import connect

    Session(tmp_path, config, mlflow()).run([1], "completed")
    other = connect(tmp_path, "another time")
    assert other.status(config.trial_id) is None
    Session(tmp_path, config, other).run([1], "completed")
    assert len(runs_of(other)) == 2


def test_an_mlflow_that_cannot_be_used_is_one_sentence(mlflow, monkeypatch, tmp_path):
    broken = tmp_path / "no.sqlite3"
    broken.write_text("this is no database, and long enough to be told from one" * 20)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{broken}")
    with pytest.raises(UserError, match="--log mlflow: MLFLOW_TRACKING_URI can't be used"):
        mlflow()


def test_wandb_without_a_key_is_one_sentence_and_asks_for_nothing(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from tune_study.loggers import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="--log wandb: there is no key; set WANDB_API_KEY"):
        wandb.connect(tmp_path, CREATED)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="WANDB_MODE=disabled"):
        wandb.connect(tmp_path, CREATED)


@pytest.mark.slow
def test_one_offline_wandb_run_per_trial_and_no_key_in_its_files(tmp_path, config, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from tune_study.loggers import wandb

    key = "canary0" * 6
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    for epochs, status in (([1], "interrupted"), ([1, 2], "completed")):
        connected = wandb.connect(tmp_path, CREATED)
        session = Session(tmp_path, config, connected).run(epochs, status)
        session.callback.close([config])
        assert session.said == []
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert connected.status(config.trial_id) == "completed"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if key.encode() in path.read_bytes()]
