"""A real study from the command line: real ViT, bitsandbytes, PEFT and Ray, in minutes."""

import json
import random
import signal

import pandas as pd
import pytest

from tune_study.folder import schema

from . import crash, harness
from .harness import compare, finish, start, wait_for


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, output = finish(start(folder), folder)
    assert code == 0, output
    return folder / "smoke", output


def test_every_planned_trial_has_a_whole_row(study):
    folder, output = study
    trials = pd.read_parquet(folder / "trials.parquet")
    assert list(trials["quantization"]) == ["none", "int8", "nf4", "nf4-dq"]
    assert set(trials["status"]) <= set(schema.GOOD_STATUSES)
    assert not trials["simulated"].any()
    assert list(trials["quantized_layers"]) == [0, 24, 24, 24]
    bytes_ = list(trials["weights_bytes"])
    assert bytes_ == sorted(bytes_, reverse=True)
    # No trial failed; the noise scale is off by default; missing stands for all or for none; few
    # CPUs tell their energy.
    unasked = {"error", "gradient_noise_scale", "data.image_size", "train_energy_j"}
    unasked |= {"data.image_column", "data.label_column"}
    missing = unasked | {"lora.exclude_modules", "lora.layers_to_transform"}
    known = [c.name for c in schema.TRIALS if c.name not in missing]
    assert not trials[known].isna().any().any()
    epochs = pd.read_parquet(folder / "epochs.parquet")
    assert list(epochs.groupby("trial_id", sort=False)["epoch"].agg(list)) == [[1, 2]] * 4
    assert pd.read_csv(folder / "trials.csv").shape[0] == 4
    assert "all 4 trials ended well" in output
    assert f"tensorboard --logdir {folder / 'tensorboard'}" in output.replace("\n", "")


def test_the_study_folder_is_as_designed(study):
    folder, _ = study
    manifest = json.loads((folder / "study.json").read_text())
    ids = [cell["trial_id"] for cell in manifest["plan"]]
    for trial_id in ids:
        for name in ("config.json", "results.json", "quantization_analysis.json", "trial.log"):
            assert (folder / trial_id / name).is_file()
        assert not (folder / trial_id / "error.json").exists()
        assert not (folder / trial_id / "checkpoints").exists()
        assert (folder / trial_id / "adapter" / "adapter_model.safetensors").is_file()
        (tune,) = folder.glob(f"run-*/{trial_id}")
        assert (tune / "progress.csv").is_file()
        assert (tune / "params.json").is_file()
    harness.no_epoch_twice(folder)
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.ci
def test_a_second_run_trains_nothing(study):
    folder, _ = study
    before = (folder / "trials.csv").read_bytes()
    code, output = finish(start(folder.parent), folder.parent)
    assert code == 0
    assert "nothing to do: all 4 trials" in output
    assert len(list(folder.glob("run-*"))) == 1
    assert (folder / "trials.csv").read_bytes() == before


@pytest.mark.slow
@pytest.mark.ci
def test_killed_moved_and_continued_gives_the_same_tables(study, tmp_path):
    """A worker first, which the study survives; then everything, with the files written last."""
    first = tmp_path / "first"
    process = start(first)
    wait_for(process, first, "epoch 1/2")
    assert harness.kill(process, "worker")
    wait_for(process, first, "its worker process died")
    wait_for(process, first, "epoch 2/2")
    harness.kill(process, "power")
    harness.cut_power(first / "smoke", random.Random(0))
    first.rename(tmp_path / "moved")
    code, output = finish(start(tmp_path / "moved"), tmp_path / "moved")
    assert code == 0, output
    compare(tmp_path / "moved" / "smoke", study[0])
    harness.no_epoch_twice(tmp_path / "moved" / "smoke")


@pytest.mark.slow
@pytest.mark.ci
def test_a_dead_raylet_ends_the_command_with_a_sentence(tmp_path):
    process = start(tmp_path, "--set", "training.num_train_epochs=200")
    wait_for(process, tmp_path, "epoch 1/200")
    assert harness.kill(process, "raylet")
    code, output = finish(process, tmp_path, timeout_s=120)
    assert code == 1
    assert "Ray's raylet process died; continue with: python -m tune_study.run" in output
    assert (tmp_path / "smoke" / "trials.parquet").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["interrupt", "terminate"],
)
def test_a_signal_ends_at_the_epoch_and_the_command_goes_on(study, tmp_path, number, code):
    process = start(tmp_path)
    wait_for(process, tmp_path, "epoch 1/2")
    harness.interrupt(process, number)  # the whole group, as a terminal does it
    found, output = finish(process, tmp_path)
    assert found == code, output
    assert "continue with: python -m tune_study.run --grid smoke" in output.replace("\n", " ")
    trials = pd.read_parquet(tmp_path / "smoke" / "trials.parquet")
    assert len(trials) == 4
    assert "pending" in set(trials["status"])
    found, output = finish(start(tmp_path), tmp_path)
    assert found == 0, output
    compare(tmp_path / "smoke", study[0])


@pytest.mark.slow
@pytest.mark.ci
def test_a_signal_ends_trials_that_run_side_by_side(tmp_path):
    """Tune gives the worker of the first that ends to a waiting trial, which is not waited for."""
    arguments = ["--simulate", "--epoch-s", 2, "--max-concurrent", 2]
    arguments += ["--set", "training.num_train_epochs=100"]
    process = start(tmp_path, *arguments, grid="full")
    wait_for(process, tmp_path, "epoch 1/100")
    harness.interrupt(process)
    found, output = finish(process, tmp_path)
    assert found == 130, output
    assert output.count(": started") <= 4, output


@pytest.mark.slow
@pytest.mark.ci
def test_crashes_at_random_moments(study, tmp_path):
    """The short form of ``python -m tests.e2e.crash``."""
    crash.crash(tmp_path, study[0], 60, random.Random("short"))
