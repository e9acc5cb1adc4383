import io

import pytest
from ray import tune
from rich.console import Console

from search_spaces import grids
from tune_study.errors import UserError
from tune_study.search import settings as spaces
from tune_study.study import plan
from tune_study.study.options import Options
from tune_study.trial.context import RunContext


def context(tmp_path, **fields):
    return RunContext(study_dir=tmp_path / "study", **fields)


def test_the_full_grid_is_the_matrix_of_144_distinct_trials():
    trials = plan.plan(grids.full())
    assert len(trials) == 144
    assert len({trial.trial_id for trial in trials}) == 144
    assert len({trial.configuration for trial in trials}) == 12
    axes = {
        (t.model, t.dataset, t.lora.r, t.lora.lora_alpha, t.quantization.mode, t.seed)
        for t in trials
    }
    assert len(axes) == 144
    assert {(t.lora.r, t.lora.lora_alpha) for t in trials} == {(4, 8), (8, 16), (16, 32)}
    assert {t.seed for t in trials} == {42, 123, 456}
    training = trials[0].training
    assert (training.num_train_epochs, training.learning_rate) == (15, 1e-4)
    assert (training.weight_decay, training.warmup_steps, training.max_grad_norm) == (0.01, 100, 1)
    assert all(t.lora.lora_dropout == 0.1 and t.pretrained for t in trials)


def test_a_study_that_stops_early_has_compared_all_modes():
    trials = plan.plan(grids.full())
    first = trials[:4]
    assert [t.quantization.mode for t in first] == ["none", "int8", "nf4", "nf4-dq"]
    assert len({(t.configuration, t.seed) for t in first}) == 1
    assert len({t.configuration for t in trials[:48]}) == 12  # one seed of everything first


def test_every_axis_of_the_built_in_grids_is_a_grid_search():
    for grid in (grids.full, grids.demo, grids.smoke):
        space = grid()
        for axis in ("model", "dataset", "lora", "quantization", "seed"):
            assert set(space[axis]) == {"grid_search"}
    assert len(plan.plan(grids.demo())) == 24
    assert {t.quantization.mode for t in plan.plan(grids.smoke())} == set(grids.MODES)


def test_set_replaces_an_axis_and_equal_cells_become_one():
    trials = plan.plan(grids.full(), [("quantization.mode", "nf4"), ("seed", 1)])
    assert len(trials) == 12
    assert {t.quantization.mode for t in trials} == {"nf4"}


def test_a_grid_of_the_users_own(tmp_path):
    path = tmp_path / "my_grid.py"
    path.write_text(
        "from ray import tune\n"
        "def mine():\n"
        "    return {'model': 'vit_glyphs_patch4_32', 'dataset': 'digits',\n"
        "            'training': {'learning_rate': tune.grid_search([1e-3, 1e-4])}}\n"
        "def draws():\n"
        "    return {'model': 'm', 'dataset': 'digits', 'seed': tune.choice([1, 2])}\n"
        "def wrong():\n"
        "    return {'model': 'm', 'dataset': 'digits', 'lora': {'r': tune.grid_search([4, 0])}}\n"
        "def fails():\n"
        "    raise RuntimeError('oh no')\n"
        "def number():\n"
        "    return 3\n"
    )
    name, space = plan.load_grid(f"{path}:mine")
    assert name == "mine"
    assert [t.training.learning_rate for t in plan.plan(space)] == [1e-3, 1e-4]
    with pytest.raises(UserError, match=r"tune\.grid_search"):
        plan.plan(plan.load_grid(f"{path}:draws")[1])
    with pytest.raises(UserError, match=r"lora\.r = 0"):
        plan.plan(plan.load_grid(f"{path}:wrong")[1])
    for function, words in (("fails", "oh no"), ("number", "param_space"), ("none", "none")):
        with pytest.raises(UserError, match=words):
            plan.load_grid(f"{path}:{function}")


@pytest.mark.parametrize("grid", ["fulll", "MODES", "tune", "nowhere.py:f", ":f", ""])
def test_unknown_grids_are_refused(grid):
    with pytest.raises(UserError, match="--grid"):
        plan.load_grid(grid)


def test_grid_search_inside_a_nested_field():
    space = {
        "model": "m",
        "dataset": "digits",
        "training": {"learning_rate": tune.grid_search([0.1, 0.2])},
        "seed": tune.grid_search([1, 2]),
    }
    assert len(plan.plan(space)) == 4


def test_a_grids_values_are_not_copied_for_each_cell(counted):
    """Tune would copy all 30 for each of the 30 cells: planning would take the square of time."""
    models = tune.grid_search([counted(f"model-{number}") for number in range(30)])
    assert len(plan.plan({"model": models, "dataset": "digits", "seed": 42})) == 30
    assert counted.copies <= 2 * 30


def asked(**given):
    return plan.trials_of(Options(**given))


def test_a_command_without_a_grid_is_the_demo_and_the_first_n_of_it():
    settings, name, trials = asked()
    assert (settings, name, trials) == (None, "demo", plan.plan(grids.demo()))
    assert asked(max_experiments=5)[2] == trials[:5]
    assert asked(grid="smoke", set_=["lora.r=3"])[1] == "smoke"
    assert {t.lora.r for t in asked(grid="smoke", set_=["lora.r=3"])[2]} == {3}


def test_a_search_is_looked_at_by_the_largest_that_it_can_draw():
    settings, name, trials = asked(
        search="optuna", space="demo", num_samples=7, search_seed=3, objective=["val_accuracy"]
    )
    assert (name, settings.num_samples, settings.seed) == ("demo", 7, 3)
    assert (settings.objectives, settings.scheduler) == (("val_accuracy",), "fifo")
    assert trials == spaces.largest(spaces.probes(settings))


def test_trials_come_seed_by_seed_and_within_mode_by_mode():
    space = {
        "model": tune.grid_search(["b", "a"]),
        "dataset": "digits",
        "quantization": tune.grid_search(["nf4", "none"]),
        "seed": tune.grid_search([2, 1]),
    }
    assert [(t.seed, t.model, t.quantization.mode) for t in plan.plan(space)] == [
        (seed, model, mode) for seed in (2, 1) for model in "ba" for mode in ("nf4", "none")
    ]


def test_cells_are_counted_before_they_are_made(monkeypatch):
    cells = {"a": tune.grid_search([1, 2, 3]), "b": [tune.grid_search([1, 2])], "c": (1, "x")}
    assert plan._cells(cells) == 6
    assert plan._cells(tune.grid_search([tune.grid_search([1, 2]), 3])) == 3
    assert plan.MOST_TRIALS == 100_000
    monkeypatch.setattr(plan, "MOST_TRIALS", 3)
    seeds = {"model": "m", "dataset": "digits", "seed": tune.grid_search([1, 2, 3])}
    assert len(plan.plan(seeds)) == 3
    with pytest.raises(UserError, match="it has 4 cells, 3 are allowed"):
        plan.plan({**seeds, "seed": tune.grid_search([1, 2, 3, 4])})
    for wrong, words in (
        ({"seed": {"grid_search": []}}, "at least one value"),
        ({1: 2}, "must be text"),
        ({"seed": {"eval": "1"}}, "draws values"),
    ):
        with pytest.raises(UserError, match=words):
            plan._cells(wrong)


def test_the_note_on_the_compute_dtype_says_what_the_trials_compute_in(tmp_path, monkeypatch):
    trial = plan.plan({"model": "m", "dataset": "digits"})[0]
    reason = {"why": "it has no kernel"}
    monkeypatch.setattr("tune_study.study.compute_dtype.without_bf16", lambda device: reason["why"])

    def noted(**planned):
        output = Console(file=io.StringIO(), width=300)
        monkeypatch.setattr(plan.manifest, "planned_ids", lambda folder: planned.get("ids", ()))
        found = plan.with_compute_dtype(output, [trial], context(tmp_path))
        return found[0].training.compute_dtype, output.file.getvalue()

    assert noted() == (
        "fp32",
        "note: it has no kernel, so the trials compute in fp32; --set "
        "training.compute_dtype=bf16 overrides\n",
    )
    monkeypatch.setattr(plan.manifest, "settled_compute_dtype", lambda folder: "bf16")
    dtype, said = noted()
    assert dtype == "bf16"
    assert "the study in this folder computes in bf16" in said
    assert noted(ids={trial.trial_id}) == ("bf16", "")
    reason["why"] = None
    assert noted() == ("bf16", "")
