"""Whatever is typed, or written into a grid, is a valid object or refused in one sentence of ours.

No traceback, no hang, and no code of a value's runs.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray import tune

from analysis import power
from analysis.literature import claims
from tests.fuzz import hostile
from tests.fuzz.hostile import (
    ARGUMENT,
    SCALARS,
    TEXT,
    TRIAL,
    VALUES,
    YAML,
    damaged,
    fuzz,
    mutated,
    outcome,
)
from tune_study import run
from tune_study.config import assign, field_names, parse_assignment, parse_trial
from tune_study.errors import UserError
from tune_study.study import options, plan
from tune_study.trial.context import Simulation, parse_effect

# ---- a trial


@fuzz(300)
@given(
    mutated(TRIAL, VALUES)
    | st.dictionaries(TEXT | st.sampled_from(list(TRIAL)), VALUES)
    | st.builds(lambda m, d: {**TRIAL, "model": m, "dataset": f"folder:{d}"}, TEXT, TEXT)
)
def test_a_configuration_is_a_trial_with_a_safe_id_or_refused(values):
    trial = outcome(lambda: parse_trial(values), UserError)
    if trial is not None:
        name = trial.trial_id
        assert Path(name).name == name
        assert not name.startswith(".")
        assert name.isascii()
        assert name.isprintable()
        assert len(name) <= 255
        stored = json.loads(json.dumps(trial.model_dump(mode="json")))
        assert parse_trial(stored).trial_id == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora.target_modules", "a{9999999999}"),
        ("lora.target_modules", "(" * 2000),
        ("seed", 10**5000),
        ("training.num_train_epochs", -(10**5000)),
    ],
    ids=["repeats", "depth", "seed", "epochs"],
)
def test_a_value_that_python_itself_gives_up_on_is_refused(field, value):
    with pytest.raises(UserError, match=field):
        parse_trial(assign(TRIAL, field, value))


@fuzz(120)
@given(
    TEXT
    | st.builds(
        "{}={}".format,
        st.sampled_from([*field_names(), "quantization", "lora", "training.x"]),
        st.sampled_from(YAML) | TEXT | hostile.JSON.map(json.dumps),
    )
)
def test_an_assignment_is_a_value_or_refused(text):
    pair = outcome(lambda: parse_assignment(text), UserError)
    if pair is not None:
        outcome(lambda: parse_trial(assign(TRIAL, *pair)), UserError)
    assert not Path("ran").exists()


# ---- a grid

AXES = st.recursive(
    SCALARS | st.sampled_from([tune.choice([1]), tune.choice([]), tune.sample_from(lambda _: 1)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.integers(), inner, max_size=3)
        | (st.lists(inner, max_size=3) | inner).map(tune.grid_search)
        | inner.map(lambda value: {"eval": value})
    ),
    max_leaves=8,
)


@fuzz(200)
@given(mutated(TRIAL, AXES) | st.dictionaries(TEXT | st.sampled_from(list(TRIAL)), AXES))
def test_a_grid_is_a_plan_or_refused(space):
    trials = outcome(lambda: plan.plan(space), UserError)
    if trials is not None:
        assert len({trial.trial_id for trial in trials}) == len(trials) >= 1
        assert "Categorical" not in repr(space)  # what is drawn can't be planned


def test_a_grid_of_a_billion_cells_is_refused_before_it_is_made():
    axes = {f"data.{size}": list(range(1, 1001)) for size in ("train_size", "val_size")}
    space = {**TRIAL, "data": {k.split(".")[1]: tune.grid_search(v) for k, v in axes.items()}}
    space["seed"] = tune.grid_search(list(range(1000)))
    with pytest.raises(UserError, match="--grid"):
        plan.plan(space)


SOURCES = [
    "def one(:", "one = 1", "def one(): return [1]", "def one(x): return {}", "raise SystemExit(0)",
    "import sys\ndef one(): sys.exit()", "\0", "def one(): return {'model': 'm'}", "one = dict",
    "def one(): return one()", "import nothing_of_this_name", "raise KeyError", "one = []",
]  # fmt: skip


@fuzz(100)
@given(
    source=(st.sampled_from(SOURCES) | TEXT).map(lambda text: text.encode(errors="replace"))
    | damaged(b"def one():\n    return {'model': 'm', 'dataset': 'digits'}\n"),
    file=st.sampled_from(["grid.py", "grid.txt", "grid", "grid.so", "é.py", "folder.py"]),
    function=st.sampled_from(["one", "", "__name__", "\0", "a.b"]),
)
def test_a_grid_file_is_a_space_or_refused(tmp_path, source, file, function):
    (tmp_path / "folder.py").mkdir(exist_ok=True)
    if file != "folder.py":
        (tmp_path / file).write_bytes(source)
    grid = f"{tmp_path / file}:{function}"
    found = outcome(lambda: plan.load_grid(grid), UserError)
    assert found is None or isinstance(found[1], dict)


@fuzz(100)
@given(TEXT | st.builds("{}:{}".format, TEXT, TEXT))
def test_the_name_of_a_grid_is_found_or_refused(name):
    outcome(lambda: plan.load_grid(name), UserError)


# ---- the literature

LITERATURE = {
    "sources": {"a2020b": {"authors": "A", "title": "T", "year": 2020, "arxiv": None}},
    "tables": [
        {
            "id": "t1", "domain": "language", "group": "g", "chance": 25.0, "source": "a2020b",
            "table": "1", "grade": "checked", "task": "t", "dataset": "d", "metric": "accuracy",
            "unit": "percent", "higher_is_better": True, "models": ["m", "n"], "note": "",
            "rows": [
                {"method": "x", "quantization": "none", "dtype": "bf16", "values": [50, 60]},
                {"method": "y", "quantization": "nf4", "dtype": "nf4", "baseline": "x",
                 "values": [49.5, None]},
            ],
        }
    ],
    "empty": [{"source": "a2020b", "quantization": "int8", "why": "not printed"}],
}  # fmt: skip


@fuzz(60)
@given(data=st.data())
def test_a_literature_file_is_claims_or_refused(tmp_path, data):
    text = yaml.safe_dump(LITERATURE, allow_unicode=True)
    mutants = mutated(LITERATURE).map(yaml.safe_dump) | st.sampled_from(YAML)
    path = tmp_path / "l.yaml"
    path.write_bytes(
        data.draw(mutants.map(lambda t: t.encode(errors="replace")) | damaged(text.encode()))
    )
    found = outcome(lambda: claims.load(path), claims.LiteratureError)
    if found is not None:
        claims.reference_ratios(found, source="a2020b")


def test_a_missing_literature_file_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(claims.LiteratureError):
            claims.load(path)


# ---- options


SIZES = [
    "effect",
    "margin",
    "configuration-sd",
    "seed-sd",
    "modes",
    "power",
    "simulations",
    "configurations",
    "grid",
]


@fuzz(40)
@given(st.dictionaries(st.sampled_from(SIZES), ARGUMENT, min_size=1, max_size=3))
def test_options_of_the_power_table_are_used_or_refused(options):
    small = {"simulations": "100", **options}
    arguments = [f"--{name}={value}" for name, value in small.items()]
    with contextlib.suppress(SystemExit):  # argparse
        assert power.main(arguments) in (0, 2)


NF4 = parse_trial({**TRIAL, "quantization": "nf4"})


@fuzz(200)
@given(
    TEXT
    | st.builds("{}={}".format, st.sampled_from(["nf4", "none", "x"]), ARGUMENT | TEXT)
    | st.builds("nf4=0.1@{}={}".format, st.sampled_from(field_names()), ARGUMENT | TEXT)
)
def test_an_effect_is_a_difference_or_refused(text):
    found = outcome(lambda: parse_effect(text), UserError)
    if found is not None:
        assert abs(found[1]) < 1
        assert Simulation(effects=dict([found])).effect(NF4) in (0, found[1])


@fuzz(200)
@given(TEXT)
def test_a_name_is_a_folder_or_refused(tmp_path, name):
    safe = outcome(lambda: options.safe_name(name), UserError)
    if safe is not None:
        folder = (tmp_path / safe).resolve()
        assert folder.parent == tmp_path
        folder.mkdir(exist_ok=True)


OPTIONS = [
    "--grid",
    "--set",
    "--name",
    "--effect",
    "--device",
    "--output-dir",
    "--keep-checkpoints",
]
COUNTS = ["--max-experiments", "--max-concurrent", "--seed-sd", "--train-size", "--gpus-per-trial"]
TYPED = TEXT.filter(lambda text: "\0" not in text)  # the system passes none
PAIRS = st.tuples(st.sampled_from(OPTIONS), TYPED) | st.tuples(st.sampled_from(COUNTS), ARGUMENT)


@fuzz(60)
@given(st.lists(PAIRS, max_size=4))
def test_hostile_arguments_end_with_code_2_and_one_line(tmp_path, pairs):
    """--resume refuses what nothing before it did, so no study ever begins."""
    arguments = [f"{name}={value}" for name, value in pairs]
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.chdir(tmp_path)
        patch.setattr("sys.argv", ["tune-study", *arguments, "--resume"])
        with pytest.raises(SystemExit) as exit_:
            run.main()
    assert exit_.value.code == 2
    told = error.getvalue()
    assert told.count("\n") == 1 or "Usage:" in told
