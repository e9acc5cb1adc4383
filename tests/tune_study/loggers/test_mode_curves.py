"""Custom Scalars and the Images tab, read by TensorBoard's own code."""

import math
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tune_study.loggers import board
from tune_study.folder.files import write_json
from tune_study.loggers import event_files, mode_curves
from tune_study.loggers.event_files import replace_run, scalar, show_figures
from tune_study.loggers.mode_curves import Cell, ModeCurves, cells_of

TITLE = "m · d · r 8"


def entry(mode="nf4", seed=42, r=8, layers=()):
    return {
        "trial_id": f"{mode}-{seed}-{r}-{layers}",
        "model": "m",
        "dataset": "d",
        "lora": {"r": r, "lora_alpha": 16},
        "quantization": {"mode": mode, "skip_layers": list(layers), "overrides": {}},
        "seed": seed,
    }


PLAN = [entry(mode, seed) for seed in (1, 2) for mode in ("none", "nf4")]


def row(epoch, accuracy):
    return {"epoch": epoch, "val_accuracy": accuracy, "val_loss": 1 - accuracy}


def end(folder, plan_entry, accuracies, status="completed"):
    rows = [row(epoch, accuracy) for epoch, accuracy in enumerate(accuracies, start=1)]
    trial = folder / plan_entry["trial_id"]
    trial.mkdir(exist_ok=True)
    write_json(trial / "results.json", {"status": status, "train": {"epochs": rows}})


@pytest.fixture(autouse=True)
def _no_time_between_writes(monkeypatch):
    monkeypatch.setattr(mode_curves, "WRITING_SHARE", math.inf)


def report(curves, plan_entry, epoch, accuracy):
    trial = SimpleNamespace(config={"trial_id": plan_entry["trial_id"]})
    curves.on_trial_result(0, [], trial, row(epoch, accuracy))
    curves.on_step_end(0, [])


def complete(curves, plan_entry):
    trial = SimpleNamespace(config={"trial_id": plan_entry["trial_id"]})
    curves.on_trial_complete(0, [], trial)
    curves.on_step_end(0, [])


def accuracy(folder, title=TITLE):
    drawn = board.charts(folder / "tensorboard", ["modes/none", "modes/nf4"])
    return {
        run: [(step, pytest.approx(value)) for step, value in points]
        for run, points in drawn[title]["validation accuracy"].items()
    }


def test_a_curve_per_mode_is_the_mean_over_its_seeds(tmp_path):
    curves = ModeCurves(tmp_path, PLAN)
    for cell, values in zip(PLAN, ([0.5, 0.7, 0.8], [0.4, 0.6], [0.7, 0.9], [0.2]), strict=True):
        end(tmp_path, cell, values)
        complete(curves, cell)
    # each ends with its shortest trial
    assert accuracy(tmp_path) == {"modes/none": [(1, 0.6), (2, 0.8)], "modes/nf4": [(1, 0.3)]}


def test_the_first_trial_of_a_mode_is_drawn_while_it_runs_and_the_next_when_they_end(tmp_path):
    curves = ModeCurves(tmp_path, PLAN)
    report(curves, PLAN[1], 1, 0.5)
    assert accuracy(tmp_path) == {"modes/nf4": [(1, 0.5)]}
    report(curves, PLAN[1], 2, 0.6)
    report(curves, PLAN[1], 2, 0.6)  # a retry
    assert accuracy(tmp_path) == {"modes/nf4": [(1, 0.5), (2, 0.6)]}
    end(tmp_path, PLAN[1], [0.5, 0.6])
    complete(curves, PLAN[1])
    report(curves, PLAN[3], 1, 0.1)
    assert accuracy(tmp_path) == {"modes/nf4": [(1, 0.5), (2, 0.6)]}


def test_what_takes_long_to_write_is_written_seldom_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(mode_curves, "WRITING_SHARE", 0.1)
    clock = iter([0.0, 2.0, *([19.0] * 3), 22.1, 22.1, 24.1, 25.0, 26.0, 26.0])
    monkeypatch.setattr(mode_curves.time, "monotonic", lambda: next(clock))
    curves = ModeCurves(tmp_path, PLAN)  # took 2 s: the next after 22 s
    for epoch in (1, 2, 3):
        report(curves, PLAN[1], epoch, 0.5)
    assert accuracy(tmp_path) == {}
    report(curves, PLAN[1], 4, 0.5)
    assert len(accuracy(tmp_path)["modes/nf4"]) == 4
    report(curves, PLAN[1], 5, 0.5)
    assert len(accuracy(tmp_path)["modes/nf4"]) == 4
    curves.on_experiment_end([])
    assert len(accuracy(tmp_path)["modes/nf4"]) == 5


def test_a_running_trial_does_not_cut_the_mean_of_those_that_ended():
    cell = Cell(TITLE, "nf4")
    cell.running["b"] = [row(1, 0.1)]
    assert cell.means("val_accuracy") == [0.1]
    cell.ended["a"] = [row(1, 0.5), row(2, 0.6)]
    assert cell.means("val_accuracy") == [0.5, 0.6]


def test_a_restart_adds_no_point_and_a_failed_trial_is_left_out(tmp_path):
    end(tmp_path, PLAN[0], [0.5, 0.7])
    end(tmp_path, PLAN[1], [0.1], status="diverged")
    for _ in range(3):
        ModeCurves(tmp_path, PLAN)
    assert accuracy(tmp_path) == {"modes/none": [(1, 0.5), (2, 0.7)]}
    sizes = [path.stat().st_size for path in (tmp_path / "tensorboard/modes/none").iterdir()]
    assert len([size for size in sizes if size]) == 1


def test_charts_are_grouped_by_configuration(tmp_path):
    plan = [*PLAN, entry("none", 1, r=4)]
    ModeCurves(tmp_path, plan)
    layout = board.charts(tmp_path / "tensorboard", [])
    assert list(layout) == ["r 8", "r 4"]
    assert list(layout["r 8"])[:2] == ["validation accuracy", "validation loss"]


def test_settings_of_one_mode_are_curves_of_their_own():
    plan = [entry("none"), entry(layers=["blocks.1.*"]), entry(layers=["blocks.0.*"]), entry()]
    found = [cell.mode for cell in cells_of(plan).values()]
    assert found == ["none", "nf4 without block 1", "nf4 without block 0", "nf4"]


def test_the_run_of_a_treatment_has_a_name_that_a_folder_can_have():
    names = ["nf4", "nf4-dq without blocks 0-2, 4-11", "int8 without a/*", "int8 without a/?", ".."]
    folders = mode_curves._folders([*names, "x" * 200, "x" * 201])
    assert list(folders)[:5] == names
    assert [folders[name] for name in names] == [
        "nf4",
        "nf4-dq without blocks 0-2, 4-11",
        "int8 without a__",
        "int8 without a___",
        "_",
    ]
    assert len({*folders.values()}) == 7
    assert max(map(len, folders.values())) < 120


def test_an_open_tensorboard_sees_a_replaced_run_once(tmp_path):
    """The slow reader, of systems that have no fast one: it waits forever for a deleted file."""
    replace_run(tmp_path / "run", [(1, scalar("a", 1.0)), (2, scalar("a", 2.0))])
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for last in (3.0, 4.0):
        points = [(step, scalar("a", step * last)) for step in (1, 2, 3)]
        replace_run(tmp_path / "run", points)
        replace_run(tmp_path / "run", points)
        events.Reload()
        assert [(p.step, p.value) for p in events.Scalars("a")] == [
            (1, last),
            (2, 2 * last),
            (3, 3 * last),
        ]


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000030000000208060000009d74661a"
    "0000000d49444154789c63606040070000120001d2bb8a2f0000000049454e44ae426082"
)


def test_the_figures_of_the_report_are_shown_once_under_their_names(tmp_path):
    figures = tmp_path / "report" / "figures"
    figures.mkdir(parents=True)
    for name in ("pareto_weights", "learning_curves"):
        (figures / f"{name}.png").write_bytes(PNG)
    show_figures(tmp_path)
    (figures / "learning_curves.png").unlink()  # the next report has it no more
    show_figures(tmp_path)
    found = board.images(tmp_path / "tensorboard" / "report")
    assert list(found) == ["report/pareto_weights"]
    ((image,),) = found.values()
    assert (image.width, image.height, image.encoded_image_string) == (3, 2, PNG)
    (value,) = event_files._image("x", PNG).value
    assert (value.tag, value.image.colorspace) == ("report/x", 4)


def test_a_mean_is_no_median_and_an_unknown_seed_makes_it_unknown():
    cell = Cell(TITLE, "nf4")
    for name, accuracies in (("a", [0.0, 0.5]), ("b", [0.25, None]), ("c", [1.25, 0.5])):
        cell.ended[name] = [
            row(i, a) if a else {"val_accuracy": a} for i, a in enumerate(accuracies)
        ]
    first, second = cell.means("val_accuracy")
    assert first == 0.5
    assert math.isnan(second)
    assert [step for step, _ in mode_curves._points(cell)].count(2) == 0


def test_all_charts_are_drawn_by_epoch_from_1():
    cell = Cell("t", "nf4")
    values = {name: number / 8 for number, name in enumerate(mode_curves.CHARTS, start=1)}
    cell.ended["a"] = [values]
    found = [(s, p.value[0].tag, p.value[0].simple_value) for s, p in mode_curves._points(cell)]
    assert found == [
        (1, "modes/t/val_accuracy", 0.125),
        (1, "modes/t/val_loss", 0.25),
        (1, "modes/t/train_loss", 0.375),
        (1, "modes/t/grad_norm_mean", 0.5),
    ]


def test_a_title_names_what_else_differs_between_configurations():
    plan = [{**entry(seed=seed), "model": model} for seed, model in ((1, "a/b"), (2, "c"))]
    rates = [{**cell, "training": {"learning_rate": rate}} for cell in plan for rate in (1e-4, 0.5)]
    rates = [{**cell, "trial_id": str(number)} for number, cell in enumerate(rates)]
    assert [cell.title for cell in cells_of(rates).values()] == [
        "a_b · learning rate 0.0001",
        "a_b · learning rate 0.5",
        "c · learning rate 0.0001",
        "c · learning rate 0.5",
    ]


def test_a_layout_has_each_title_once_and_its_tags_as_they_are(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(mode_curves, "replace_run", lambda folder, found: written.append(found))
    monkeypatch.setattr(mode_curves, "custom_scalars", lambda layout: layout)
    mode_curves.write_study_run(tmp_path, [])
    mode_curves.write_study_run(tmp_path, [], ["t.1", "t.1"])
    assert [len(found) for found in written] == [1, 2]
    (layout,) = [layout for _, layout in written[1][1:]]
    assert list(layout) == ["t.1"]
    assert layout["t.1"]["training loss"] == ["Multiline", [r"^modes/t\.1/train_loss$"]]


def test_a_trial_that_failed_leaves_the_curve_of_its_mode(tmp_path):
    curves = ModeCurves(tmp_path, PLAN)
    report(curves, PLAN[1], 1, 0.5)
    trial = SimpleNamespace(config={"trial_id": PLAN[1]["trial_id"]})
    curves.on_trial_error(0, [], trial)
    assert curves._stale == {"nf4": None}
    cell = curves._cells[PLAN[1]["trial_id"]]
    assert (cell.running, cell.ended) == ({}, {})
    end(tmp_path, PLAN[1], [0.5])
    curves.on_trial_complete(0, [], trial)
    curves.on_step_end(0, [])
    running = SimpleNamespace(config={"trial_id": PLAN[3]["trial_id"]})
    curves.on_trial_result(0, [], running, row(1, 0.9))
    assert curves._stale == {}  # a trial of its mode has ended: there is nothing to write
