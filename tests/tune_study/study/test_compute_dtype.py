from tune_study.config import parse_trial
from tune_study.study import manifest
from tune_study.study.compute_dtype import settle_compute_dtype

VALUES = {"model": "m", "dataset": "digits"}


def dtypes(*trials, planned=()):
    settled, reason = settle_compute_dtype(trials, "cpu", planned)
    return [trial.training.compute_dtype for trial in settled], reason


def test_an_unnamed_compute_dtype_follows_the_device(monkeypatch):
    values = {"model": "m", "dataset": "digits"}
    unnamed = parse_trial({**values, "training": {"num_train_epochs": 3}})
    named = parse_trial({**values, "training": {"compute_dtype": "bf16"}})
    monkeypatch.setattr("tune_study.study.compute_dtype.without_bf16", lambda device: "it has none")
    assert dtypes(unnamed, named) == (["fp32", "bf16"], "it has none")
    assert dtypes(named) == (["bf16"], None)
    monkeypatch.setattr("tune_study.study.compute_dtype.without_bf16", lambda device: None)
    assert dtypes(unnamed, named) == (["bf16", "bf16"], None)


def test_a_planned_study_keeps_its_compute_dtype_on_another_machine(monkeypatch):
    unnamed = parse_trial({"model": "m", "dataset": "digits"})
    fp32 = parse_trial({"model": "m", "dataset": "digits", "training": {"compute_dtype": "fp32"}})
    monkeypatch.setattr("tune_study.study.compute_dtype.without_bf16", lambda device: "it has none")
    assert dtypes(unnamed, planned={unnamed.trial_id})[0] == ["bf16"]
    monkeypatch.setattr("tune_study.study.compute_dtype.without_bf16", lambda device: None)
    assert dtypes(unnamed, planned={fp32.trial_id})[0] == ["fp32"]


def test_new_trials_take_the_compute_dtype_of_the_study(monkeypatch, tiny, tmp_path):
    from tune_study.trial.context import RunContext

    fast = parse_trial({**VALUES, "seed": 1, "training": {"compute_dtype": "fp32"}})
    where = RunContext(study_dir=tmp_path / "s")
    manifest.open_study([fast], where, {"data": {}, "weights": {}}, grid="g", command="c")
    assert manifest.settled_compute_dtype(where.study_dir) == "fp32"
    assert manifest.settled_compute_dtype(tmp_path / "nothing") is None
    new = parse_trial({**VALUES, "seed": 2})
    for reason in (None, "it has none"):
        monkeypatch.setattr(
            "tune_study.study.compute_dtype.without_bf16", lambda device, reason=reason: reason
        )
        for compute_dtype in ("fp32", "bf16"):
            settled, said = settle_compute_dtype([new], "cpu", (), compute_dtype)
            assert settled[0].training.compute_dtype == compute_dtype
            assert said == reason
    (settled,), _ = settle_compute_dtype([new], "cpu", {fast.trial_id}, "fp32")
    manifest.open_study([settled], where, {"data": {}, "weights": {}}, grid="g", command="c")
    assert manifest.planned_ids(where.study_dir) == {fast.trial_id, settled.trial_id}
