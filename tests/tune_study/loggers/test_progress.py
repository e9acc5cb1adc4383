"""What the command says of its trials."""

import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from tune_study.folder.files import write_json
from tune_study.loggers import progress as progress_module
from tune_study.loggers.progress import Progress, duration


def test_a_trial_counts_when_it_has_ended_not_when_its_worker_died(tmp_path):
    output = io.StringIO()
    progress = Progress(Console(file=output), tmp_path, 1, 0, {"one": 2})
    trial = SimpleNamespace(config={"trial_id": "one"})
    progress.on_trial_start(0, [], trial)
    progress.on_trial_error(0, [], trial)  # killed before it wrote its first file
    results = {"status": "interrupted", "warnings": ["a checkpoint is not whole"]}
    (tmp_path / "one").mkdir()
    write_json(tmp_path / "one" / "results.json", results)
    progress.on_trial_error(0, [], trial)
    assert output.getvalue() == "one: started\none: a checkpoint is not whole\n"
    write_json(tmp_path / "one" / "results.json", results | {"status": "error", "error": "no luck"})
    progress.on_trial_error(0, [], trial)
    assert output.getvalue().endswith("one: error: no luck [1/1]\n")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


def shown(tmp_path, total, done, epochs):
    output = io.StringIO()
    return Progress(Console(file=output, width=200), tmp_path, total, done, epochs), output


def row(epoch, accuracy=0.5, speed=20.4):
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "train_loss": 1.25,
        "images_per_s": speed,
    }


def trial_of(name):
    return SimpleNamespace(config={"trial_id": name})


def test_an_epoch_is_a_line_of_figures(tmp_path):
    progress, output = shown(tmp_path, 2, 0, {"a": 5})
    progress.on_trial_result(0, [], trial_of("a"), row(3, 0.12344))
    progress.on_trial_result(0, [], trial_of("a"), row(4, 1.0, math.nan))
    assert output.getvalue().splitlines() == [
        "a: epoch 3/5, loss 1.2500, validation accuracy 0.1234, 20 images/s",
        "a: epoch 4/5, loss 1.2500, validation accuracy 1.0000",
    ]


def test_the_end_of_a_trial_says_how_and_counts(tmp_path):
    progress, output = shown(tmp_path, 7, 2, dict.fromkeys("abc", 3))
    ends = {
        "a": {
            "status": "early_stopped",
            "train": {"test_metrics": {"test_accuracy": 0.98765}},
        },
        "b": {"status": "pruned", "error": "stopped by ASHA"},
        "c": {"status": "oom", "error": "no room"},
    }
    for name, results in ends.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "results.json", results)
        progress.on_trial_complete(0, [], trial_of(name))
    assert output.getvalue().splitlines() == [
        "a: early_stopped, test accuracy 0.9877 [3/7]",
        "b: stopped by ASHA [4/7]",
        "c: oom: no room [5/7]",
    ]
    console = Console(file=io.StringIO(), width=200)
    console.print(progress._render())
    assert "5 done, 1 failed; time left unknown" in console.file.getvalue()
    assert "5/7" in console.file.getvalue()


def test_the_time_left_is_that_of_the_epochs_left(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    progress, _ = shown(tmp_path, 3, 1, {"a": 4, "b": 6})  # of three trials one has ended
    progress.on_trial_start(0, [], trial_of("a"))
    assert progress._left() == "time left unknown until the first epoch ends"
    clock.now += 20
    progress.on_trial_result(0, [], trial_of("a"), row(1))
    assert progress._left() == "about 3 min left"  # 9 x 20 s
    clock.now += 40
    progress.on_trial_result(0, [], trial_of("a"), row(2))
    assert progress._left() == "about 4 min left"  # 8 x 30 s
    progress.on_trial_result(0, [], trial_of("a"), row(2))  # again, after its worker's death
    assert (progress._epochs_left, progress._epochs_seen) == (8, 3)
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "results.json", {"status": "pruned", "error": "x"})
    progress.on_trial_complete(0, [], trial_of("a"))
    assert progress._epochs_left == 6  # the two that it did not need are gone
    assert progress._left() == "about 2 min left"  # 6 x 20 s


def test_a_search_counts_what_it_has_not_suggested_as_the_mean_of_what_it_has(
    tmp_path, monkeypatch
):
    clock = Clock(monkeypatch)
    progress, _ = shown(tmp_path, 7, 2, {"a": 4})
    progress.expect("b", 8)
    progress.expect("b", 8)
    clock.now += 10
    progress.on_trial_result(0, [], trial_of("a"), row(1))
    # 11 of a and b, and three more of 6: 29 x 10 s
    assert progress._left() == "about 5 min left"
    assert progress._epochs_left == 11
    assert 7 - 2 - len(progress._epochs) == 3


def test_what_runs_is_shown_with_its_epoch_and_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    progress, _ = shown(tmp_path, 2, 0, {"a": 4, "b": 6})
    progress.on_trial_start(0, [], trial_of("a"))
    clock.now += 42
    progress.on_trial_start(0, [], trial_of("b"))
    progress.on_trial_result(0, [], trial_of("b"), row(1, 0.75))
    console = Console(file=io.StringIO(), width=200)
    console.print(progress._render())
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["a", "0/4", "42", "s"] in lines
    assert ["b", "1/6", "0.7500", "0", "s"] in lines


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (3599, "60 min"),
        (3600, "1 h 0 min"),
        (12_059, "3 h 20 min"),
        (12_060, "3 h 21 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_trials_are_told_apart_in_words_where_their_ids_do_not(tmp_path):
    usual = {"model": "m", "dataset": "digits", "quantization": {"mode": "nf4"}, "seed": 1}
    plan = [
        {**usual, "trial_id": name, "training": {"learning_rate": rate}}
        for name, rate in (("a", 0.1), ("b", 0.2))
    ]
    output = io.StringIO()
    epochs = {"a": 2, "b": 2, "other": 2}
    progress = Progress(Console(file=output, width=200), tmp_path, 2, 0, epochs, plan)
    for name in epochs:
        progress.on_trial_start(0, [], trial_of(name))
    assert output.getvalue().splitlines() == [
        "a (learning rate 0.1): started",
        "b (learning rate 0.2): started",
        "other: started",
    ]
    live = Console(file=io.StringIO(), width=200)
    live.print(progress._render())
    shown = live.file.getvalue()
    assert "learning rate 0.1 · nf4 · seed 1" in shown
    assert "learning rate 0.2 · nf4 · seed 1" in shown
    assert "other" in shown
