import math

import numpy as np
import pytest
from ray import tune

from analysis.load import rebuild
from analysis.statistics.comparison import compare_modes
from analysis.statistics.dependence import axis_effects
from search_spaces import grids
from tune_study.config import assign, parse_assignment, parse_trial
from tune_study.errors import UserError
from tune_study.folder.files import read_json
from tune_study.folder.results import read_results
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


RATE = "training.learning_rate"


def test_an_effect_is_planted_at_its_level_alone(tiny):
    """Added to the mode's own, whatever way the level was written, and never in another mode."""
    keys = dict(map(parse_effect, ["nf4=-0.01", f"nf4=-0.02@{RATE}=1e-2", "int8=0.5@lora.r=64"]))
    assert keys == {"nf4": -0.01, f"nf4@{RATE}=0.01": -0.02, "int8@lora.r=64": 0.5}
    planted = Simulation(effects=keys)
    trials = {
        (mode, rate): tiny(mode, training={"learning_rate": rate})
        for mode in ("none", "nf4", "int8")
        for rate in (0.001, 0.01)
    }
    found = {key: planted.effect(trial) for key, trial in trials.items()}
    expected = dict.fromkeys(found, 0.0)
    expected |= {("nf4", 0.001): -0.01, ("nf4", 0.01): pytest.approx(-0.03)}
    assert found == expected
    moved = [simulate.draw(trials["nf4", 0.01], s)[1] for s in (planted, Simulation())]
    assert moved[0] - moved[1] == pytest.approx(-0.03)
    assert planted.of_no_trial(list(trials.values())) == ["int8@lora.r=64"]
    assert planted.of_no_trial([trials["nf4", 0.001]]) == [f"nf4@{RATE}=0.01", "int8@lora.r=64"]


def test_a_cost_planted_by_level_is_found_on_its_axis_alone(tmp_path):
    """54 trials: three learning rates, two image sizes, three modes, three seeds."""
    space = {
        "model": "deit_tiny_patch16_224",
        "dataset": "cifar10",
        "quantization": tune.grid_search(["none", "int8", "nf4"]),
        "data": {"image_size": tune.grid_search([160, 224])},
        "training": {"learning_rate": tune.grid_search([1e-4, 1e-3, 1e-2]), "num_train_epochs": 2},
        "seed": tune.grid_search([42, 123, 456]),
    }
    effects = ["nf4=-0.03", f"nf4=-0.03@{RATE}=0.001", f"nf4=-0.06@{RATE}=0.01"]
    trials = plan.plan(space)
    assert len(trials) == 54
    planted = Simulation(effects=dict(map(parse_effect, effects)))
    tests = axis_effects(simulated(trials, tmp_path / "s", planted).trials).tests
    found = tests.set_index(["axis", "quantization"])
    verdicts = found["verdict"].to_dict()
    assert verdicts.pop(("learning rate", "nf4")) == "depends"
    assert len(verdicts) == 3
    assert "depends" not in verdicts.values()
    slope = found.loc[("learning rate", "nf4")]
    assert slope["ci_low"] < -0.03 < slope["ci_high"]  # per tenfold


@pytest.mark.parametrize(
    ("field", "value", "other"),
    [
        ("dataset", "digits", "cifar10"),
        ("pretrained", "false", "true"),
        ("data.image_size", "null", "64"),
        ("training.weight_decay", "0", "0.5"),
    ],
)
def test_a_level_is_of_any_kind(tiny, field, value, other):
    trial = assigned(tiny("nf4"), field, value)
    planted = [Simulation(effects=dict([parse_effect(f"nf4=0.1@{field}={own}")]))
               for own in (value, other)]  # fmt: skip
    assert [one.effect(trial) for one in planted] == [0.1, 0.0]


def assigned(trial, field, value):
    _, parsed = parse_assignment(f"{field}={value}")
    return parse_trial(assign(trial.model_dump(mode="json"), field, parsed))


@pytest.mark.parametrize(
    ("level", "word"),
    [
        ("", "FIELD=VALUE"),
        ("training.learning_rate", "FIELD=VALUE"),
        ("learning_rate=0.1", "did you mean training.learning_rate"),
        ("seed=1", "no axis"),
        ("quantization=nf4", "no axis"),
        ("quantization.mode=nf4", "no axis"),
        ("lora.r=.inf", "no trial can have"),
        ("lora.r=2020-01-01", "no trial can have"),
        ("lora.r=[", "not valid YAML"),
    ],
)
def test_a_level_that_no_axis_has_is_refused(level, word):
    with pytest.raises(UserError, match="--effect") as refused:
        parse_effect(f"nf4=-0.1@{level}")
    assert word in str(refused.value)


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


@pytest.mark.parametrize(("mode", "effect"), [("none", 0), ("nf4", -0.104), ("fp4", -0.004)])
def test_every_number_of_a_drawn_trial_is_that_of_the_model(tiny, monkeypatch, mode, effect):
    """The draws are planted: one size for each of the model's terms."""
    draws = {"configuration": 1.0, "interaction": -2.0, "seed": 3.0, "trial": -1.0, "epoch": 2.0}
    monkeypatch.setattr(simulate, "_normal", lambda kind, *names: draws[kind])
    config = tiny(mode, training={"num_train_epochs": 3})
    planted = Simulation(effects={"nf4": -0.1, "int8": -0.5}, seed_sd=0.01)
    rows, test = simulate.draw(config, planted)
    accuracy = 0.9 + 0.02 + 0.03 - 0.01 + effect
    assert test == pytest.approx(accuracy)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        val = accuracy * (1 - math.exp(-row["epoch"] / 2)) + 0.1 * 0.01 * 2
        assert row["val_accuracy"] == pytest.approx(val)
        assert row["train_loss"] == pytest.approx(0.9 * (1 - val) + 0.1)
        assert row["train_accuracy"] == pytest.approx(val + 0.01)
        assert row["val_loss"] == pytest.approx(1.1 - val)
        assert row["learning_rate"] == 1e-3
        assert math.isnan(row["images_per_s"])


def test_an_accuracy_stays_a_share(tiny, monkeypatch):
    for size, share in ((1e3, 1.0), (-1e3, 0.0)):
        monkeypatch.setattr(simulate, "_normal", lambda *_, size=size: size)
        rows, test = simulate.draw(tiny("none"), Simulation())
        assert test == share
        assert {row["val_accuracy"] for row in rows} == {share}
        assert max(row["train_accuracy"] for row in rows) == pytest.approx(min(1, share + 0.01))


def test_draws_are_standard_normal_and_the_same_on_every_machine():
    drawn = [simulate._normal("a", n) for n in range(2000)]
    assert abs(np.mean(drawn)) < 0.1
    assert np.std(drawn) == pytest.approx(1, abs=0.1)
    assert simulate._normal("seed", "x", 1) == simulate._normal("seed", "x", 1)
    assert simulate._normal("seed", "x", 1) != simulate._normal("seed", "x", 2)


def test_a_drawn_trial_is_reported_and_written(tiny, tmp_path, monkeypatch):
    config = tiny("nf4", training={"num_train_epochs": 3})
    curve = iter([0.2, 0.6, 0.4] * 3)
    rows = [{"epoch": n, "val_accuracy": next(curve)} for n in (1, 2, 3)]
    monkeypatch.setattr(simulate, "draw", lambda *_: (rows, 0.55))
    waits, reported = [], []
    monkeypatch.setattr(simulate.time, "sleep", waits.append)
    folder = tmp_path / "deep" / "study"
    for _ in range(2):  # again, as after a restart
        simulate.execute(config, PLANTED, folder, reported.append, 2.5)
    assert waits == [2.5] * 6
    assert [row["best_val_accuracy"] for row in reported] == [0.2, 0.6, 0.6] * 2
    found = read_json(folder / config.trial_id / "results.json")
    assert found == read_results(folder, config.trial_id)
    train = found["train"]
    assert train["training_results"] == {
        "epochs_completed": 3,
        "best_epoch": 2,
        "val_accuracy": 0.6,
    }
    assert train["test_metrics"] == {"test_accuracy": 0.55}
    assert (found["status"], found["simulated"], found["error"]) == ("completed", True, None)
    assert found["run"]["simulation"]["effects"] == {"nf4": -0.01}
    model = train["model_metrics"]
    assert model["num_classes"] == 10
    assert model["weights_bytes_fp32"] == 2 * model["weights_bytes_16bit"]
    assert model["weights_bytes"] < model["weights_bytes_16bit"]
    ended = simulate.results_of(config, PLANTED, epochs=1)["train"]
    assert ended["training_results"]["epochs_completed"] == len(ended["epochs"]) == 1
    assert ended["training_results"]["val_accuracy"] == 0.2
    assert ended["test_metrics"] == {}


@pytest.mark.parametrize("text", ["nf4=1", "nf4=-1", "nf4=inf", "=0.1"])
def test_an_effect_is_less_than_all(text):
    with pytest.raises(UserError, match="between -1 and 1"):
        parse_effect(text)


def test_an_effect_may_be_almost_all_or_nothing():
    assert parse_effect("int8=0.999") == ("int8", 0.999)
    assert parse_effect("fp4=0") == ("fp4", 0.0)


def test_where_a_trial_runs_unless_told(tmp_path):
    where = RunContext(study_dir=tmp_path).model_dump(exclude={"study_dir"})
    assert where == {
        "data_dir": None,
        "cache_dir": None,
        "leave_out_broken": False,
        "weights": None,
        "code": None,
        "device": "cpu",
        "num_threads": 1,
        "trials_on_device": 1,
        "simulation": None,
        "keep_checkpoints": "best",
        "storage": None,
        "on_cluster": False,
        "epoch_s": 0.0,
    }
    assert Simulation().model_dump() == {"effects": {}, "seed_sd": 0.004}
