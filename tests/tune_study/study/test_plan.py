import pytest
from ray import tune

from search_spaces import grids
from tune_study.errors import UserError
from tune_study.study import plan
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
    assert len(plan.plan(grids.demo())) == 12
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


@pytest.fixture
def counted():
    """A class of text that counts its copies."""

    class Counted(str):
        copies = 0

        def __deepcopy__(self, memo):
            Counted.copies += 1
            return self

    return Counted


def test_a_grids_values_are_not_copied_for_each_cell(counted):
    """Tune would copy all 30 for each of the 30 cells: planning would take the square of time."""
    models = tune.grid_search([counted(f"model-{number}") for number in range(30)])
    assert len(plan.plan({"model": models, "dataset": "digits", "seed": 42})) == 30
    assert counted.copies <= 2 * 30
