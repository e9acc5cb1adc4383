"""The search spaces: each function asks an Optuna trial for its values and returns a configuration.

Define-by-run: what is asked may depend on what was answered. A parameter is named after the field
of ``tune_study.config`` that it fills (``lora.r``), with a slash where the field is computed from
it (``lora.lora_alpha/r``), so that ``--set lora.r=8`` fixes it instead of asking. A space of your
own is a function like these: ``--space path/to/my_space.py:my_function``.
"""

from typing import Any

TARGETS = {
    "qkv": r"blocks\.\d+\.attn\.qkv",
    "attention": r"blocks\.\d+\.attn\.(qkv|proj)",
    "mlp": r"blocks\.\d+\.mlp\.fc[12]",
    "all": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
}
"""Which linear layers get an adapter."""
SKIPPED = {
    "nothing": (),
    "first block": ("blocks.0.*",),
    "attn.proj": ("*.attn.proj",),
    "mlp.fc2": ("*.mlp.fc2",),
}
"""Which linear layers stay in full precision."""


def qlora(trial: Any) -> dict[str, Any]:
    """LoRA and quantization of DeiT-tiny on CIFAR-10: what to adapt, how finely, how to store.

    Layers are skipped only where something is quantized, and alpha follows the rank.
    """
    return {
        "model": "deit_tiny_patch16_224",
        "dataset": "cifar10",
        "lora": _lora(trial),
        "quantization": _quantization(trial),
        "seed": 42,
        "training": {
            "learning_rate": trial.suggest_float("training.learning_rate", 2e-5, 5e-3, log=True),
            "per_device_train_batch_size": trial.suggest_categorical(
                "training.per_device_train_batch_size", [16, 32, 64]
            ),
        },
    }


def demo(trial: Any) -> dict[str, Any]:
    """The same knobs on the shipped backbone and scikit-learn's digits: half a minute a trial."""
    values = qlora(trial)
    return {
        **values,
        "model": "vit_glyphs_patch4_32",
        "dataset": "digits",
        "data": {"train_size": 600, "val_size": 300},
        "training": {**values["training"], "num_train_epochs": 5, "warmup_steps": 10},
    }


def _lora(trial: Any) -> dict[str, Any]:
    r = trial.suggest_categorical("lora.r", [2, 4, 8, 16, 32])
    return {
        "r": r,
        "lora_alpha": r * trial.suggest_categorical("lora.lora_alpha/r", [1, 2, 4]),
        "lora_dropout": trial.suggest_float("lora.lora_dropout", 0.0, 0.2, step=0.05),
        "target_modules": TARGETS[
            trial.suggest_categorical("lora.target_modules/name", list(TARGETS))
        ],
    }


def _quantization(trial: Any) -> dict[str, Any]:
    mode = trial.suggest_categorical("quantization.mode", ["none", "int8", "nf4", "nf4-dq"])
    if mode == "none":
        return {"mode": mode}
    skipped = trial.suggest_categorical("quantization.skip_layers/name", list(SKIPPED))
    return {"mode": mode, "skip_layers": SKIPPED[skipped]}
