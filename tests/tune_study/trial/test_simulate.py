import numpy as np
import pytest

from analysis.load import rebuild
from analysis.statistics.comparison import compare_modes
from search_spaces import grids
from tune_study.errors import UserError
from tune_study.study import manifest, plan
from tune_study.trial import simulate
from tune_study.trial.context import RunContext, Simulation, parse_effect

PLANTED = Simulation(effects={"nf4": -0.01})


def simulated(trials, folder, simulation=PLANTED):
    where = RunContext(study_dir=folder, simulation=simulation)
    manifest.open_study(trials, where, {"data": {}, "weights": {}}, grid="g", command="c")
    for trial in trials:
        simulate.execute(trial, simulation, folder, lambda row: None)
    return rebuild(folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return simulated(plan.plan(grids.full()), tmp_path_factory.mktemp("simulated"))


def test_every_row_says_simulated(full):
    assert len(full.trials) == 144
    assert full.trials["simulated"].all()
    assert full.manifest["simulated"] is True
    assert len(full.epochs) == 144 * 15
    assert not full.problems


def test_the_planted_effect_is_recovered_and_the_others_are_not_called_none(full):
    table = compare_modes(full.trials, rng=np.random.default_rng(0)).set_index("quantization")
    nf4 = table.loc["nf4"]
    assert nf4["ci_low"] < -0.01 < nf4["ci_high"]
    assert nf4["ci_high"] < 0
    assert table.loc["nf4-dq", "verdict"] in ("equivalent", "not inferior", "undecided")


def test_draws_depend_on_names_alone():
    trials = plan.plan(grids.full())
    forwards = [simulate.draw(trial, PLANTED) for trial in trials[:8]]
    backwards = [simulate.draw(trial, PLANTED) for trial in reversed(trials[:8])]
    assert repr(forwards) == repr(backwards[::-1])
    assert len({test for _, test in forwards}) == 8


def test_the_model_is_the_documented_one():
    trials = plan.plan(grids.full())
    nothing = Simulation(effects={}, seed_sd=0.01)
    planted = Simulation(effects={"nf4": -0.05}, seed_sd=0.01)
    for trial in trials[:16]:
        shift = simulate.draw(trial, planted)[1] - simulate.draw(trial, nothing)[1]
        expected = -0.05 if trial.quantization.mode == "nf4" else 0.0
        assert shift == pytest.approx(expected, abs=1e-12)
    spread = [
        np.std([simulate.draw(t, Simulation(seed_sd=sd))[1] for t in trials if t.lora.r == 4])
        for sd in (0.0, 0.05)
    ]
    assert spread[1] > spread[0] > 0


def test_simulated_and_real_trials_are_never_mixed(tmp_path):
    trials = plan.plan(grids.smoke())
    simulated(trials, tmp_path / "s")
    checksums = {"data": {}, "weights": {}}
    for other in (None, Simulation(effects={"nf4": -0.02})):
        where = RunContext(study_dir=tmp_path / "s", simulation=other)
        with pytest.raises(UserError, match="simulated"):
            manifest.open_study(trials, where, checksums, grid="g", command="c")


@pytest.mark.parametrize("text", ["nf4", "nf4=", "none=-0.1", "nf5=-0.1", "nf4=nan", "nf4=2", "="])
def test_effects_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="--effect"):
        parse_effect(text)
    assert parse_effect("nf4-dq=-0.01") == ("nf4-dq", -0.01)
