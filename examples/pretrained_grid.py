"""The full grid's design with weights that were at hand: 144 trials for two cores.

    python -m tune_study.run --grid examples/pretrained_grid.py:pretrained_grid \
        --weights FOLDER_WITH_WEIGHTS --data-dir FOLDER_WITH_CIFAR

Epochs, warm-up and dropout were chosen by the search below, and then the learning rate by a grid
over all ranks: in full precision, with another seed and by validation images alone.

    python -m tune_study.run --search optuna --space examples/pretrained_grid.py:tuning \
        --num-samples 14 --objective val_accuracy --weights FOLDER_WITH_WEIGHTS --data-dir FOLDER
    python -m tune_study.run --grid examples/pretrained_grid.py:rates \
        --weights FOLDER_WITH_WEIGHTS --data-dir FOLDER_WITH_CIFAR

``examples/pretrained_grid.py:adapters`` asks a second, smaller question of one cell of it.
"""

from typing import Any

from ray import tune

MODELS = ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"]
DATA = {"image_size": 84, "train_size": 800, "val_size": 300, "test_size": 2000}
LORA = [{"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0} for r in (4, 8, 16)]
TRAINING = {
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "num_train_epochs": 6,
    "warmup_steps": 50,
}
TUNED = {
    "model": MODELS[0],
    "dataset": "cifar100",
    "quantization": "none",
    "seed": 7,
    "data": {**DATA, "val_size": 600, "test_size": 300},
}
"""What the settings were chosen on."""


def tuning(trial: Any) -> dict[str, Any]:
    """``--space examples/pretrained_grid.py:tuning``: how long, how fast, how much dropout."""
    return {
        **TUNED,
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": trial.suggest_categorical("lora.lora_dropout", [0.0, 0.1]),
        },
        "training": {
            "per_device_train_batch_size": 16,
            "learning_rate": trial.suggest_float("training.learning_rate", 5e-4, 5e-3, log=True),
            "num_train_epochs": trial.suggest_categorical("training.num_train_epochs", [4, 6]),
            "warmup_steps": trial.suggest_categorical("training.warmup_steps", [5, 50]),
        },
    }


def rates() -> dict[str, Any]:
    """How fast, over all ranks: the learning rates that the search left, in full precision.

    3 rates x 3 ranks = 9 trials, of which the validation images decide.
    """
    return {
        **TUNED,
        "lora": tune.grid_search(LORA),
        "training": {**TRAINING, "learning_rate": tune.grid_search([5e-4, 7e-4, 1e-3])},
    }


def pretrained_grid() -> dict[str, Any]:
    """2 models x 2 data sets x 3 LoRA settings x 4 modes x 3 seeds = 144 trials."""
    return {
        "model": tune.grid_search(MODELS),
        "dataset": tune.grid_search(["cifar10", "cifar100"]),
        "lora": tune.grid_search(LORA),
        "quantization": tune.grid_search(["none", "int8", "nf4", "nf4-dq"]),
        "seed": tune.grid_search([42, 123, 456]),
        "data": DATA,
        "training": TRAINING,
    }


def adapters() -> dict[str, Any]:
    """Does another adapter win back what nf4 loses? 4 adapters x 2 modes x 5 seeds = 40 trials.

    ``--grid adapters`` on one cell of the study above, with more seeds and without rsLoRA.
    """
    kinds: list[dict[str, Any]] = [
        {},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
    ]
    common = {**LORA[1], "loftq_iter": 5}
    return {
        "model": MODELS[1],
        "dataset": "cifar100",
        "lora": tune.grid_search([{**common, **kind} for kind in kinds]),
        "quantization": tune.grid_search(["none", "nf4"]),
        "seed": tune.grid_search([42, 123, 456, 789, 1011]),
        "data": DATA,
        "training": TRAINING,
    }
