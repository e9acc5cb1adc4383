"""A grid of one's own: real pretrained weights on real images, small enough for two CPU cores.

    python -m tune_study.run --grid examples/dinov2_cifar10.py:dinov2_cifar10 \
        --weights FOLDER_WITH_WEIGHTS --data-dir FOLDER_WITH_CIFAR

Without --weights and --data-dir, timm's weights and torchvision's CIFAR-10 are downloaded.
"""

from typing import Any

from ray import tune


def dinov2_cifar10() -> dict[str, Any]:
    """ViT-S/14 with DINOv2's architecture, 500 CIFAR-10 images at 112 px, all modes, one seed."""
    return {
        "model": "vit_small_patch14_dinov2",
        "dataset": "cifar10",
        "lora": {"r": 8, "lora_alpha": 16},
        "quantization": tune.grid_search(["none", "int8", "nf4", "nf4-dq"]),
        "seed": 42,
        "data": {"image_size": 112, "train_size": 500, "val_size": 200, "test_size": 1000},
        "training": {"num_train_epochs": 3, "learning_rate": 5e-4, "warmup_steps": 5},
    }
