"""Every derived column of results.json, recomputed by hand from numbers that no symmetry hides."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tune_study.data.sources import Split
from tune_study.data.splits import Dataset
from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.trial import record as records
from tune_study.trial.micro_batch import note_out_of_memory
from tune_study.trial.record import Record, fidelity_columns, log_tail, write_failure


@pytest.fixture
def record(tiny, tmp_path):
    config = tiny("nf4")
    folder = tmp_path / config.trial_id
    folder.mkdir()
    return Record(config, folder, "a device", 3)


def row(epoch, accuracy=0.5, **values):
    """An epoch whose columns are all different."""
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "images_per_s": 10.0,
        "train_time_s": 2.0,
        "epoch_time_s": 3.0,
        "grad_explosions": 1,
        "loss_spikes": 2,
        "grad_vanishing_layers": 3,
        "grad_norm_mean": 1.0,
        "grad_norm_std": 2.0,
        "grad_norm_cv": 3.0,
        "stability_score": 4.0,
        "gradient_cosine_successive": 5.0,
        **values,
    }


def training(history, best_epoch=1, best_accuracy=0.5):
    def split(count):
        return Split(torch.zeros(count, 3, 1, 1), torch.zeros(count))

    return SimpleNamespace(
        history=history,
        best_epoch=best_epoch,
        best_accuracy=best_accuracy,
        step="eager",
        graph=None,
        evaluation=None,
        layer_gradients=[[7.0, 8.0]],
        parameters={"a": torch.zeros(2, 3), "b": torch.zeros(5)},
        data=Dataset(split(7), split(4), split(5), ["x", "y", "z"], "a digest"),
    )


BUILT = SimpleNamespace(
    base_parameters=100,
    learning_of_base=2,
    layers=[],
    quantized_blocks=6,
    weights_bytes=30,
    bytes_fp32=120,
    bytes_16bit=75,
    quantization_error=0.25,
    initial_error=0.125,
)


def test_fidelity_columns_are_those_of_their_moment_and_nan_where_unknown():
    found = fidelity_columns(
        {
            "outputs": {"feature_cosine": 0.1},
            "start": {"cosine": 0.2, "norm_ratio": 0.3},
            "end": {"cosine": 0.4, "norm_ratio": 0.5},
        }
    )
    assert found == {
        "feature_cosine": 0.1,
        "gradient_cosine_start": 0.2,
        "gradient_norm_ratio_start": 0.3,
        "gradient_cosine": 0.4,
        "gradient_norm_ratio": 0.5,
    }
    unknown = fidelity_columns({})
    assert len(unknown) == 4
    assert all(math.isnan(value) for value in unknown.values())


def test_the_columns_of_the_model_are_counted(record):
    record.built(BUILT, training([]))
    assert record.model_metrics == {
        "total_parameters": 109,
        "trainable_parameters": 11,
        "quantized_layers": 0,
        "quantized_blocks": 6,
        "weights_bytes": 30,
        "weights_bytes_fp32": 120,
        "weights_bytes_16bit": 75,
        "weights_saving_fp32": 0.75,
        "weights_saving_16bit": 0.6,
        "quantization_error": 0.25,
        "initial_error": 0.125,
        "num_classes": 3,
        "train_images": 7,
        "val_images": 4,
        "test_images": 5,
        "data_sha256": "a digest",
    }


def test_means_sums_and_maxima_over_uneven_epochs():
    history = [
        row(1, grad_vanishing_layers=4, grad_explosions=5, grad_norm_std=math.nan),
        row(2, grad_norm_mean=2.0, grad_norm_cv=math.inf, gradient_cosine_successive=math.nan),
        row(3, grad_norm_mean=9.0, stability_score=0.5, gradient_cosine_successive=math.nan),
    ]
    for one, noise, square in zip(history, (1.0, 2.0, 9.0), (0.25, 0.25, 1.0), strict=True):
        one |= {"gradient_noise_trace": noise, "gradient_square": square}
    assert records._over_epochs(history) == {
        "grad_explosions": 7,
        "loss_spikes": 6,
        "grad_vanishing_layers": 4,
        "grad_norm_mean": 4.0,
        "grad_norm_std": 2.0,
        "grad_norm_cv": 3.0,
        "stability_score": pytest.approx(8.5 / 3),
        "gradient_cosine_successive": 5.0,
        "gradient_noise_scale": 8.0,
    }
    history[2]["gradient_square"] = -0.5  # an estimate without bias may be that; here 0 on average
    assert math.isnan(records._over_epochs(history)["gradient_noise_scale"])
    assert math.isnan(records._over_epochs([row(1)])["gradient_noise_scale"])


def test_the_columns_of_training(record):
    history = [row(n, images_per_s=s) for n, s in ((1, 1.0), (2, 3.0), (3, 11.0))]
    record.training, record.test_time_s = training(history, 2, 0.75), 0.5
    found = record._training_results(history)
    expected = {
        "epochs_completed": 3,
        "best_epoch": 2,
        "val_accuracy": 0.75,
        "train_time_s": 6.0,
        "eval_time_s": 3.5,
        "images_per_s": 3.0,
    }
    assert {name: found[name] for name in expected} == expected
    record.training = training(history, 0, math.nan)
    assert record._training_results(history)["best_epoch"] is None
    assert record._training_results([]) == {"epochs_completed": 0}


METER = SimpleNamespace(source="a counter", why_not=None)


@pytest.mark.parametrize(
    ("joules", "meter", "total", "source"),
    [
        ([3.0, 4.5], METER, 7.5, "a counter"),
        ([0.0, 4.5], METER, 4.5, "a counter"),
        ([], METER, None, "a counter"),
        ([math.nan, 4.5], METER, None, "1 of 2 epochs were trained without a reading"),
        ([None, None], METER, None, "2 of 2 epochs were trained without a reading"),
        ([0.0, 0.0], METER, None, "the counter did not move (a counter)"),
        ([3.0, math.nan], SimpleNamespace(source="a counter", why_not="gone"), None, "gone"),
        ([3.0, 4.5], SimpleNamespace(source="a counter", why_not="gone"), 7.5, "a counter"),
        ([3.0], SimpleNamespace(source="", why_not="none"), 3.0,
         "a counter that an earlier run of the trial had"),
        ([], None, None, None),
    ],
)  # fmt: skip
def test_energy_is_known_where_every_epoch_was_read(record, joules, meter, total, source):
    history = [row(n) if j is None else row(n, train_energy_j=j) for n, j in enumerate(joules, 1)]
    record.training, record.meter = training(history), meter
    found = record._training_results(history).get("train_energy_j", math.nan)
    assert found == total if total is not None else math.isnan(found)
    assert record._resources()["energy_source"] == source


def test_tune_gets_the_best_accuracy_until_the_epoch(record):
    history = [row(1, 0.2), row(2, 0.6), row(3, 0.4)]
    record.built(BUILT, training(history))
    record.memory = {"peak_train_bytes": 9, "activation_bytes": None}
    record.fidelity = {"start": {"cosine": 0.3}}
    rows = [record.report_row(one) for one in history]
    assert [one["best_val_accuracy"] for one in rows] == [0.2, 0.6, 0.6]
    last = rows[-1]
    assert (last["val_accuracy"], last["weights_bytes"], last["peak_train_bytes"]) == (0.4, 30, 9)
    assert last["gradient_cosine_start"] == 0.3
    assert math.isnan(last["activation_bytes"])
    assert math.isnan(last["feature_cosine"])
    record.training = None
    assert math.isnan(record.report_row(row(1))["best_val_accuracy"])


def test_time_is_measured_where_it_belongs_and_adds_up(record, monkeypatch):
    clock = iter([10.0, 12.0, 100.0, 105.0])
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        with record.measuring():
            pass
    record.write("interrupted")
    assert record.content["train"]["measuring_time_s"] == 7.0


def test_results_say_what_is_known(record):
    history = [row(1, 0.2), row(2, 0.6)]
    record.built(BUILT, training(history, 2, 0.6))
    record.effective = record.config.with_micro_batch(5)
    record.memory, record.settings = {"peak_train_bytes": 9}, {"deterministic": True}
    record.test_metrics, record.trials_on_device = {"test_loss": 1.5}, 4
    record.fidelity = {"end": {"cosine": 0.4}}
    note_out_of_memory(record.folder, 20, "planted")
    record.warn("a sentence")
    record.write("completed")
    found = json.loads((record.folder / "results.json").read_text())
    assert found["trial_id"] == record.config.trial_id
    assert (found["status"], found["error"], found["simulated"]) == ("completed", None, False)
    assert found["warnings"] == ["a sentence"]
    run, train = found["run"], found["train"]
    assert run["config"] == record.config.model_dump(mode="json")
    assert (run["device"], run["num_threads"]) == ("a device", 3)
    assert run["device_settings"] == {"deterministic": True}
    assert run["started_at"] <= run["written_at"]
    assert [epoch["epoch"] for epoch in train["epochs"]] == [1, 2]
    assert train["training_results"]["epochs_completed"] == 2
    assert train["test_metrics"] == {"test_loss": 1.5}
    assert train["model_metrics"]["gradient_cosine"] == 0.4
    taken = train["resource_metrics"]
    assert taken.pop("rss_peak_bytes") > 2**20
    assert taken == {
        "peak_train_bytes": 9,
        "energy_source": None,
        "batch_halvings": 1,
        "batch_size": 5,
        "gradient_accumulation_steps": 4,
        "device": "a device",
        "trials_on_device": 4,
        "step": "eager",
    }
    gradients = json.loads((record.folder / "gradients.json").read_text())
    assert gradients == {"layers": ["a", "b"], "epochs": [[7.0, 8.0]]}
    analysis = json.loads((record.folder / "quantization_analysis.json").read_text())
    assert (analysis["mode"], analysis["fidelity"]) == ("nf4", {"end": {"cosine": 0.4}})
    assert not (record.folder / "error.json").exists()
    assert "warning: a sentence" in (record.folder / "trial.log").read_text()


def test_a_failure_is_told_with_its_epoch_and_its_trace(record):
    record.training = training([row(1), row(2)])
    try:
        raise ValueError("planted\nsecond line")
    except ValueError as error:
        record.write("error", error)
    found = json.loads((record.folder / "error.json").read_text())
    assert (found["type"], found["message"]) == ("ValueError", "planted\nsecond line")
    assert (found["last_epoch"], found["trial_id"]) == (2, record.config.trial_id)
    assert "test_a_failure_is_told" in found["traceback"]
    assert "error: ValueError: planted" in "\n".join(found["log_tail"])
    assert record.content["error"] == "ValueError: planted"
    record.write("diverged")
    assert record.content["error"] == "the loss was not finite in epoch 2"
    write_failure(record.folder, record.config, "Killed", "by the system", 7)
    found = json.loads((record.folder / "error.json").read_text())
    assert (found["type"], found["last_epoch"], found["traceback"]) == ("Killed", 7, None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("x"), "ValueError: x"),
        (ValueError(), "ValueError"),
        (UserError("--flag: wrong"), "--flag: wrong"),
        (OSError("x" * 600), "OSError: " + "x" * 500),
    ],
)
def test_an_error_in_one_line(error, sentence):
    assert records._sentence(error) == sentence


def test_warnings_of_an_earlier_run_stay(record):
    write_json(record.folder / "results.json", {"warnings": ["before"]})
    again = Record(record.config, record.folder, "cpu", 1)
    again.warn("now")
    assert again.warnings == ["before", "now"]
    write_json(record.folder / "results.json", {"warnings": "no list"})
    assert Record(record.config, record.folder, "cpu", 1).warnings == []


def test_the_tail_of_a_log_is_its_last_fifty_lines_whatever_bytes_they_hold(tmp_path):
    assert log_tail(tmp_path) == []
    lines = [f"line {n}" for n in range(60)]
    (tmp_path / "trial.log").write_bytes("\n".join(lines).encode() + b"\nnot \xff UTF-8")
    found = log_tail(tmp_path)
    assert found[:-1] == lines[-49:]
    assert found[-1].startswith("not ")


def test_a_graph_that_failed_is_told_once(record):
    told = training([])
    record.warn_of_graph(told)
    told.graph = SimpleNamespace(failure=None)
    record.warn_of_graph(told)
    assert record.warnings == []
    told.graph.failure = "planted"
    for _ in range(2):
        record.warn_of_graph(told)
    (warning,) = record.warnings
    assert "step could not be captured as a CUDA graph (planted): steps are eager" in warning
    told.evaluation = SimpleNamespace(failure="too")
    for _ in range(2):
        record.warn_of_graph(told)
    assert record.warnings[0] == warning
    assert record.warnings[1:] == [
        "the evaluation could not be captured as a CUDA graph (too): it is eager"
    ]


def test_auto_tells_on_cuda_why_it_is_eager(record):
    record.built(BUILT, training([]))
    assert record.notes == []
    there = Record(record.config, record.folder, "cuda", 1)
    there.built(BUILT, training([]))
    assert ["has not passed its gate" in note for note in there.notes] == [True]
