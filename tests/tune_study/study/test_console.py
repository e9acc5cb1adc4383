"""What the user is told: the planned trials and their sum, notes, and how it ended."""

import io
import math

import pytest
from rich.console import Console

from tune_study.config import parse_trial
from tune_study.data.splits import Outline
from tune_study.memory.estimate import Estimate
from tune_study.study import console
from tune_study.study.manifest import cell_of
from tune_study.study.preflight import Checked
from tune_study.study.status import Extension
from tune_study.trial.context import RunContext, Simulation

VALUES = {"model": "m", "dataset": "digits", "training": {"num_train_epochs": 3}}
TRIALS = [parse_trial({**VALUES, "seed": seed}) for seed in (1, 2, 3)]
IDS = [trial.trial_id for trial in TRIALS]
NOTHING = Checked(dict.fromkeys(IDS), {})


def output():
    return Console(file=io.StringIO(), width=200)


def planned(monkeypatch, capsys, tmp_path, **options):
    """(the table's lines by trial id, what stands below it)."""
    expected = dict(
        zip(
            IDS,
            ((1_500_000, 7e6, 100), (2_000_000, math.nan, 60)),
            strict=False,
        )
    )
    monkeypatch.setattr(console, "within_memory", lambda trial, folder: trial)
    monkeypatch.setattr(
        console, "estimate", lambda trial, data, device: Estimate(*expected[trial.trial_id])
    )
    below = output()
    context = RunContext(study_dir=tmp_path / "s")
    console.print_plan(below, TRIALS[:2], NOTHING, context, **options)
    lines = capsys.readouterr().out.splitlines()
    return (
        {id_: line for id_ in IDS for line in lines if id_ in line},
        " ".join(below.file.getvalue().split()),
    )


def test_a_plan_shows_megabytes_times_and_their_sum(monkeypatch, capsys, tmp_path):
    rows, below = planned(monkeypatch, capsys, tmp_path, notes=["take care"])
    assert [word for word in rows[IDS[0]].split() if word != "│"][1:] == ["1.50", "7", "2", "min"]
    assert "2.00" in rows[IDS[1]]
    assert "unknown" in rows[IDS[1]]
    assert "60 s" in rows[IDS[1]]
    assert below.startswith("note: take care")
    assert "2 distinct ids: 1 configuration, 1 treatment, 2 seeds." in below
    assert below.endswith("3 min in all.")  # 160 s


def test_the_sum_is_of_the_trials_that_are_still_to_run(monkeypatch, capsys, tmp_path):
    extension = Extension({IDS[0]: "finished", IDS[1]: "new"}, 0)
    rows, below = planned(monkeypatch, capsys, tmp_path, extension=extension)
    assert "finished" in rows[IDS[0]]
    assert " new " in rows[IDS[1]]
    assert "In s: 1 to run: 1 new; 1 finished stay as they are." in below
    assert below.endswith("60 s in all.")


def test_a_simulated_plan_has_bytes_alone(capsys, tmp_path):
    trial = parse_trial({**VALUES, "model": "deit_tiny_patch16_224", "dataset": "cifar100"})
    below = output()
    context = RunContext(study_dir=tmp_path, simulation=Simulation())
    console.print_plan(below, [trial], Checked({}, {}), context)
    (line,) = [row for row in capsys.readouterr().out.splitlines() if trial.trial_id in row]
    # 90 classes more than DESIGN.md's 22_105_384 bytes, each with 192 weights and a bias; two
    # bytes fewer for every number in the blocks' layers.
    held = 12 * (192 * 576 + 192 * 192 + 2 * 192 * 768 + 576 + 192 + 768 + 192)
    assert f"{(22_105_384 + 90 * 193 * 4 - 2 * held) / 1e6:.2f}" in line
    assert line.count("unknown") == 2
    assert (
        "1 distinct ids: 1 configuration, 1 treatment, 1 seed. Simulated: nothing would be trained."
        in below.file.getvalue()
    )


def test_a_study_ended_well_when_every_trial_did(tmp_path):
    said = output()
    assert console.judge(said, {"a": "completed", "b": "early_stopped"}, tmp_path) == 0
    assert said.file.getvalue() == "all 2 trials ended well\n"
    said = output()
    ends = {"a": "completed", "b": "pruned", "c": "pruned"}
    assert console.judge(said, ends, tmp_path) == 0
    assert said.file.getvalue() == "all 3 trials ended well, 2 of them pruned\n"
    said = output()
    assert console.judge(said, {"a": "completed", "b": "oom", "c": "pending"}, tmp_path) == 1
    lines = said.file.getvalue()
    assert lines.startswith("2 of 3 trials did not end well:\n  b: oom (see ")
    assert "  c: pending" in lines
    assert "  a: " not in lines
    assert "--retry-failed" in lines


@pytest.mark.parametrize(
    ("pretrained", "simulation", "words"),
    [
        ((True, True), None, ""),
        ((True, False), None, "RANDOM"),
        ((False, False), Simulation(), "SIMULATED"),
    ],
)
def test_what_is_unusual_is_said(pretrained, simulation, words):
    said = output()
    trials = [parse_trial({**VALUES, "pretrained": value}) for value in pretrained]
    console.say_what_is_unusual(said, trials, simulation)
    text = said.file.getvalue()
    assert words in text
    assert text.count("\n") == bool(words)


def test_an_effect_at_a_level_that_no_trial_has_is_said():
    said = output()
    effects = {"nf4": 0.1, 'int8@dataset="digits"': 0.1, "int8@lora.r=999": 0.1}
    trials = [parse_trial({**VALUES, "dataset": "digits", "quantization": "int8"})]
    console.say_planted_nowhere(said, trials, Simulation(effects=effects))
    text = said.file.getvalue()
    assert text == "note: --effect int8@lora.r=999: no trial of this plan has that mode and level\n"


@pytest.mark.parametrize(("warmup", "said_at"), [(8, ""), (9, "9 steps never ends in the 9 steps")])
def test_a_warm_up_as_long_as_the_training_never_ends(warmup, said_at):
    """25 images make 3 steps of 10 images, 3 times: 9."""
    training = {"num_train_epochs": 3, "warmup_steps": warmup}
    training |= {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    trials = [parse_trial({**VALUES, "seed": seed, "training": training}) for seed in (1, 2)]
    images = Outline(10, 25, 1, 1)
    said = output()
    console.say_long_warm_up(said, trials, Checked({trials[1].trial_id: images}, {}))
    text = said.file.getvalue()
    assert said_at in text
    assert text.count("\n") == bool(said_at)


def test_trials_are_told_apart_by_the_whole_study_where_their_ids_do_not(capsys, tmp_path):
    tiny = {**VALUES, "model": "deit_tiny_patch16_224"}
    rates = [parse_trial({**tiny, "training": {"learning_rate": rate}}) for rate in (0.1, 0.2)]
    context = RunContext(study_dir=tmp_path, simulation=Simulation())
    plan = [cell_of(trial) for trial in rates]
    for options, words in (({}, ""), ({"plan": plan}, "learning rate 0.2")):
        below = output()
        console.print_plan(below, rates[1:], Checked({}, {}), context, **options)
        shown = capsys.readouterr().out
        (line,) = [row for row in shown.splitlines() if rates[1].trial_id in row]
        assert words in line
        assert ("in words" in shown) == bool(words)


def test_auto_is_told_once_where_a_graph_might_be_had():
    named = parse_trial({**VALUES, "training": {"step": "eager"}})
    for device, trials, times in (
        ("cuda", [*TRIALS, named], 1),
        ("cuda", [named], 0),
        ("cpu", TRIALS, 0),
    ):
        said = output()
        console.say_why_eager(said, trials, device)
        assert said.file.getvalue().count("note: training.step = auto: steps are eager") == times
