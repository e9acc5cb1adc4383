"""What the report says of a search: Pareto set, hypervolume, importances, and no comparison."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import report
from analysis.chapters.page import make_page
from analysis.chapters.search import section
from analysis.figures import gallery
from analysis.figures.search import KEYS
from analysis.findings import findings
from analysis.load import read_study
from analysis.measures import pareto, search
from tests.analysis.figures.test_figures import (
    test_no_text_is_cut_off_or_covers_another as check_texts,
)
from tests.tune_study.search.test_suggestions import drive, opened, settings
from tune_study.search.suggestions import finish
from tune_study.study import manifest, session
from tune_study.trial.context import RunContext

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def slow_hypervolume(points, reference):
    """Unit squares counted one by one: a square counts when a point is at its lower left."""
    return sum(
        any(x <= column and y <= row for x, y in points)
        for column in range(reference[0])
        for row in range(reference[1])
    )


@given(POINTS)
def test_hypervolume_counts_the_squares_that_are_dominated(points):
    for reference in ((7, 7), (4, 5)):
        found = pareto.hypervolume(np.array(points, dtype=float), reference)
        assert found == slow_hypervolume(points, reference)


@given(POINTS)
def test_the_pareto_set_is_what_nothing_beats(points):
    expected = [
        not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in points)
        for mine in points
    ]
    assert list(pareto.pareto(np.array(points, dtype=float))) == expected


def test_one_objective_has_the_best_as_its_set():
    assert list(pareto.pareto(np.array([[3.0], [1.0], [2.0], [1.0]]))) == [
        False,
        True,
        False,
        True,
    ]


def test_times_are_searched_among_trials_with_as_many_beside_them():
    trials = pd.DataFrame({"trial_id": list("abcdef"), "trials_on_device": [1, 8, pd.NA, 8, 1, 8]})
    found = trials[["trial_id"]].assign(train_time_s=[1.0, 5.0, 1.0, 6.0, 1.0, 7.0])

    def left(found, trials, *objectives):
        alike = search._alike(found, trials, objectives)
        assert list(alike.index) == list(range(len(alike)))
        return "".join(alike["trial_id"])

    assert left(found, trials, "val_accuracy", "train_time_s") == "bdf"
    assert left(found, trials, "val_accuracy", "weights_bytes") == "abcdef"
    assert left(found, trials.drop(columns="trials_on_device"), "train_time_s") == "abcdef"
    assert left(found, trials.assign(trials_on_device=pd.NA), "train_time_s") == "abcdef"
    assert left(found.iloc[:0], trials, "train_time_s") == ""


def test_the_chapter_says_what_was_left_out(folder):
    found = search.searched(read_study(folder))
    trials = read_study(folder).trials
    assert not any("left out" in text for text in section(found, trials).paragraphs)
    told = section(found._replace(left_out=3), trials).paragraphs[2]
    assert told.startswith("3 trials ran with more or fewer trials on the device than most did.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    wanted = opened(folder, settings(num_samples=14))
    drive(wanted)
    finish(wanted)
    session.collect(folder)
    return folder


def test_a_search_is_read_with_its_front_and_its_progress(folder):
    found = search.searched(read_study(folder))
    assert found is not None
    assert found.objectives == {"val_accuracy": "maximize", "weights_bytes": "minimize"}
    assert len(found.trials) == 14
    front = found.trials[found.trials["on_front"]]
    assert found.trials["val_accuracy"].max() in set(front["val_accuracy"])
    assert found.trials["weights_bytes"].min() in set(front["weights_bytes"])
    values = found.progress["value"]
    assert (values.diff().dropna() >= 0).all()
    assert 0 < values.iloc[-1] <= 1
    assert set(found.importances["objective"]) == set(found.objectives)
    top = found.importances.sort_values("importance").groupby("objective")["parameter"].last()
    assert top["weights_bytes"] in ("quantization.mode", "quantization.skip_layers/name")
    skip = found.importances["parameter"] == "quantization.skip_layers/name"
    assert (found.importances.loc[skip, "trials"] < 14).all()


def test_the_report_shows_the_search_and_compares_no_modes(folder):
    path = report.write_report(folder)
    html, text = path.read_text(), (path.parent / "report.md").read_text()
    for words in ("The Pareto set", "Hypervolume over the trials", "What mattered"):
        assert words in html
        assert words in text
    assert "UNFINISHED" not in html
    assert "foreign" not in html
    for words in ("accuracy against none", "QLoRA's", "intervals are over configurations"):
        assert words not in html
    for key in ("search_front", "search_progress", "search_importance"):
        assert (path.parent / "figures" / f"{key}.png").is_file()
    assert not (path.parent / "figures" / "accuracy_difference.png").exists()
    assert (path.parent / "tables" / "pareto_set.tex").is_file()
    found = findings.compute(read_study(folder))
    assert found.search is not None
    assert not found.comparison["mean_difference"].notna().any()
    best = found.search.trials["val_accuracy"].idxmax()
    number = found.search.trials.loc[best, "number"]
    assert found.decisions[0].answer.startswith(f"trial {number}: ")
    assert not any(line.decided for line in found.decisions)


@pytest.mark.parametrize("key", KEYS)
def test_its_figures_are_readable(folder, key):
    found = findings.compute(read_study(folder))
    evil = "lora." + "$x_" * 60
    table = found.search.importances
    table.loc[table["parameter"] == "lora.r", "parameter"] = evil
    check_texts(key, gallery.draw_all(found))


def test_names_from_a_stranger_stay_on_one_line(folder):
    found = findings.compute(read_study(folder))
    for params in found.search.parameters.values():
        params["evil\u202ename"] = "a\nb" * 50
    page = make_page(found)
    cells = [*page.glance.columns, *(cell for row in page.glance.rows for cell in row)]
    assert all(text.isprintable() for text in cells)


def test_trials_of_one_rank_and_seed_are_no_pairs(tmp_path):
    """They differ in learning rate and more, though the configuration's columns are equal."""
    fixed = [("training.num_train_epochs", 2), ("lora.r", 8), ("lora.lora_alpha", 16)]
    drive(opened(tmp_path, settings(num_samples=8, assignments=fixed)))
    found = findings.compute(read_study(tmp_path))
    assert {"none", "nf4"} <= set(found.study.trials["quantization"])
    assert not found.comparison["mean_difference"].notna().any()
    assert found.differences.empty
    assert found.seed_spread.empty


def test_an_unfinished_search_says_what_is_missing(tmp_path):
    drive(opened(tmp_path, settings(num_samples=9)), stop_after=4, kill=True)
    session.collect(tmp_path)
    html = report.write_report(tmp_path).read_text()
    assert "UNFINISHED. 3 of 9 trials have ended, 6 are still to run" in html
    assert "is not known: the search has not ended yet" in html


def test_a_search_without_a_finished_trial_has_a_report(tmp_path):
    opened(tmp_path, settings(num_samples=2))
    session.collect(tmp_path)
    html = report.write_report(tmp_path).read_text()
    assert "no trial ended well" in html


def test_a_grid_has_no_chapter_on_a_search(tiny, tmp_path):
    where = RunContext(study_dir=tmp_path / "grid")
    checksums = {"data": {}, "weights": {}}
    manifest.open_study([tiny("none")], where, checksums, grid="g", command="c")
    assert search.searched(read_study(tmp_path / "grid")) is None
    assert "The search" not in report.write_report(tmp_path / "grid").read_text()


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"objectives": "val_accuracy"},
        {"objectives": [{"name": "model", "direction": "maximize"}]},
        {"objectives": [{"name": "val_accuracy", "direction": "up"}]},
        {"objectives": [{"name": "val_accuracy", "direction": "maximize"}], "params": [1]},
    ],
)
def test_a_strangers_record_does_no_harm(folder, record):
    read = read_study(folder)
    read.manifest["search"] = record
    found = search.searched(read)
    assert found is None or found.parameters == {}


def test_a_broken_search_json_is_named(folder, tmp_path):
    read = read_study(folder)._replace(path=tmp_path)
    for content in ("{", "[]", json.dumps({"importances": {"val_accuracy": [{"parameter": 1}]}})):
        (tmp_path / "search.json").write_text(content)
        found = search.searched(read)
        assert found is not None
        assert found.importances.empty
        assert set(found.unavailable) == set(found.objectives)
