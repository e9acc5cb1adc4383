"""Spaces, and what a search asks."""

import optuna
import pytest
from optuna.trial import FixedTrial

from search_spaces import optuna_spaces
from tests.tune_study.search.test_suggestions import settings
from tune_study import run
from tune_study.config import field_names, parse_trial
from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.search import settings as spaces
from tune_study.search.settings import probes


@pytest.mark.parametrize("name", ["qlora", "demo"])
def test_whatever_a_space_answers_is_a_trial(name):
    trials = probes(settings(space=name))
    assert len(trials) > 150
    for trial in trials:
        assert trial.lora.lora_alpha % trial.lora.r == 0
        assert trial.quantization.mode != "none" or not trial.quantization.skip_layers
    assert {len(trial.quantization.skip_layers) for trial in trials} == {0, 1}
    assert len({trial.lora.target_modules for trial in trials}) == 4


def test_parameters_are_named_after_the_fields_that_they_fill():
    trial = optuna.create_study().ask()
    optuna_spaces.qlora(trial)
    assert {name.partition("/")[0] for name in trial.params} <= set(field_names())


def test_skip_layers_is_asked_only_where_something_is_quantized():
    answers = {
        "lora.r": 8,
        "lora.lora_alpha/r": 2,
        "lora.lora_dropout": 0.1,
        "lora.target_modules/name": "mlp",
        "training.learning_rate": 1e-3,
        "training.per_device_train_batch_size": 16,
    }
    config = settings().config(FixedTrial({**answers, "quantization.mode": "none"}))
    assert (config.lora.lora_alpha, config.lora.target_modules) == (
        16,
        optuna_spaces.TARGETS["mlp"],
    )
    with pytest.raises(UserError, match="skip_layers"):
        settings().config(FixedTrial({**answers, "quantization.mode": "nf4"}))


def test_what_set_fixes_is_not_asked():
    fixed = [
        ("lora.r", 5),
        ("lora.lora_alpha", 7),
        ("lora.target_modules", "x"),
        ("quantization", "nf4"),
    ]
    trial = optuna.create_study().ask()
    config = settings(assignments=[*fixed, ("training.learning_rate", 0.5)]).config(trial)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.target_modules) == (5, 7, "x")
    assert (config.quantization.mode, config.training.learning_rate) == ("nf4", 0.5)
    assert set(trial.params) == {
        "lora.lora_dropout",
        "quantization.skip_layers/name",
        "training.per_device_train_batch_size",
    }


def test_a_search_by_default_and_as_it_is_recorded():
    found = settings(assignments=[])
    assert (found.name, found.objectives) == ("qlora", ("val_accuracy", "weights_bytes"))
    given = {"num_samples": 7, "seed": 3, "objectives": ["train_time_s", "val_accuracy"]}
    record = settings(**given)._replace(compute_dtype="fp32").record()
    assert record == {
        "algorithm": "optuna",
        "space": "qlora",
        "objectives": [
            {"name": "train_time_s", "direction": "minimize"},
            {"name": "val_accuracy", "direction": "maximize"},
        ],
        "num_samples": 7,
        "scheduler": "fifo",
        "seed": 3,
        "set": {"training.num_train_epochs": 2},
        "compute_dtype": "fp32",
        "params": {},
    }
    assert (found.num_samples, found.scheduler, found.seed) == (40, "fifo", 0)
    assert found.compute_dtype is None
    alone = settings(objectives=["val_accuracy"], scheduler="asha")
    assert alone.scheduler == "asha"
    with pytest.raises(UserError, match="one, or two different ones"):
        settings(objectives=["val_accuracy", "weights_bytes", "train_time_s"])
    nothing = dict.fromkeys(("space", "num_samples", "objectives", "scheduler", "seed"))
    assert spaces.settings(search=None, assignments=[], **nothing) is None
    with pytest.raises(UserError, match="--search-seed: belongs to --search optuna"):
        spaces.settings(search=None, assignments=[], **{**nothing, "seed": 0})


def test_a_compute_dtype_is_for_trials_that_do_not_name_theirs():
    def of(values, **training):
        wanted = settings(assignments=[])._replace(
            compute_dtype="fp32", ask=lambda trial: {**values, **training}
        )
        return wanted.config(FixedTrial({})).training.compute_dtype

    values = {"model": "m", "dataset": "digits"}
    assert of(values) == "fp32"
    assert of(values, training={"compute_dtype": "bf16"}) == "bf16"


def test_fixed_fields_are_answered_and_the_others_asked():
    trial = FixedTrial({"a": 1, "b": 0.25, "c": "x"})
    fixed = spaces._Fixed(trial, {"d": 7, "e": 0.5, "f": "y"})
    assert fixed.suggest_int("a", 0, 5) == 1
    assert fixed.suggest_float("b", 0.0, 0.5, log=False) == 0.25
    assert fixed.suggest_categorical("c", ["w", "x"]) == "x"
    assert (fixed.suggest_int("d", 0, 5), fixed.suggest_int("d/r", 2, 5)) == (7, 2)
    assert (fixed.suggest_float("e", 0.0, 1.0), fixed.suggest_float("e/r", 0.125, 1.0)) == (
        0.5,
        0.125,
    )
    assert fixed.suggest_categorical("f", ["x", "y"]) == "y"
    assert fixed.suggest_categorical("f", ["x", "z"]) == "x"


def test_looking_draws_the_same_200_and_leaves_optunas_voice():
    drawn = []

    def one(trial):
        drawn.append(trial.suggest_int("seed", 0, 1000))
        return {"model": "m", "dataset": "digits", "seed": drawn[-1] // 500}

    before = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(optuna.logging.DEBUG)
        found = [probes(settings(seed=seed)._replace(ask=one)) for seed in (0, 0, 1)]
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert [len(trials) for trials in found] == [2, 2, 2]  # equal ones are one
    assert len(drawn) == 600
    assert drawn[:200] == drawn[200:400] != drawn[400:]


def test_the_largest_is_of_the_most_images_then_of_the_most_rank():
    def trial(batch, r, mode="none", **fields):
        values = {"model": "m", "dataset": "digits", "quantization": mode, "lora": {"r": r}}
        training = {"per_device_train_batch_size": batch}
        return parse_trial({**values, "training": training, **fields})

    trials = [trial(8, 2), trial(4, 64), trial(8, 4), trial(2, 2, "nf4"), trial(2, 1, "nf4")]
    others = [trial(1, 1, model="n"), trial(1, 1, data={"image_size": 64})]
    assert {t.trial_id for t in spaces.largest([*trials, *others])} == {
        t.trial_id for t in (trials[2], trials[3], *others)
    }


def test_a_search_that_goes_on_keeps_its_compute_dtype(tmp_path):
    wanted = settings()
    begun, trials = spaces.continued(wanted, tmp_path, compute_dtype="fp32")
    assert (begun.compute_dtype, trials) == ("fp32", [])
    trial = parse_trial({"model": "m", "dataset": "digits"})
    plan = [{"trial_id": trial.trial_id, **trial.model_dump(mode="json")}]
    write_json(tmp_path / "study.json", {"plan": plan, "search": {"compute_dtype": "bf16"}})
    begun, trials = spaces.continued(wanted, tmp_path, compute_dtype="fp32")
    assert (begun.compute_dtype, trials) == ("bf16", [trial])


@pytest.mark.parametrize(("first", "second", "most"), [(4, 9, 9), (9, 4, 9)])
def test_a_merged_record_keeps_what_was_asked_and_the_most_samples(first, second, most):
    before = {"num_samples": first, "compute_dtype": "bf16", "params": {"a": 1}, "space": "s"}
    now = {"num_samples": second, "compute_dtype": None, "params": {}, "space": "s"}
    assert spaces.merged(before, now) == {**before, "num_samples": most}
    assert spaces.merged(None, now) == now


IMPOSSIBLE = """
def some(trial):
    mode = trial.suggest_categorical("quantization.mode", ["none", "nf4"])
    r = trial.suggest_categorical("lora.r", [4, 2000 if mode == "nf4" else 8])
    return {"model": "vit_glyphs_patch4_32", "dataset": "digits", "lora": {"r": r}}
def text(trial):
    return "nothing"
def dynamic(trial):
    r = trial.suggest_categorical("lora.r", [4, 8])
    return {"model": "m", "dataset": "digits", "lora": {"r": trial.suggest_int("x", 1, r)}}
def broken(trial):
    raise KeyError("here")
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(IMPOSSIBLE)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["tune-study", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run.main()
        output = capsys.readouterr()
        return exit_.value.code, output.out, output.err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--search ax", ["--search ax", "optuna"]),
        ("--space qlora", ["--space", "--search optuna"]),
        ("--num-samples 3 --scheduler asha", ["--num-samples, --scheduler", "--search optuna"]),
        ("--search optuna --space huge", ["--space huge", "qlora"]),
        ("--search optuna --space nowhere.py:f", ["nowhere.py"]),
        ("--search optuna --space my.py:missing", ["my.py:missing", "AttributeError"]),
        ("--search optuna --space my.py:broken", ["my.py:broken", "KeyError"]),
        ("--search optuna --space my.py:text", ["my.py:text", "str"]),
        ("--search optuna --space my.py:some", ["lora.r = 2000", "quantization.mode = nf4"]),
        ("--search optuna --objective loss", ["--objective loss", "weights_bytes"]),
        ("--search optuna --objective test_accuracy", ["test_accuracy", "val_accuracy"]),
        ("--search optuna --objective val_accuracy --objective val_accuracy", ["different"]),
        ("--search optuna --scheduler hyperband", ["hyperband", "asha"]),
        ("--search optuna --scheduler asha", ["val_accuracy and weights_bytes", "alone"]),
        ("--search optuna --objective weights_bytes --scheduler asha", ["weights_bytes", "alone"]),
        ("--search optuna --grid demo", ["--grid demo", "--space"]),
        ("--search optuna --max-experiments 3", ["--max-experiments 3", "--num-samples"]),
        ("--search optuna --dry-run", ["--dry-run", "--validate-only"]),
        ("--search optuna --simulate --objective train_time_s", ["train_time_s", "--simulate"]),
        ("--search optuna --set lora.r=0", ["lora.r = 0"]),
        ("--search optuna --space demo --set quantization.skip_layers=[x]", ["matches no layer"]),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(command, tmp_path, arguments, words):
    code, _, error = command(*arguments.split())
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert [path.name for path in tmp_path.iterdir()] == ["my.py"]
