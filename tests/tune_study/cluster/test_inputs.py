"""Data and weights on their way to a node."""

import hashlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import save_file

from search_spaces.own_code import Code
from tests.tune_study.data.pictures import class_folders
from tune_study.cluster import inputs
from tune_study.config import DataConfig
from tune_study.data import sources, splits
from tune_study.data.place import Place
from tune_study.model.build import preprocessing
from tune_study.trial.context import RunContext


class Remote:
    """An actor, as far as it matters: what a method returns is put."""

    def __init__(self, actor, put):
        self.piece = SimpleNamespace(remote=lambda number: put(actor.piece(number)))


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
    monkeypatch.setattr(inputs, "_reader", lambda path: Remote(inputs._Reader(str(path)), put))
    inputs._source.cache_clear()
    yield store
    inputs._source.cache_clear()


def test_data_and_weights_reach_a_node_that_has_none(object_store, tiny, tmp_path):
    weights = tmp_path / "weights" / "vit_glyphs_patch4_32.safetensors"
    weights.parent.mkdir()
    save_file({"a": torch.arange(5.0)}, weights)
    config = tiny("nf4")
    context = RunContext(study_dir=tmp_path / "study", weights=weights.parent)
    before = splits.load("digits", context.place, config.data)
    shipped = inputs.ship([config, config], context)
    assert len(object_store) == 2  # once, however many trials
    content = weights.read_bytes()
    weights.unlink()
    sources.read_source.cache_clear()

    there = inputs.receive(shipped, config, context, tmp_path / "node")
    assert there.weights.read_bytes() == content
    assert there.weights.parent == tmp_path / "node"
    after = splits.load("digits", there.place, config.data)
    assert after.sha256 == before.sha256
    assert after.class_names == before.class_names
    assert torch.equal(after.train.images, before.train.images)
    after.train.images[0] = 0  # not the read-only memory of the store
    stamp = there.weights.stat().st_mtime_ns
    inputs.receive(shipped, config, context, tmp_path / "node")
    assert there.weights.stat().st_mtime_ns == stamp  # once per node


def test_a_folders_images_go_to_the_nodes_cache_piece_by_piece(
    object_store, tiny, tmp_path, monkeypatch
):
    root = tmp_path / "images"
    for part in ("train", "val"):
        class_folders(root / part, side=40, cat=12, dog=12)
    (root / "train" / "cat" / "003.png").write_bytes(b"nothing")
    config = tiny("nf4", dataset=f"folder:{root}").model_copy(update={"data": DataConfig()})
    other = tiny("none", dataset=f"folder:{root}", data={"image_size": 64})
    context = RunContext(
        study_dir=tmp_path / "study", cache_dir=tmp_path / "drivers", leave_out_broken=True
    )
    how = preprocessing(config)
    before = splits.load(config.dataset, context.place, config.data, how)
    monkeypatch.setattr(inputs, "PIECE_BYTES", 60_000)
    shipped = inputs.ship([config, config, other], context)
    assert len(shipped.data) == 2  # one for each side
    assert len(object_store) == 2  # the names of the files: no image
    assert max(len(pickle.dumps(value)) for value in object_store.values()) < 48 * 3_072
    before_it = len(object_store)
    sources.read_source.cache_clear()
    root.rename(tmp_path / "gone")

    on_node = context.model_copy(update={"cache_dir": tmp_path / "nodes"})
    for _ in range(2):
        there = inputs.receive(shipped, config, on_node, tmp_path / "node")
        assert (
            len(object_store) - before_it == 3
        )  # pieces of 48 images of 3,072 bytes; fetched once
    after = splits.load(config.dataset, there.place, config.data, how)
    assert after.sha256 == before.sha256
    assert after.class_names == ["cat", "dog"]
    for ours, theirs in zip(after[:3], before[:3], strict=True):
        assert torch.equal(ours.images[:], theirs.images[:])
        assert torch.equal(ours.labels, theirs.labels)
    # What is there serves a study of that node's own, too.
    (name,) = (p.name for p in (tmp_path / "nodes" / "images").glob("*.json"))
    assert (tmp_path / "nodes" / "images" / name).read_bytes() == (
        tmp_path / "drivers" / "images" / name
    ).read_bytes()


def test_images_of_code_reach_a_node_that_does_not_run_it(object_store, tiny, tmp_path):
    (tmp_path / "there").write_text("here")
    text = (
        "import numpy as np\n"
        "from pathlib import Path\n"
        "def leaves(split):\n"
        f"    assert Path({str(tmp_path / 'there')!r}).read_text() == 'here'\n"
        "    some = range(24) if split == 'train' else ()\n"
        "    return ((np.full((40, 40), 9 * at, np.uint8), at % 2) for at in some)\n"
    )
    code = Code("m.py", "grid", text, hashlib.sha256(text.encode()).hexdigest())
    config = tiny("nf4", dataset="code:leaves").model_copy(update={"data": DataConfig()})
    context = RunContext(study_dir=tmp_path / "study", cache_dir=tmp_path / "drivers", code=code)
    how = preprocessing(config)
    before = splits.load(config.dataset, context.place, config.data, how)
    shipped = inputs.ship([config], context)
    sources.read_source.cache_clear()
    (tmp_path / "there").unlink()

    on_node = context.model_copy(update={"cache_dir": tmp_path / "nodes"})
    there = inputs.receive(shipped, config, on_node, tmp_path / "node")
    after = splits.load(config.dataset, there.place, config.data, how)
    assert (after.sha256, after.class_names) == (before.sha256, ["0", "1"])
    for ours, theirs in zip(after[:3], before[:3], strict=True):
        assert torch.equal(ours.images[:], theirs.images[:])
        assert torch.equal(ours.labels, theirs.labels)
    assert not list((tmp_path / "nodes").rglob("*drawn*"))  # what was decoded is all it has


@pytest.mark.parametrize("change", ["", "other bytes", "longer", "gone", "bucket"])
def test_a_node_that_sees_the_same_files_decodes_them_itself(
    object_store, tiny, tmp_path, monkeypatch, change
):
    root = class_folders(tmp_path / "images", side=40, cat=12, dog=12)
    dataset = f"folder:{root.as_uri() if change == 'bucket' else root}"
    config = tiny("nf4", dataset=dataset).model_copy(update={"data": DataConfig()})
    context = RunContext(study_dir=tmp_path / "study", cache_dir=tmp_path / "drivers")
    (given,) = inputs.ship([config], context).data.values()
    image = root / "cat" / "000.png"
    if change == "other bytes":
        content = image.read_bytes()
        image.write_bytes(content[:-20] + bytes(20))
    elif change == "longer":
        image.write_bytes(image.read_bytes() + b"x")
    elif change == "gone":
        root.rename(tmp_path / "gone")
    before = len(object_store)
    path, shape = inputs.into_cache(given, Place(cache_dir=tmp_path / "nodes"))
    itself = change in ("", "bucket")
    assert len(object_store) - before == (0 if itself else 1)
    assert path.read_bytes() == (tmp_path / "drivers" / "images" / given.name).read_bytes()
    assert shape == given.shape


def test_the_projects_own_weights_are_on_every_node(object_store, tiny, tmp_path):
    context = RunContext(study_dir=tmp_path)
    shipped = inputs.ship([tiny("nf4")], context)
    assert list(shipped.weights) == []
    assert inputs.receive(shipped, tiny("nf4"), context, tmp_path / "node").weights is None
