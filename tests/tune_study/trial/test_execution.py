import errno
import hashlib
import json
import math
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch

from benchmarks.repeats import TIMES
from search_spaces.own_code import Code
from tune_study.errors import UserError
from tune_study.folder import schema
from tune_study.folder.remote import RemoteError
from tune_study.folder.results import PLANNED
from tune_study.machine import energy, resources
from tune_study.machine.disk import DiskFull
from tune_study.memory.step import StepMemory
from tune_study.trial import checkpoint, execution, train
from tune_study.trial.context import RunContext
from tune_study.trial.execution import execute
from tune_study.trial.record import Record


def run(config, study_dir, **context):
    """(results.json, the reported rows)."""
    rows = []
    where = RunContext(study_dir=study_dir, **context)
    return execute(config, where, rows.append), rows


def kill_after(epochs, rows):
    """A report that ends the worker, as a kill would, once so many epochs are reported."""

    def report(row):
        rows.append(row)
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    return report


def without_times(results):
    """The numbers of results.json that must repeat to the bit, a NaN as its name."""

    def kept(value):
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if key not in TIMES}
        return [kept(inner) for inner in value] if isinstance(value, list) else repr(value)

    return kept(results["train"])


def killed(config, study_dir, epochs):
    with pytest.raises(KeyboardInterrupt):
        execute(config, RunContext(study_dir=study_dir), kill_after(epochs, []))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settled):
    study_dir = tmp_path_factory.mktemp("study")
    config = settled(
        {
            "model": "vit_glyphs_patch4_32",
            "dataset": "digits",
            "quantization": "nf4",
            "data": {"train_size": 40, "val_size": 20, "test_size": 20},
            "training": {"num_train_epochs": 3, "warmup_steps": 1, "learning_rate": 1e-3},
        }
    )
    return config, study_dir, *run(config, study_dir)


def test_results_fill_the_columns_of_the_trials_table(finished):
    config, study_dir, results, _ = finished
    assert results["status"] == "completed"
    assert results["simulated"] is False
    parts = ("training_results", "test_metrics", "model_metrics", "resource_metrics")
    values = {k: v for part in parts for k, v in results["train"][part].items()}
    elsewhere = {*PLANNED, "configuration", "status", "simulated", "error"}
    expected = {column.name for column in schema.TRIALS} - elsewhere
    assert expected <= set(values)
    assert not [name for name in expected if values[name] is None]
    assert values["quantized_layers"] == 24
    assert values["weights_bytes"] < values["weights_bytes_16bit"] < values["weights_bytes_fp32"]
    written = json.loads((study_dir / config.trial_id / "results.json").read_text())
    assert written["train"]["test_metrics"] == results["train"]["test_metrics"]


def test_every_epoch_is_a_row_with_the_same_keys(finished):
    _, _, results, rows = finished
    epochs = results["train"]["epochs"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    columns = {column.name for column in schema.EPOCHS} - {"trial_id"}
    assert all(columns <= set(row) for row in epochs)
    assert len({tuple(sorted(row)) for row in rows}) == 1


def test_the_log_tells_of_the_start_of_each_epoch_and_of_the_end(finished):
    config, study_dir, results, _ = finished
    lines = (study_dir / config.trial_id / "trial.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "starts on cpu",
        *(
            f"epoch {row['epoch']}: validation accuracy {row['val_accuracy']:.4f}"
            for row in results["train"]["epochs"]
        ),
        "completed",
    ]


def test_the_quantization_of_every_layer_is_written(finished):
    config, study_dir, *_ = finished
    analysis = json.loads((study_dir / config.trial_id / "quantization_analysis.json").read_text())
    assert len(analysis["layers"]) == 24
    assert {layer["layer_class"] for layer in analysis["layers"]} == {"Linear4bit"}
    assert all(0.05 < layer["relative_error"] < 0.2 for layer in analysis["layers"])
    assert all(10 < layer["sqnr_db"] < 30 for layer in analysis["layers"])
    gradients = json.loads((study_dir / config.trial_id / "gradients.json").read_text())
    assert len(gradients["layers"]) == len(gradients["epochs"][0]) == 50
    assert len(gradients["epochs"]) == 3


def test_how_a_trial_computes_and_how_its_layers_begin_is_written(finished, tiny, tmp_path):
    small = {"data": {"train_size": 16}, "training": {"num_train_epochs": 2}}
    config = tiny("nf4", lora={"use_dora": True, "init_lora_weights": "loftq"}, **small)
    killed(config, tmp_path, 1)
    results, _ = run(config, tmp_path)
    (note,) = results["run"]["notes"]
    assert note.startswith("lora.use_dora = true: the adapted layers compute by PEFT's own pass")
    assert finished[2]["run"]["notes"] == []
    metrics = results["train"]["model_metrics"]
    assert 0 < metrics["initial_error"] < metrics["quantization_error"]
    analysis = json.loads((tmp_path / config.trial_id / "quantization_analysis.json").read_text())
    assert analysis["initial_error"] == metrics["initial_error"]
    for layer in analysis["layers"]:
        assert layer["initial_error"] < layer["error_without_adapter"]
    config, study_dir, *_ = finished
    analysis = json.loads((study_dir / config.trial_id / "quantization_analysis.json").read_text())
    for layer in analysis["layers"]:
        assert layer["initial_error"] == layer["error_without_adapter"] == layer["relative_error"]


def test_a_bias_of_the_base_that_learns_is_counted_once(tiny, tmp_path):
    built = {}
    for bias in ("none", "all"):
        config = tiny("none", lora={"bias": bias}, data={"train_size": 16})
        built[bias] = run(config, tmp_path)[0]["train"]["model_metrics"]
    assert built["all"]["total_parameters"] == built["none"]["total_parameters"]
    learning = [built[bias]["trainable_parameters"] for bias in ("none", "all")]
    blocks = 6 * (384 + 128 + 512 + 128 + 2 * 128)  # four layers and two norms
    assert learning[1] - learning[0] == blocks + 2 * 128  # patches, last norm


def test_the_saved_adapter_is_the_best_epochs_and_peft_loads_it(finished):
    from peft import PeftModel

    from tune_study.model.weights import load_base

    config, study_dir, *_ = finished
    base = load_base(config, 10)
    model = PeftModel.from_pretrained(base, study_dir / config.trial_id / "adapter")
    assert float(model.base_model.model.blocks[0].attn.qkv.lora_B.default.weight.norm()) > 0


def test_the_saved_adapter_names_its_base_and_has_a_card_of_ours(finished):
    config, study_dir, results, _ = finished
    adapter = study_dir / config.trial_id / "adapter"
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.model  # shipped, on no hub
    card = (adapter / "README.md").read_text()
    assert "More Information Needed" not in card
    assert f"| test accuracy | {results['train']['test_metrics']['test_accuracy']:.4f} " in card
    assert f"| trial | {config.trial_id} |" in card
    assert f"torch {results['meta']['versions']['torch']}" in card
    assert (
        f"{results['train']['model_metrics']['weights_bytes']:,} bytes in nf4 (24 layers)" in card
    )


def test_an_interrupted_trial_continues_and_ends_equal(finished, tmp_path):
    config, _, whole, _ = finished
    times = ("epoch_time_s", "train_time_s", "train_energy_j", "images_per_s", *resources.COLUMNS)

    def comparable(results):
        epochs = results["train"]["epochs"]
        return [{k: repr(v) for k, v in row.items() if k not in times} for row in epochs]

    killed(config, tmp_path, 2)
    left = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert left["status"] == "interrupted"
    assert left["train"]["training_results"]["epochs_completed"] == 2

    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    results, again = run(config, moved)
    assert [row["epoch"] for row in again] == [1, 2, 3]  # replayed, then trained
    log = (moved / config.trial_id / "trial.log").read_text()
    assert "continues after epoch 2, from epoch-00002\n" in log  # it was saved, then reported
    assert comparable(results) == comparable(whole)
    assert results["train"]["test_metrics"] == whole["train"]["test_metrics"]


def test_energy_is_that_of_the_epochs_that_count(tiny, tmp_path, monkeypatch):
    joules, burned = [5000.0], iter([7.0, 100.0, 8.0, 9.0])
    counter = energy.Counter(lambda: joules[0])
    monkeypatch.setattr(energy, "_counters", lambda device: ("planted", [counter]))
    train_epoch, evaluate = train._train_epoch, train.evaluate

    def trains(training):
        joules[0] += (burns := next(burned))
        if burns == 100:
            raise KeyboardInterrupt
        return train_epoch(training)

    def evaluates(training, split):
        joules[0] += 1000
        return evaluate(training, split)

    monkeypatch.setattr(train, "_train_epoch", trains)
    monkeypatch.setattr(train, "evaluate", evaluates)
    watched = []

    def monitor(device, also):
        watched.append(also)
        return resources.ResourceMonitor(device)

    monkeypatch.setattr(execution, "ResourceMonitor", monitor)
    config = tiny("none", data={"train_size": 16}, training={"num_train_epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    joules[0] = 0.0  # another machine, or its driver was loaded anew
    parts = run(config, tmp_path)[0]["train"]
    assert [row["train_energy_j"] for row in parts["epochs"]] == [7.0, 8.0, 9.0]
    assert parts["training_results"]["train_energy_j"] == 24.0
    assert parts["resource_metrics"]["energy_source"] == "planted"
    assert watched[-1]() == joules[0]  # once a second: a counter that begins anew misses nothing


def test_trials_that_share_a_device_have_no_energy_of_their_own(tiny, tmp_path, monkeypatch):
    counter = energy.Counter(lambda: 1.0)
    monkeypatch.setattr(energy, "_counters", lambda device: ("planted", [counter]))
    config = tiny("none", data={"train_size": 16}, training={"num_train_epochs": 1})
    parts = run(config, tmp_path, trials_on_device=2)[0]["train"]
    assert math.isnan(parts["training_results"]["train_energy_j"])
    assert parts["resource_metrics"]["energy_source"] == energy.SHARED


@pytest.mark.parametrize(
    ("before", "then", "told"), [(8, 1, 8), (1, 8, 8), (None, 1, None)], ids=str
)
def test_the_most_trials_on_the_device_of_all_runs_are_told(
    tiny, tmp_path, monkeypatch, before, then, told
):
    config = tiny("none", data={"train_size": 20})
    where = RunContext(study_dir=tmp_path, trials_on_device=before or 1)
    with pytest.raises(KeyboardInterrupt):
        execute(config, where, kill_after(1, []))
    taken = json.loads((tmp_path / config.trial_id / "results.json").read_text())["train"]
    assert taken["resource_metrics"]["trials_on_device"] == (before or 1)
    if before is None:  # the checkpoint of an earlier version
        load = checkpoint.load

        def earlier(path):
            state, extra = load(path)
            del extra["trials_on_device"]
            return state, extra

        monkeypatch.setattr(checkpoint, "load", earlier)
    results, _ = run(config, tmp_path, trials_on_device=then)
    assert results["train"]["resource_metrics"]["trials_on_device"] == told


def test_a_broken_checkpoint_falls_back_to_the_one_before(finished, tmp_path):
    config, _, whole, _ = finished
    killed(config, tmp_path, 2)
    newest = checkpoint.candidates(tmp_path / config.trial_id)[0]
    assert newest.name == "epoch-00002"
    (newest / "adapter.safetensors").write_bytes(b"half")
    results, again = run(config, tmp_path)
    assert results["train"]["test_metrics"] == whole["train"]["test_metrics"]
    assert results["warnings"] == [
        "checkpoint epoch-00002 is not whole: continues from the one before"
    ]
    assert [row["epoch"] for row in again] == [1, 2, 3]


def test_an_exception_is_written_and_raised(tiny, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("planted\nsecond line")

    monkeypatch.setattr(train, "measure_memory", fail)
    config = tiny("int8")
    with pytest.raises(ValueError, match="planted"):
        run(config, tmp_path)
    results = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert results["status"] == "error"
    assert results["error"] == "ValueError: planted"
    error = json.loads((tmp_path / config.trial_id / "error.json").read_text())
    assert error["type"] == "ValueError"
    assert "in fail" in error["traceback"]
    assert error["config"]["quantization"]["mode"] == "int8"


def test_own_code_that_fails_on_a_worker_is_one_sentence(tiny, tmp_path):
    code = Code("my_model.py", "grid", "import not_on_this_node", "sha", ("leaf_vit",))
    with pytest.raises(UserError):
        run(tiny("int8"), tmp_path, code=code)
    results = json.loads((tmp_path / tiny("int8").trial_id / "results.json").read_text())
    assert results["status"] == "error"
    assert results["error"].startswith("my_model.py runs for the command and not where trials run")
    assert "'not_on_this_node'" in results["error"]


def test_a_transform_of_ones_own_runs_where_the_trial_does_and_survives_a_kill(tiny, tmp_path):
    text = (
        "import torch\n"
        "def mine(images, generator):\n"
        "    return images + 90 * torch.rand(images.shape, generator=generator)\n"
    )
    code = Code("mine.py", "grid", text, hashlib.sha256(text.encode()).hexdigest())
    config = tiny("nf4", data={"augment": "code:mine"}, training={"num_train_epochs": 3})
    whole, _ = run(config, tmp_path / "whole", code=code)
    assert whole["status"] == "completed"
    with pytest.raises(KeyboardInterrupt):
        execute(
            config,
            RunContext(study_dir=tmp_path / "killed", code=code),
            kill_after(2, []),
        )
    again, _ = run(config, tmp_path / "killed", code=code)
    assert without_times(again) == without_times(whole)


def test_quantization_that_does_not_happen_is_an_error_and_no_result(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tune_study.model.build.quantize_model", lambda *_: [])
    config = tiny("nf4")
    with pytest.raises(Exception, match="quantized no layer"):
        run(config, tmp_path)
    results = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert results["status"] == "error"
    assert results["train"]["test_metrics"] == {}


def test_fidelity_is_known_at_start_and_end_and_survives_a_restart(finished, tmp_path):
    config, study_dir, whole, _ = finished
    metrics = whole["train"]["model_metrics"]
    for name in ("gradient_cosine", "gradient_cosine_start", "feature_cosine"):
        assert 0.5 < metrics[name] < 1
    assert metrics["gradient_cosine"] != metrics["gradient_cosine_start"]
    folder = study_dir / config.trial_id
    fidelity = json.loads((folder / "quantization_analysis.json").read_text())["fidelity"]
    assert len(fidelity["end"]["layers"]) == 50
    assert fidelity["start"]["cosine"] == metrics["gradient_cosine_start"]
    copied = tmp_path / "copy"
    shutil.copytree(study_dir, copied)
    again, _ = run(config, copied)
    names = [n for n in metrics if "gradient" in n or "feature" in n or "pretrained" in n]
    assert [again["train"]["model_metrics"][n] for n in names] == [metrics[n] for n in names]


def test_a_diverged_trial_keeps_its_curve(tiny, tmp_path, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda t, split: (float("nan"), 0.1) if t.history else evaluate(t, split)
    )
    results, _ = run(tiny("none", training={"num_train_epochs": 5}), tmp_path)
    assert results["status"] == "diverged"
    assert len(results["train"]["epochs"]) == 2
    assert "epoch 2" in results["error"]
    assert results["train"]["training_results"]["best_epoch"] == 1
    assert len(checkpoint.candidates(tmp_path / results["trial_id"])) == 2  # to look at


def out_of_memory_above(largest, monkeypatch):
    """The device refuses micro-batches of more than ``largest`` images."""
    forward = train._forward

    def refuse(training, images, labels):
        if training.model.training and len(images) > largest:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(images)} images")
        return forward(training, images, labels)

    monkeypatch.setattr(train, "_forward", refuse)


@pytest.mark.slow
@pytest.mark.ci
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(tiny, tmp_path, monkeypatch):
    config = tiny("nf4")  # micro-batches of 20
    out_of_memory_above(5, monkeypatch)
    results, rows = run(config, tmp_path)
    assert results["status"] == "completed"
    taken = results["train"]["resource_metrics"]
    assert (taken["batch_size"], taken["gradient_accumulation_steps"]) == (5, 4)
    assert taken["batch_halvings"] == 2
    assert [row["epoch"] for row in rows] == [1, 2]
    assert results["warnings"][1] == (
        "out of memory with micro-batches of 10 images: goes on from the last epoch with 5, 4 a "
        "step"
    )
    # Without dropout, accumulation is the same arithmetic but for rounding.
    plain = tiny(
        "nf4", training={"gradient_accumulation_steps": 4, "per_device_train_batch_size": 5}
    )
    monkeypatch.undo()
    same, _ = run(plain, tmp_path / "plain")
    assert same["train"]["epochs"][0]["train_loss"] == results["train"]["epochs"][0]["train_loss"]


def test_out_of_memory_in_a_later_epoch_goes_on_from_the_last_one(tiny, tmp_path, monkeypatch):
    config = tiny("none", training={"num_train_epochs": 3})
    step, failed = train.train_step, []

    def fail_once(training, images, labels):
        if len(training.history) == 2 and not failed:
            failed.append(len(training.history))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return step(training, images, labels)

    monkeypatch.setattr(train, "train_step", fail_once)
    results, rows = run(config, tmp_path)
    assert failed == [2]
    assert [row["epoch"] for row in rows] == [1, 2, 3]  # no epoch twice
    assert results["train"]["resource_metrics"]["batch_size"] == 10
    log = (tmp_path / config.trial_id / "trial.log").read_text()
    assert "continues after epoch 2, from epoch-00002" in log


def test_out_of_memory_with_one_image_is_oom(tiny, tmp_path, monkeypatch):
    config = tiny("none")
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        run(config, tmp_path)
    results = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert results["status"] == "oom"
    assert results["train"]["resource_metrics"]["batch_size"] == 1
    error = json.loads((tmp_path / config.trial_id / "error.json").read_text())
    assert error["type"] == "OutOfMemoryError"
    assert any("micro-batches of 20" in line for line in error["log_tail"])


def test_a_full_disk_ends_the_worker_and_not_the_trial(tiny, tmp_path, monkeypatch):
    config = tiny("none")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(DiskFull, match="free some space and repeat the command"):
        run(config, tmp_path)
    folder = tmp_path / config.trial_id
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    assert not (folder / "error.json").exists()
    monkeypatch.undo()
    assert run(config, tmp_path)[0]["status"] == "completed"


def test_a_trial_does_not_start_on_a_disk_without_room(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**20))
    with pytest.raises(DiskFull, match="has 10 MB free and the next trial needs"):
        run(tiny("none"), tmp_path)


@pytest.mark.parametrize(
    ("keep", "checkpoints", "adapter"), [("all", 2, True), ("best", 0, True), ("none", 0, False)]
)
def test_checkpoints_of_a_finished_trial(tiny, tmp_path, keep, checkpoints, adapter):
    config = tiny("none")
    run(config, tmp_path, keep_checkpoints=keep)
    folder = tmp_path / config.trial_id
    assert len(checkpoint.candidates(folder)) == checkpoints
    assert (folder / "adapter" / "adapter_model.safetensors").exists() is adapter


@pytest.mark.slow
@pytest.mark.ci
def test_a_trial_that_goes_on_with_less_memory_is_measured_anew(tiny, tmp_path, monkeypatch):
    config = tiny("nf4", training={"num_train_epochs": 3})
    step = train.train_step

    def fail_once(training, images, labels):
        micro = training.config.training.per_device_train_batch_size
        if len(training.history) == 2 and micro == 20:
            raise torch.OutOfMemoryError("planted")
        return step(training, images, labels)

    monkeypatch.setattr(train, "train_step", fail_once)
    ours = run(config, tmp_path / "less")[0]["train"]["resource_metrics"]
    half = {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 2}
    fresh = tiny("nf4", training={"num_train_epochs": 1, **half})
    theirs = run(fresh, tmp_path / "fresh")[0]["train"]["resource_metrics"]
    bytes_of = [name for name in theirs if name.endswith("_bytes") and "rss" not in name]
    assert {"peak_train_bytes", "activation_bytes", "predicted_peak_train_bytes"} <= set(bytes_of)
    assert [ours[name] for name in bytes_of] == [theirs[name] for name in bytes_of]


def test_derived_columns_follow_from_the_others(finished):
    _, _, results, _ = finished
    model, taken = (results["train"][part] for part in ("model_metrics", "resource_metrics"))
    saved = model["weights_bytes_fp32"] - model["weights_bytes"]
    peak = taken["peak_train_bytes"]
    assert taken["peak_saving_fp32"] == saved / (peak + saved)
    assert model["weights_saving_fp32"] == saved / model["weights_bytes_fp32"]
    half = model["weights_bytes_16bit"]
    assert model["weights_saving_16bit"] == (half - model["weights_bytes"]) / half
    residue = model["weights_bytes"] - taken["quantizable_peak_fraction"] * peak
    assert 0 < residue < model["weights_bytes"]


def test_the_columns_of_a_trial_sum_up_its_epochs(tmp_path, tiny):
    record = Record(tiny("none"), tmp_path, "cpu", 1)
    record.test_time_s = 5.0
    counts = {"grad_explosions": 1, "loss_spikes": 2, "grad_vanishing_layers": 3}
    means = dict.fromkeys(
        ("grad_norm_mean", "grad_norm_std", "grad_norm_cv", "stability_score"), 0.5
    )
    row = {**counts, **means, "gradient_cosine_successive": math.nan}
    history = [
        {
            **row,
            "images_per_s": speed,
            "train_time_s": 2.0,
            "epoch_time_s": 3.0,
            "grad_norm_mean": n,
        }
        for speed, n in ((1.0, 1.0), (9.0, math.nan), (2.0, 4.0))
    ]
    record.training = SimpleNamespace(history=history, best_epoch=2, best_accuracy=0.7)
    found = record._training_results(history)
    assert found["images_per_s"] == 2.0  # the median: one slow epoch is not the trial's speed
    assert (found["train_time_s"], found["eval_time_s"]) == (6.0, 3.0 + 5.0)
    assert (found["grad_explosions"], found["loss_spikes"]) == (3, 6)
    assert found["grad_vanishing_layers"] == 3
    assert found["grad_norm_mean"] == 2.5
    assert math.isnan(found["gradient_cosine_successive"])


def test_a_worker_is_set_up_before_a_trial_and_gives_its_memory_back_after_every_attempt(
    tiny, tmp_path, monkeypatch
):
    calls, ended = [], iter([False, True])
    for name in ("spare_imports_from_collection", "reset_rss_peak", "release_memory"):
        monkeypatch.setattr(execution, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(execution.torch, "set_num_threads", lambda count: calls.append(count))
    settings = {"deterministic": True}
    monkeypatch.setattr(execution, "settle", lambda device: calls.append(str(device)) or settings)

    def attempt(config, context, report, record):
        assert record.settings == settings
        calls.append("attempt")
        for epoch in (1, 2):
            report({"epoch": epoch})
        return next(ended)

    monkeypatch.setattr(execution, "_attempt", attempt)
    _, rows = run(tiny("none"), tmp_path / "deep" / "study", num_threads=3, device="mps")
    setting_up = [3, "spare_imports_from_collection", "reset_rss_peak", "mps"]
    assert calls == [*setting_up, *["attempt", "release_memory"] * 2]
    assert rows == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("strict", [True, False])
def test_strictness_is_given_up_once_and_said(tiny, tmp_path, monkeypatch, strict):
    record = Record(tiny("none"), tmp_path, "cpu", 1)
    record.settings, record.training = {"deterministic": strict}, object()
    context, asked = RunContext(study_dir=tmp_path), []

    def fail(*_):
        raise RuntimeError("set by use_deterministic_algorithms\nmore")

    def settle(device, *, strict=True):
        asked.append(strict)
        return {"deterministic": strict}

    monkeypatch.setattr(execution, "_train", fail)
    monkeypatch.setattr(execution, "settle", settle)
    if strict:
        assert execution._attempt(record.config, context, print, record) is False
        assert (asked, record.settings, record.training) == (
            [False],
            {"deterministic": False},
            None,
        )
        assert record.warnings[0].endswith("last bits: set by use_deterministic_algorithms")
    else:
        record.training = None
        with pytest.raises(RuntimeError):
            execution._attempt(record.config, context, print, record)
        assert (asked, record.content["status"]) == ([], "error")


def test_an_attempt_begins_without_the_error_of_the_last(tiny, tmp_path, monkeypatch):
    record = Record(tiny("none"), tmp_path, "cpu", 1)
    (tmp_path / "error.json").write_text("{}")
    monkeypatch.setattr(execution, "_train", lambda *_: None)
    assert execution._attempt(record.config, RunContext(study_dir=tmp_path), print, record) is True
    assert not (tmp_path / "error.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model"] == record.config.model

    def unreachable(*_):
        raise RemoteError("gone")

    monkeypatch.setattr(execution, "_train", unreachable)
    with pytest.raises(RemoteError):
        execution._attempt(record.config, RunContext(study_dir=tmp_path), print, record)
    assert not (tmp_path / "results.json").exists()


def test_room_is_asked_for_four_states_of_the_adapter(tiny, tmp_path, monkeypatch):
    config, asked = tiny("nf4"), []
    monkeypatch.setattr(execution, "refuse_what_cannot_fit", lambda *given: asked.append(given))
    monkeypatch.setattr(execution, "refuse_full_disk", lambda *given: asked.append(given))
    execution._refuse_to_start(config, RunContext(study_dir=tmp_path), 10)
    cpu = torch.device("cpu")
    adapter = execution.predict(config, 10, cpu).ledger.adapter_bytes
    assert asked == [(config, 10, cpu), (tmp_path, 4 * adapter)]


@pytest.mark.parametrize(("keep", "pruned"), [("all", 0), ("best", 1), ("none", 1)])
def test_old_checkpoints_go_unless_all_are_kept(tiny, tmp_path, monkeypatch, keep, pruned):
    config, calls = tiny("none"), []
    training = SimpleNamespace(config=config, state_dict=lambda: {"a": 1})
    record = SimpleNamespace(
        folder=tmp_path, memory={"m": 2}, fidelity={"f": 3}, trials_on_device=4
    )
    monkeypatch.setattr(checkpoint, "save", lambda *given: calls.append(given))
    monkeypatch.setattr(checkpoint, "prune", lambda *given, **more: calls.append((given, more)))
    execution._save(training, RunContext(study_dir=tmp_path, keep_checkpoints=keep), record)
    extra = {"memory": {"m": 2}, "fidelity": {"f": 3}, "micro_batch": 20, "trials_on_device": 4}
    assert calls == [(tmp_path, {"a": 1}, extra), *[((tmp_path,), {})] * pruned]


@pytest.mark.parametrize(
    ("micro_batch", "measured"), [(None, "memory fidelity"), (20, ""), (40, "memory")]
)
def test_what_a_checkpoint_knows_is_not_measured_again(
    tiny, tmp_path, monkeypatch, micro_batch, measured
):
    record, calls = Record(tiny("none"), tmp_path, "cpu", 1), []
    extra = {"memory": {"old": 1}, "fidelity": {"start": {}}, "micro_batch": micro_batch}
    found = tmp_path / "epoch-00003" if micro_batch else None
    monkeypatch.setattr(checkpoint, "newest", lambda folder: (found, [tmp_path / "epoch-00004"]))
    monkeypatch.setattr(checkpoint, "load", lambda folder: ({"state": folder}, extra))
    monkeypatch.setattr(execution, "_memory", lambda *_: calls.append("memory") or {"new": 2})
    monkeypatch.setattr(
        execution, "_fidelity_at_start", lambda *_: calls.append("fidelity") or {"new": 3}
    )
    loaded = []
    training = SimpleNamespace(load_state_dict=loaded.append, history=[1, 2, 3])
    execution._continue(training, None, RunContext(study_dir=tmp_path), record)
    assert " ".join(calls) == measured
    assert record.memory == ({"new": 2} if "memory" in measured else {"old": 1})
    assert record.fidelity == ({"new": 3} if "fidelity" in measured else {"start": {}})
    assert loaded == ([{"state": found}] if found else [])
    assert len(record.warnings) == 1


@pytest.mark.parametrize("peak", [1000, None])
def test_memory_columns_follow_from_the_ledger(tiny, monkeypatch, peak):
    measured = StepMemory(1, 2, 3, 4, 5, 6, 7, peak, "a source")
    ledger = SimpleNamespace(activation_bytes=11)
    expected = SimpleNamespace(ledger=ledger, peak_train_bytes=12)
    monkeypatch.setattr(train, "measure_memory", lambda training: measured)
    monkeypatch.setattr(execution, "predict", lambda *_: expected)
    built = SimpleNamespace(bytes_fp32=700, weights_bytes=450, quantizable_bytes=300)
    training = SimpleNamespace(data=SimpleNamespace(class_names=["a"]), device=None)
    found = execution._memory(tiny("nf4"), built, training)
    fraction, saving = found.pop("quantizable_peak_fraction"), found.pop("peak_saving_fp32")
    predicted = {"predicted_activation_bytes": 11, "predicted_peak_train_bytes": 12}
    assert found == {**measured._asdict(), **predicted}
    if peak:
        assert (fraction, saving) == (0.3, 0.2)
    else:
        assert math.isnan(fraction)
        assert math.isnan(saving)


def test_the_times_of_a_trial_are_within_the_time_it_took(finished):
    run_of, parts = finished[2]["run"], finished[2]["train"]
    started, written = map(datetime.fromisoformat, (run_of["started_at"], run_of["written_at"]))
    took = (written - started).total_seconds() + 1  # both are whole seconds
    sums = parts["training_results"]
    taken = [sums["train_time_s"], sums["eval_time_s"], parts["measuring_time_s"]]
    assert all(seconds > 0 for seconds in taken)
    assert sum(taken) < took
