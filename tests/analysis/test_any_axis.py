"""A grid over fields that no column was made for: configurations, pairs, names, one pairing."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ray import tune

from analysis import power, report
from analysis.figures.style import style, styles_of
from analysis.findings import decisions, findings
from analysis.load import Study, read_study
from analysis.measures import curves
from analysis.statistics import cells, pairs, planning, ratios
from analysis.statistics.comparison import compare_modes
from search_spaces import grids
from tests import synthetic
from tune_study.folder.results import axes
from tune_study.study import manifest, plan, session
from tune_study.trial import simulate
from tune_study.trial.context import RunContext, Simulation

RATES, SIZES, MODES, SEEDS = (1e-4, 3e-4, 1e-3), (32, 48), ("none", "int8", "nf4"), (1, 2, 3)
PLANTED = -0.03


def grid() -> dict[str, Any]:
    return {
        "model": "vit_glyphs_patch4_32",
        "dataset": "digits",
        "quantization": tune.grid_search(list(MODES)),
        "seed": tune.grid_search(list(SEEDS)),
        "data": {"image_size": tune.grid_search(list(SIZES))},
        "training": {"learning_rate": tune.grid_search(list(RATES)), "num_train_epochs": 4},
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("studies") / "any"
    simulation = Simulation(effects={"nf4": PLANTED})
    where = RunContext(study_dir=folder, simulation=simulation)
    trials = plan.plan(grid())
    assert len(trials) == 54
    manifest.open_study(trials, where, {"data": {}, "weights": {}}, grid="g", command="c")
    for trial in trials:
        simulate.execute(trial, simulation, folder, lambda row: None)
    session.collect(folder)
    return read_study(folder)


def test_every_setting_that_varies_is_a_column(study: Study) -> None:
    assert study.problems == []
    assert cells.varying(study.trials) == ["data.image_size", "training.learning_rate"]
    counted = study.trials.groupby(["training.learning_rate", "data.image_size"]).size()
    assert counted.to_dict() == {(rate, size): 9 for rate in RATES for size in SIZES}
    assert set(study.trials["configuration"]) == {
        f"image size {size} · learning rate {rate:g}" for rate in RATES for size in SIZES
    }


def test_the_planted_loss_is_found_over_six_configurations(study: Study) -> None:
    table = compare_modes(study.trials, rng=np.random.default_rng(0)).set_index("quantization")
    assert list(table["n_configurations"]) == [6, 6]
    assert list(table["n_pairs"]) == [18, 18]
    nf4 = table.loc["nf4"]
    assert nf4["ci_low"] < PLANTED < nf4["ci_high"] < 0
    assert not table["note"].str.contains("averaged").any()


def test_the_report_says_nothing_of_averages_and_names_what_varies(study: Study) -> None:
    assert study.path is not None
    text = report.write_report(study.path).with_name("report.md").read_text()
    assert "averaged:" not in text
    assert "were averaged" not in text
    assert "image size 48 · learning rate 0.001" in text
    assert "6 configurations, 18 pairs" in text


def test_all_chapters_stand_on_the_same_pairs(study: Study) -> None:
    """One number a quantity, whoever asks for it."""
    trials, found = study.trials, findings.compute(study)
    own = slow_pairs(trials)
    means = own.groupby(["quantization", "training.learning_rate", "data.image_size"]).mean(
        numeric_only=True
    )
    for row in found.comparison.to_dict("records"):
        mine = means.loc[row["quantization"]]
        assert row["mean_difference"] == pytest.approx(mine["difference"].mean())
        assert row["n_pairs"] == len(own) / 2
    for row in found.differences.to_dict("records"):
        key = (row["quantization"], row["training.learning_rate"], row["data.image_size"])
        assert row["difference"] == pytest.approx(means.loc[key, "difference"])
    ours = found.ours[found.ours["quantity"] == "score ratio"].set_index("quantization")
    for mode in MODES[1:]:
        logs = own[own["quantization"] == mode].assign(log=lambda t: np.log(t["value"] / t["base"]))
        by_unit = logs.groupby(["training.learning_rate", "data.image_size"])["log"].mean()
        assert ours.loc[mode, "ratio"] == pytest.approx(math.exp(by_unit.mean()))
        assert ours.loc[mode, "n_configurations"] == 6
        left_out = found.leave_one_out[found.leave_one_out["quantization"] == mode]
        expected = [by_all.drop(key).mean() for by_all, key in _each(means.loc[mode, "difference"])]
        assert sorted(left_out["mean_difference"]) == pytest.approx(sorted(expected))
        row = found.comparison.set_index("quantization", drop=False).loc[mode].to_dict()
        told = decisions.in_words(trials, row, 0.02)
        assert f"{abs(means.loc[mode, 'difference'].mean()) * 100:.2f} pp" in told
    spread = power.spread_of(trials)
    assert spread.n_configurations == 6
    within = own.groupby(["quantization", "training.learning_rate", "data.image_size"])
    assert 2 * spread.seed_sd**2 == pytest.approx(within["difference"].var().mean())
    assert planning.more_needed(trials, "nf4", 0.5).note == ""
    means_per_mode = found.cells.groupby("quantization")["mean"].mean()
    wide = pairs.cell_means(trials)
    assert [wide[mode].mean() for mode in MODES] == pytest.approx(
        [means_per_mode[mode] for mode in MODES]
    )


def _each(values: pd.Series) -> list[tuple[pd.Series, Any]]:
    return [(values, key) for key in values.index]


def slow_pairs(trials: pd.DataFrame) -> pd.DataFrame:
    """Every quantized trial and the one of mode none that agrees with it in all else."""
    rows = []
    keys = ("training.learning_rate", "data.image_size", "seed")
    records = trials.to_dict("records")
    for ours in records:
        for base in records:
            alike = all(ours[key] == base[key] for key in keys)
            if alike and base["quantization"] == "none" != ours["quantization"]:
                value, other = ours["test_accuracy"], base["test_accuracy"]
                named = {key: ours[key] for key in (*keys, "quantization")}
                rows.append({**named, "base": other, "value": value, "difference": value - other})
    return pd.DataFrame(rows)


def test_curves_are_paired_like_everything_else(study: Study) -> None:
    gaps = curves.curve_gaps(study.epochs, study.trials)
    last = study.epochs[study.epochs["epoch"] == 4].set_index("trial_id")["val_accuracy"]
    own = slow_pairs(study.trials.assign(test_accuracy=study.trials["trial_id"].map(last)))
    for row in gaps[gaps["epoch"] == 4].to_dict("records"):
        mine = own.loc[own["quantization"] == row["quantization"], "difference"]
        assert (row["n"], row["mean"]) == (18, pytest.approx(mine.mean()))


def test_a_trial_that_is_there_twice_is_averaged_in_every_chapter(study: Study) -> None:
    """Above all the baseline: one chapter took its mean, another its first."""
    trials = study.trials
    again = trials[(trials["seed"] == 1) & (trials["quantization"] == "none")]
    again = again.assign(
        trial_id=again["trial_id"] + "-b", test_accuracy=again["test_accuracy"] / 2
    )
    both = pd.concat([trials, again], ignore_index=True)
    halved = trials.assign(
        test_accuracy=trials["test_accuracy"].where(
            ~trials["trial_id"].isin(again["trial_id"].str[:-2]), trials["test_accuracy"] * 0.75
        )
    )
    for table in (pairs.paired_differences, ratios.our_ratios):
        pd.testing.assert_frame_equal(table(both), table(halved))
    assert "6 trial(s) repeat" in compare_modes(both)["note"].iloc[0]


def test_a_table_of_an_earlier_version_reads_as_it_did(study: Study, tmp_path: Any) -> None:
    """It had no column for a setting, and the mode alone under quantization."""
    assert study.path is not None
    (tmp_path / "study.json").write_text((study.path / "study.json").read_text())
    late = [name for name in study.trials if "." in name or name in ("configuration", "pretrained")]
    study.trials.drop(columns=late).to_csv(tmp_path / "trials.csv", index=False)
    study.epochs.to_csv(tmp_path / "epochs.csv", index=False)
    read = read_study(tmp_path)
    pd.testing.assert_frame_equal(read.trials, study.trials)
    document = json.loads((tmp_path / "study.json").read_text())
    for cell in document["plan"]:
        del cell["training"]["gradient_checkpointing"]  # joined later
    (tmp_path / "study.json").write_text(json.dumps(document))
    pd.testing.assert_frame_equal(read_study(tmp_path).trials, study.trials)


def test_a_table_that_is_not_of_its_plan_is_not_used(study: Study, tmp_path: Any) -> None:
    assert study.path is not None
    (tmp_path / "study.json").write_text((study.path / "study.json").read_text())
    study.epochs.to_csv(tmp_path / "epochs.csv", index=False)
    rate = study.trials["training.learning_rate"] * 2
    edited = study.trials.assign(**{"training.learning_rate": rate})
    edited.to_csv(tmp_path / "trials.csv", index=False)
    read = read_study(tmp_path)
    assert any("their training.learning_rate differs" in problem for problem in read.problems)
    assert (read.trials["status"] == "pending").all()


def test_every_setting_of_one_mode_is_a_treatment_with_a_row_of_its_own() -> None:
    trials = plan.plan(grids.sensitivity())
    simulation = Simulation(effects={"nf4": PLANTED})
    rows = []
    for trial in trials:
        told = axes({"trial_id": trial.trial_id, **trial.model_dump(mode="json")})
        accuracy = simulate.draw(trial, simulation)[1]
        rows.append({**told, "status": "completed", "test_accuracy": accuracy})
    table = pd.DataFrame(rows)
    found = compare_modes(table)
    assert list(found["n_pairs"]) == [3] * 13
    assert list(found["quantization"])[:3] == [
        "nf4",
        "nf4 without blocks 1-11",
        "nf4 without blocks 0, 2-11",
    ]
    assert found["mean_difference"].nunique() == 13
    with styles_of(cells.modes_of(table["quantization"])):
        looks = [style(name) for name in cells.modes_of(table["quantization"])]
    assert len({look[0] for look in looks}) == 14
    assert len({(look[1], str(look[2])) for look in looks}) == 14
    assert style("nf4") == looks[1]


@pytest.mark.parametrize("name", power.GRIDS)
def test_power_counts_configurations_as_a_plan_does(name: str) -> None:
    trials = plan.plan(getattr(grids, name)())
    assert power.GRIDS[name] == len({trial.configuration for trial in trials})


def test_settings_of_a_later_version_in_which_trials_differ_are_named(tmp_path: Any) -> None:
    cells = synthetic.plan(models=("m",), datasets=("d",), lora=((4, 8),), seeds=(1,))
    for number, cell in enumerate(cells):
        cell["lora"] |= {"use_magic": number % 2 == 0, "constant": 3}
    problems = read_study(synthetic.write_study(tmp_path / "s", cells)).problems
    assert len(problems) == 1
    assert "('lora.use_magic')" in problems[0]
