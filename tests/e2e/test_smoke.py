"""A real study from the command line: real ViT, bitsandbytes, PEFT and Ray, in minutes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tune_study import resources, schema

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMES = ["train_time_s", "eval_time_s", "images_per_s", "epoch_time_s", "rss_peak_bytes"]
TIMES += resources.COLUMNS


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tune_study.run", "--grid", "smoke", "--output-dir", folder]
    return subprocess.Popen(
        [*map(str, command), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def wait_for_epoch(process: subprocess.Popen) -> str:
    """Reads the output until the first epoch has ended."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if "epoch 1/" in line:
            return seen
    pytest.fail(f"no epoch: {seen}")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, output = finish(start(folder))
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
    missing = ("error", "gradient_noise_scale")  # no trial failed; it is off by default
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
        for name in ("config.json", "results.json", "quantization_analysis.json"):
            assert (folder / trial_id / name).is_file()
        assert not (folder / trial_id / "error.json").exists()
        assert (folder / trial_id / "adapter" / "adapter_model.safetensors").is_file()
        assert list((folder / "tensorboard" / trial_id).glob("events.*"))
        (tune,) = folder.glob(f"run-*/{trial_id}")
        rows = [json.loads(line) for line in (tune / "result.json").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert (tune / "progress.csv").is_file()
        assert (tune / "params.json").is_file()
    assert not list(folder.glob(".*.tmp"))


def test_a_second_run_trains_nothing(study):
    folder, _ = study
    before = (folder / "trials.csv").read_bytes()
    code, output = finish(start(folder.parent))
    assert code == 0
    assert "nothing to do: all 4 trials" in output
    assert len(list(folder.glob("run-*"))) == 1
    assert (folder / "trials.csv").read_bytes() == before


def compare(folder: Path, expected: Path) -> None:
    for table in ("trials", "epochs"):
        ours, theirs = (pd.read_parquet(f / f"{table}.parquet") for f in (folder, expected))
        drop = [name for name in TIMES if name in ours]
        pd.testing.assert_frame_equal(
            ours.drop(columns=drop), theirs.drop(columns=drop), check_exact=True
        )


def test_killed_in_the_middle_moved_and_continued_gives_the_same_tables(study, tmp_path):
    process = start(tmp_path / "first")
    wait_for_epoch(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kill_ray()
    (tmp_path / "first").rename(tmp_path / "moved")
    code, output = finish(start(tmp_path / "moved"))
    assert code == 0, output
    compare(tmp_path / "moved" / "smoke", study[0])


def kill_ray() -> None:
    """The processes that a killed driver leaves behind end by themselves, a little later."""
    time.sleep(3)


@pytest.mark.slow
def test_ctrl_c_ends_at_the_epoch_and_says_how_to_go_on(study, tmp_path):
    process = start(tmp_path)
    seen = wait_for_epoch(process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, seen + output
    assert "continue with: python -m tune_study.run --grid smoke" in output.replace("\n", " ")
    trials = pd.read_parquet(tmp_path / "smoke" / "trials.parquet")
    assert len(trials) == 4
    assert "pending" in set(trials["status"])
    code, output = finish(start(tmp_path))
    assert code == 0, output
    compare(tmp_path / "smoke", study[0])
