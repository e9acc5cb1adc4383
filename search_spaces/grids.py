"""The grids: each function returns a Tune ``param_space`` in which every axis is a grid search.

A grid of your own is a function like these: ``--grid path/to/my_grid.py:my_function``. What it
does not name keeps the default of ``tune_study.config``.
"""

from typing import Any

from ray import tune

MODES = ["none", "int8", "nf4", "nf4-dq"]
SEEDS = [42, 123, 456]


def full() -> dict[str, Any]:
    """The reference study: 2 models x 2 data sets x 3 LoRA settings x 4 modes x 3 seeds = 144."""
    return {
        "model": tune.grid_search(["deit_tiny_patch16_224", "deit_small_patch16_224"]),
        "dataset": tune.grid_search(["cifar10", "cifar100"]),
        "lora": tune.grid_search(
            [
                {"r": 4, "lora_alpha": 8},
                {"r": 8, "lora_alpha": 16},
                {"r": 16, "lora_alpha": 32},
            ]
        ),
        "quantization": tune.grid_search(MODES),
        "seed": tune.grid_search(SEEDS),
    }


def demo() -> dict[str, Any]:
    """Minutes on two cores, no network: the shipped backbone on digits, 3 LoRA x 4 modes x 2 = 24.

    Few images and large steps: it shows the whole machinery, and claims nothing about CIFAR.
    """
    return {
        "model": tune.grid_search(["vit_glyphs_patch4_32"]),
        "dataset": tune.grid_search(["digits"]),
        "lora": tune.grid_search([{"r": r, "lora_alpha": 2 * r} for r in (4, 8, 16)]),
        "quantization": tune.grid_search(MODES),
        "seed": tune.grid_search([42, 123]),
        "data": {"train_size": 480, "val_size": 240},
        "training": {"num_train_epochs": 3, "learning_rate": 3e-3, "warmup_steps": 10},
    }


def smoke() -> dict[str, Any]:
    """The smallest real study, for tests: every mode once, two epochs of 64 digits."""
    return {
        "model": tune.grid_search(["vit_glyphs_patch4_32"]),
        "dataset": tune.grid_search(["digits"]),
        "lora": tune.grid_search([{"r": 4, "lora_alpha": 8}]),
        "quantization": tune.grid_search(MODES),
        "seed": tune.grid_search([42]),
        "data": {"train_size": 64, "val_size": 40, "test_size": 40},
        "training": {"num_train_epochs": 2, "learning_rate": 1e-3, "warmup_steps": 2},
    }


def sensitivity() -> dict[str, Any]:
    """Which blocks hurt: none, nf4 in one block of DeiT-tiny at a time, and in all; 14 x 3 = 42.

    Each is a treatment with a name of its own: ``nf4 without blocks 0-2, 4-11`` is block 3 alone.
    """
    return {
        **_deit_tiny_on_cifar10(),
        "quantization": tune.grid_search(["none", *_one_block_at_a_time(12), "nf4"]),
        "seed": tune.grid_search(SEEDS),
    }


def adapters() -> dict[str, Any]:
    """Does another initialisation or DoRA win back what nf4 loses? 6 adapters x 2 modes x 3 = 36.

    Each adapter is its own configuration, and its baseline is the same adapter at full precision;
    LoftQ's is plain LoRA, for there it has nothing to make good. No dropout: PiSSA's adapters hold
    the principal part of the weights, and dropout would drop of that.
    """
    kinds: list[dict[str, Any]] = [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "loftq", "use_dora": True},
    ]
    common = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "loftq_iter": 5}
    return {
        **_deit_tiny_on_cifar10(),
        "lora": tune.grid_search([{**common, **kind} for kind in kinds]),
        "quantization": tune.grid_search(["none", "nf4"]),
        "seed": tune.grid_search(SEEDS),
    }


def _deit_tiny_on_cifar10() -> dict[str, Any]:
    return {
        "model": tune.grid_search(["deit_tiny_patch16_224"]),
        "dataset": tune.grid_search(["cifar10"]),
        "lora": tune.grid_search([{"r": 8, "lora_alpha": 16}]),
    }


def _one_block_at_a_time(depth: int, mode: str = "nf4") -> list[dict[str, Any]]:
    """``depth`` quantization settings of one mode."""
    return [
        {"mode": mode, "skip_layers": [f"blocks.{i}.*" for i in range(depth) if i != block]}
        for block in range(depth)
    ]
