import json

import numpy as np
import pytest

from analysis.statistics.inference import t_interval
from tune_study.folder.files import write_json
from tune_study.study.cards import write_cards

ACCURACIES = {1: 0.5, 2: 0.6, 3: 0.55}


@pytest.fixture
def study(tiny, tmp_path):
    """Three seeds of nf4 and one of none, all with an adapter; of a fourth seed none is left."""
    trials = [tiny("nf4", seed=seed) for seed in (1, 2, 3, 4)] + [tiny("none", seed=1)]
    cells = [{"trial_id": t.trial_id, **t.model_dump(mode="json")} for t in trials]
    for trial in trials:
        folder = tmp_path / trial.trial_id
        accuracy = ACCURACIES.get(trial.seed, 0.1)
        results = {
            "trial_id": trial.trial_id,
            "status": "completed" if trial.seed < 4 else "diverged",
            "run": {"config": trial.model_dump(mode="json")},
            "train": {
                "test_metrics": {"test_accuracy": accuracy},
                "model_metrics": {
                    "weights_bytes": 1000,
                    "weights_bytes_fp32": 4000,
                    "quantized_layers": 24,
                    "num_classes": 10,
                },
                "resource_metrics": {"peak_train_bytes": 5000},
            },
            "meta": {"versions": {"torch": "2.14"}},
        }
        (folder / "adapter").mkdir(parents=True)
        write_json(folder / "results.json", results)
        if trial.seed < 4:
            base = {"base_model_name_or_path": "timm/some.name"}
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(base))
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1234)
    versions = {"data": {}, "weights": {}}
    write_json(
        tmp_path / "study.json",
        {
            "format": 1,
            "created": "",
            "plan": cells,
            "provenance": versions,
            "command": "the <line>",
        },
    )
    return tmp_path, trials


def test_the_cards_have_the_interval_over_the_seeds_of_their_configuration(study):
    folder, trials = study
    write_cards(folder)
    cards = [folder / trial.trial_id / "adapter" / "README.md" for trial in trials]
    assert not cards[3].exists()
    text = cards[1].read_text()
    low, high = t_interval(np.array([0.5, 0.6, 0.55]))
    assert "| test accuracy | 0.6000 (seed 2) |" in text
    assert (
        f"| over 3 seeds | mean test accuracy 0.5500, 95 % interval {low:.4f} to {high:.4f}" in text
    )
    assert "| base weights | 1,000 bytes in nf4 (24 layers), 4,000 bytes in fp32 |" in text
    assert "| adapter | 1,234 bytes, head included |" in text
    assert "| peak of a training step | 5,000 bytes |" in text
    assert "| command | the &lt;line> |" in text
    assert "base_model: timm/some.name" in text
    assert "timm.create_model('hf-hub:timm/some.name', pretrained=True, num_classes=10)" in text
    assert "one seed: no interval" in cards[4].read_text()
    assert "1,000 bytes, not quantized" in cards[4].read_text()


def test_seeds_that_agree_have_no_interval(study):
    folder, trials = study
    for trial in trials[:3]:
        path = folder / trial.trial_id / "results.json"
        results = json.loads(path.read_text())
        results["train"]["test_metrics"]["test_accuracy"] = 0.5
        write_json(path, results)
    write_cards(folder)
    text = (folder / trials[0].trial_id / "adapter" / "README.md").read_text()
    assert "mean test accuracy 0.5000, no spread, so no interval" in text
