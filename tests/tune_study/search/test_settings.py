"""Spaces, and what a search asks."""

import optuna
import pytest
from optuna.trial import FixedTrial

from search_spaces import optuna_spaces
from tests.tune_study.search.test_suggestions import settings
from tune_study import run
from tune_study.config import field_names
from tune_study.errors import UserError
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
