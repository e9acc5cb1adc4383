"""Data and weights on their way to a node."""

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import save_file

from tune_study.cluster import inputs
from tune_study.config import DataConfig
from tune_study.data import sources, splits
from tune_study.trial.context import RunContext


@pytest.fixture
def object_store(monkeypatch):
    """Ray's, as far as it matters: what is put is got, and arrays can't be written to."""
    store = {}

    def put(value):
        store[len(store)] = value
        return len(store) - 1

    def get(reference):
        value = store[reference]
        for part in value if isinstance(value, list) else [value]:
            for array in part if isinstance(part, tuple) else [part]:
                if isinstance(array, np.ndarray):
                    array.flags.writeable = False
        return value

    monkeypatch.setattr(ray, "put", put)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(sources, "_provided", {})
    inputs._source.cache_clear()
    yield store
    inputs._source.cache_clear()


def test_data_and_weights_reach_a_node_that_has_none(object_store, tiny, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8).astype(np.uint8))
            image.save(root / name / f"{number}.png")
    weights = tmp_path / "weights" / "vit_glyphs_patch4_32.safetensors"
    weights.parent.mkdir()
    save_file({"a": torch.arange(5.0)}, weights)
    config = tiny("nf4", dataset=f"folder:{root}", data={"train_size": 8, "val_size": 4})
    config = config.model_copy(update={"data": DataConfig()})
    context = RunContext(study_dir=tmp_path / "study", weights=weights.parent)
    before = splits.load(config.dataset, None, config.data)
    shipped = inputs.ship([config, config], context)
    assert len(object_store) == 2  # once, however many trials
    content = weights.read_bytes()
    weights.unlink()
    sources.read_source.cache_clear()
    root.rename(tmp_path / "gone")

    there = inputs.receive(shipped, config, context, tmp_path / "node")
    assert there.weights.read_bytes() == content
    assert there.weights.parent == tmp_path / "node"
    after = splits.load(config.dataset, None, config.data)
    assert after.sha256 == before.sha256
    assert after.class_names == ["cat", "dog"]
    assert torch.equal(after.train.images, before.train.images)
    after.train.images[0] = 0  # not the read-only memory of the store
    stamp = there.weights.stat().st_mtime_ns
    inputs.receive(shipped, config, context, tmp_path / "node")
    assert there.weights.stat().st_mtime_ns == stamp  # once per node


def test_the_projects_own_weights_are_on_every_node(object_store, tiny, tmp_path):
    context = RunContext(study_dir=tmp_path)
    shipped = inputs.ship([tiny("nf4")], context)
    assert list(shipped.weights) == []
    assert inputs.receive(shipped, tiny("nf4"), context, tmp_path / "node").weights is None
