"""How good the frozen features are: a linear probe on scikit-learn's digits, which no training saw.

The digits never choose anything: `pretrain.py` calls this once, after the weights are written.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tune_study.config import QuantizationConfig
from tune_study.data.batches import preprocess
from tune_study.data.place import Place, Preprocessing
from tune_study.data.sources import read_source
from tune_study.model.backbone import MODEL_NAME
from tune_study.model.quantize import quantize_model

PREPROCESSING = Preprocessing(32, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TEST_FRACTION = 0.25
TRAIN_SIZES = (100, 300, None)
SPLIT_SEEDS = (0, 1, 2, 3, 4)
INIT_SEEDS = (0, 1, 2, 3, 4)


def load_digits_images() -> tuple[Tensor, np.ndarray]:
    """Scikit-learn's digits as a trial sees them: `[1797, 3, 32, 32]` in -1..1, and labels."""
    images, labels = read_source("digits", Place()).train
    return preprocess(images, PREPROCESSING), labels.numpy()


@torch.inference_mode()
def extract_features(model: nn.Module, images: Tensor) -> np.ndarray:
    """What the head would see, `[N, embed_dim]`, float32: the class token after the last norm."""
    vit = cast(VisionTransformer, model.eval())
    parts = [
        vit.forward_head(vit.forward_features(part), pre_logits=True) for part in images.split(256)
    ]
    return torch.cat(parts).float().numpy()


def probe_accuracies(
    features: np.ndarray,
    labels: np.ndarray,
    train_size: int | None = None,
    split_seeds: Sequence[int] = SPLIT_SEEDS,
) -> list[float]:
    """Test accuracy of logistic regression on `features [N, D]`, one per stratified split.

    A quarter of the images is the test set; `train_size` of the others train the probe (None:
    all of them). The regularisation is scikit-learn's default and is not tuned.
    """
    accuracies = []
    for seed in split_seeds:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=seed
        )
        if train_size is not None:
            train, _ = train_test_split(
                train, train_size=train_size, stratify=labels[train], random_state=seed
            )
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        probe.fit(features[train], labels[train])
        accuracies.append(float(probe.score(features[test], labels[test])))
    return accuracies


def nf4_twin(model: nn.Module) -> nn.Module:
    """A copy whose linear layers inside the blocks are bitsandbytes nf4, with fp32 compute."""
    twin = copy.deepcopy(model)
    quantize_model(twin, QuantizationConfig(mode="nf4"), torch.float32, torch.device("cpu"))
    return twin


def feature_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over images of the cosine between two `[N, D]` feature matrices' rows."""
    return float(F.cosine_similarity(torch.from_numpy(first), torch.from_numpy(second)).mean())


def _summary(accuracies: Sequence[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(accuracies)), 4),
        "std": round(float(np.std(accuracies, ddof=1)), 4),
        "min": round(min(accuracies), 4),
        "max": round(max(accuracies), 4),
    }


def evaluate_on_digits(model: nn.Module) -> dict[str, Any]:
    """The record's `digits` part: probe accuracy by training size, for four sets of features.

    `pretrained`, `pretrained_nf4` and `raw_pixels` are summarised over the split seeds; for
    `random_init` the splits of one initialisation are averaged first, and the summary is over
    the initialisations.
    """
    images, labels = load_digits_images()
    features = {
        "pretrained": extract_features(model, images),
        "pretrained_nf4": extract_features(nf4_twin(model), images),
        "raw_pixels": load_digits().data,
    }
    untrained = []
    for seed in INIT_SEEDS:
        torch.manual_seed(seed)
        untrained.append(extract_features(timm.create_model(MODEL_NAME), images))
    probes: dict[str, dict[str, dict[str, float]]] = {}
    for size in TRAIN_SIZES:
        row = {n: _summary(probe_accuracies(f, labels, size)) for n, f in features.items()}
        row["random_init"] = _summary(
            [float(np.mean(probe_accuracies(f, labels, size))) for f in untrained]
        )
        probes[str(size or len(labels) - round(TEST_FRACTION * len(labels) + 0.5))] = row
    return {
        "probe_accuracy_by_train_images": probes,
        "split_seeds": list(SPLIT_SEEDS),
        "random_init_seeds": list(INIT_SEEDS),
        "test_fraction": TEST_FRACTION,
        "nf4_feature_cosine": round(
            feature_cosine(features["pretrained"], features["pretrained_nf4"]), 4
        ),
    }
