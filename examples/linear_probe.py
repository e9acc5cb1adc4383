"""What fine-tuning has to beat: logistic regression on the frozen features of the same images.

    python -m examples.linear_probe --weights FOLDER_WITH_WEIGHTS --data-dir FOLDER_WITH_CIFAR

The regularisation, and whether features are standardised, are chosen on the validation images.
"""

from pathlib import Path
from typing import Annotated, cast

import typer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from examples.backbone.probe import extract_features
from examples.pretrained_grid import DATA, MODELS
from tune_study.config import DataConfig, TrialConfig
from tune_study.data.batches import preprocess
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.model.build import preprocessing_of
from tune_study.model.weights import load_base

STRENGTHS = [10.0**power for power in range(-5, 3)]


def main(
    weights: Annotated[Path, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    image_size: int = cast(int, DATA["image_size"]),
    train_size: int = cast(int, DATA["train_size"]),
) -> None:
    """Prints a table (CSV) of the chosen probe's accuracies, for each model and data set."""
    print("model,dataset,test_accuracy,val_accuracy,strength,standardised", flush=True)
    data = DataConfig(**{**DATA, "image_size": image_size, "train_size": train_size})
    for model_name in MODELS:
        for dataset in ("cifar10", "cifar100"):
            images = load(dataset, Place(data_dir), data)
            config = TrialConfig(model=model_name, dataset=dataset, data=data)
            model = load_base(config, len(images.class_names), weights).eval()
            how = preprocessing_of(model, config)
            splits = {
                name: (extract_features(model, preprocess(split.images, how)), split.labels)
                for name, split in (
                    ("train", images.train), ("val", images.val), ("test", images.test),
                )
            }  # fmt: skip
            found = []
            for scaler in ([], [StandardScaler()]):
                for strength in STRENGTHS:
                    probe = make_pipeline(*scaler, LogisticRegression(C=strength, max_iter=1000))
                    probe.fit(*splits["train"])
                    found.append((probe.score(*splits["val"]), strength, len(scaler), probe))
            val, strength, scaled, probe = max(found, key=lambda row: row[0])
            test = probe.score(*splits["test"])
            row = (model_name, dataset, test, val, strength, bool(scaled))
            print(*row, sep=",", flush=True)


if __name__ == "__main__":
    typer.run(main)
