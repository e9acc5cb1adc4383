"""Adding to a study: by its protocol, shown first, and with only what is missing run."""

import json

import pandas as pd
import pytest

from tune_study import run
from tune_study.config import parse_trial
from tune_study.folder.files import write_json
from tune_study.study import schedule
from tune_study.study.status import forget, held_against, todo
from tune_study.trial import simulate

GRID = """
from ray import tune
def mine():
    return {
        "model": tune.grid_search(MODELS), "dataset": "cifar10",
        "quantization": tune.grid_search(["none", "nf4"]), "seed": tune.grid_search(SEEDS),
        "training": {"num_train_epochs": 2},
    }
"""
TINY, SMALL = "deit_tiny_patch16_224", "deit_small_patch16_224"
VALUES = {"model": "m", "dataset": "digits"}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command(models, seeds, *options)`` -> (exit code, output) of a simulated study.

    The trials are drawn in this process, in place of ``schedule.run``; ``ran`` lists them.
    """
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []

    def without_ray(waiting, context, progress, **options):
        for trial in waiting:
            ran.append(trial.trial_id)
            simulate.execute(trial, context.simulation, context.study_dir, lambda row: None)

    monkeypatch.setattr(schedule, "run", without_ray)
    monkeypatch.setattr("analysis.report.write_report", lambda folder: folder / "report")

    def call(models, seeds, *options):
        ran.clear()
        text = GRID.replace("MODELS", repr(models)).replace("SEEDS", repr(seeds))
        (tmp_path / "grid.py").write_text(text)
        words = ["tune-study", "--grid", "grid.py:mine", "--simulate", "--name", "s", *options]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as exit_:
            run.main()
        output = capsys.readouterr()
        return exit_.value.code or 0, output.out + output.err

    call.ran = ran
    return call


def plan_of(folder):
    return [cell["trial_id"] for cell in json.loads((folder / "study.json").read_text())["plan"]]


def test_more_seeds_and_models_run_only_what_is_missing(command, tmp_path):
    folder = tmp_path / "ray_results" / "s"
    assert command([TINY], [1, 2])[0] == 0
    first, kept = list(command.ran), {}
    for trial_id in first:
        kept[trial_id] = (folder / trial_id / "results.json").stat().st_mtime_ns
    code, output = command([TINY], [1, 2, 3])
    assert code == 0
    assert "2 to run: 2 new; 4 finished stay as they are" in output
    assert len(command.ran) == 2
    assert all("-s3-" in trial_id for trial_id in command.ran)
    # Neither contains the other: seed 3 of a second model, without the first one's.
    code, output = command([SMALL], [3])
    assert code == 0
    assert "6 that this command does not name stay as they are" in output
    assert all(SMALL in trial_id for trial_id in command.ran)
    assert len(plan_of(folder)) == 8
    assert plan_of(folder)[:4] == first
    trials = pd.read_parquet(folder / "trials.parquet")
    assert set(trials["status"]) == {"completed"}
    assert len(trials) == 8
    for trial_id, written in kept.items():
        assert (folder / trial_id / "results.json").stat().st_mtime_ns == written
    code, output = command([TINY], [2])  # a smaller grid does not shrink the study
    assert code == 0
    assert command.ran == []
    assert "nothing to do: all 2 trials" in output
    assert len(plan_of(folder)) == 8


def test_dry_run_shows_the_difference_and_changes_nothing(command, tmp_path):
    folder = tmp_path / "ray_results" / "s"
    code, output = command([TINY], [1], "--dry-run")
    assert code == 0
    assert "status" not in output
    assert not folder.exists()
    command([TINY], [1])
    interrupted, failed = command.ran
    for trial_id, status in ((interrupted, "interrupted"), (failed, "oom")):
        path = folder / trial_id / "results.json"
        write_json(path, {**json.loads(path.read_text()), "status": status})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, output = command([TINY], [1, 2], "--dry-run")
    assert code == 0
    rows = {line.split()[1]: line for line in output.splitlines() if TINY in line}
    assert "to continue" in rows[interrupted]
    assert "failed (oom)" in rows[failed]
    assert [id_ for id_, row in rows.items() if " new " in row] == list(rows)[2:]
    assert len(rows) == 4
    assert "3 to run: 1 to continue, 2 new; 1 failed (--retry-failed runs them again)" in output
    output = command([TINY], [1, 2], "--dry-run", "--retry-failed")[1]
    assert "again (oom)" in output
    assert "4 to run" in output
    assert command.ran == []
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert command([TINY], [1, 2], "--retry-failed")[0] == 0
    assert sorted(command.ran) == sorted(rows)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_another_protocol_is_refused_by_name_and_value(command, tmp_path, dry):
    folder = tmp_path / "ray_results" / "s"
    command([TINY], [1])
    before = (folder / "study.json").read_bytes()
    code, error = command([TINY], [2], "--set", "training.learning_rate=0.5", *dry)
    assert code == 2
    error = error.partition("nothing is trained\n")[2]
    assert error.startswith("error: --name s: that study has another protocol")
    assert "training.learning_rate was 0.0001 and is 0.5" in error
    assert "--name" in error.partition("(")[2]
    assert error.count("\n") == 1
    assert command.ran == []
    assert (folder / "study.json").read_bytes() == before


def test_states_come_from_our_own_files_and_the_plan(tmp_path):
    trials = [parse_trial({**VALUES, "seed": seed}) for seed in range(6)]
    ends = ("completed", "diverged", "interrupted", None, None, "pruned")
    for trial, status in zip(trials, ends, strict=True):
        if status:
            (tmp_path / trial.trial_id).mkdir()
            write_json(tmp_path / trial.trial_id / "results.json", {"status": status})
    planned = {trial.trial_id for trial in trials[:4]} | {"another"}
    found = held_against(trials, planned, tmp_path)
    assert list(found.states.values()) == [
        "finished",
        "failed (diverged)",
        "to continue",
        "planned",
        "new",
        "finished",
    ]
    assert found.to_run == [trial.trial_id for trial in trials[2:5]]
    assert found.others == 1
    again = held_against(trials, planned, tmp_path, retry_failed=True)
    assert len(again.to_run) == 4
    forget(trials, tmp_path)
    assert sorted(t.trial_id for t in todo(trials, tmp_path)) == sorted(again.to_run)


def test_trial_ids_of_earlier_studies_stay():
    """A changed default or field would make every finished study a stranger."""
    ids = {
        "deit_tiny_patch16_224-cifar10-r8-none-s42-215f532a": {},
        "deit_tiny_patch16_224-cifar10-r8-nf4_dq-s42-3b1da3da": {"quantization": "nf4-dq"},
        "deit_tiny_patch16_224-cifar10-r4-int8-s7-44e65226": {
            "lora": {"r": 4, "lora_alpha": 8},
            "quantization": "int8",
            "seed": 7,
            "training": {"compute_dtype": "fp32"},
        },
    }
    values = {"model": TINY, "dataset": "cifar10"}
    assert [parse_trial({**values, **fields}).trial_id for fields in ids.values()] == [*ids]


def test_only_our_own_results_say_that_a_trial_is_done(tiny, tmp_path):
    trials = [tiny(mode) for mode in ("none", "int8", "nf4", "nf4-dq", "fp4")]
    folder = tmp_path / "study"
    for trial, status in zip(
        trials, ("completed", "interrupted", "error", "early_stopped"), strict=False
    ):
        (folder / trial.trial_id).mkdir(parents=True)
        write_json(folder / trial.trial_id / "results.json", {"status": status})
    waiting = [trial.quantization.mode for trial in todo(trials, folder)]
    assert waiting == ["int8", "fp4"]
    (folder / trials[0].trial_id / "results.json").write_text('{"status": "compl')
    assert trials[0] in todo(trials, folder)
    forget(trials, folder)
    again = [trial.quantization.mode for trial in todo(trials, folder)]
    assert again == ["none", "int8", "nf4", "fp4"]
    assert not (folder / trials[2].trial_id).exists()
    assert (folder / trials[3].trial_id).exists()
