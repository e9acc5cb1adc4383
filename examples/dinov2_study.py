"""The study published in docs/results: two data sets, one LoRA setting, four modes, three seeds.

    python -m tune_study.run --grid examples/dinov2_study.py:dinov2_study \
        --weights FOLDER_WITH_WEIGHTS --data-dir FOLDER_WITH_CIFAR
"""

from typing import Any

from ray import tune


def dinov2_study() -> dict[str, Any]:
    """ViT-S/14 with DINOv2's architecture at 112 px, 480 training images: small, and says so."""
    return {
        "model": "vit_small_patch14_dinov2",
        "dataset": tune.grid_search(["cifar10", "cifar100"]),
        "lora": {"r": 8, "lora_alpha": 16},
        "quantization": tune.grid_search(["none", "int8", "nf4", "nf4-dq"]),
        "seed": tune.grid_search([42, 123, 456]),
        "data": {"image_size": 112, "train_size": 480, "val_size": 500, "test_size": 500},
        "training": {
            "num_train_epochs": 4,
            "learning_rate": 5e-4,
            "warmup_steps": 5,
            "per_device_train_batch_size": 16,
        },
    }
