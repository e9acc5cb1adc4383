"""Addresses, nodes that differ, and data and weights on their way to a node."""

from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import save_file

from tune_study import cluster, data, environment, inputs, provenance
from tune_study.config import UserError
from tune_study.trainable import RunContext


@pytest.mark.parametrize("address", ["local", "auto", "127.0.0.1:6379", "head:6379", "[::1]:6379"])
def test_addresses(address):
    assert cluster.parse_address(address) == address


@pytest.mark.parametrize(
    "address", ["", "head", "head:port", "ray://head:10001", "http://head:80", "head:6379 "]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="--address"):
        cluster.parse_address(address)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--address", "local"], False),
        (["--address", "127.0.0.1:6379"], False),
        (["--address=localhost:6379"], False),
        (["--address", "head:6379", "--name", "x"], True),
        (["--address=10.0.0.1:6379"], True),
        (["--address"], True),  # typer refuses it
        (["--name", "--address"], True),
    ],
)
def test_the_setting_for_clusters_follows_the_address(arguments, expected):
    assert environment.clustered(arguments) is expected


@pytest.mark.parametrize(("head", "expected"), [("127.0.0.1:1", False), ("10.1.2.3:1", True)])
def test_auto_is_what_ray_would_take_it_for(monkeypatch, head, expected):
    monkeypatch.setenv("RAY_ADDRESS", head)
    assert environment.clustered(["--address", "auto"]) is expected


def test_a_node_that_differs_is_told_by_its_difference():
    ours = {"torch": "2.7", "commit of tune-study": "abc", "device cpu": "there"}
    assert cluster.first_difference(ours, dict(ours)) is None
    assert cluster.first_difference(ours, {**ours, "commit of tune-study": None}) is None
    assert (
        cluster.first_difference(ours, {**ours, "torch": "2.6"})
        == "torch is 2.6 and here it is 2.7"
    )
    assert "device cpu is not there" in str(
        cluster.first_difference(ours, {**ours, "device cpu": "not there"})
    )


def test_what_computes_names_every_package_that_must_be_equal():
    found = provenance.what_computes("cpu")
    packages = {"python", "ray", "torch", "timm", "peft", "bitsandbytes", "tune-study"}
    assert packages <= found.keys()
    assert found["device cpu"] == "there"
    if not torch.cuda.is_available():
        assert provenance.what_computes("cuda")["device cuda"] == "not there"


def test_only_the_raylet_of_the_own_node_is_watched(monkeypatch):
    """On one machine, the sockets of further raylets are named as the first one's and a suffix."""
    found = [
        SimpleNamespace(info={"name": name, "cmdline": command})
        for name, command in (
            ("raylet", ["raylet", "--raylet_socket_name=/s/raylet", "--x"]),
            ("raylet", ["raylet", "--raylet_socket_name=/s/raylet.1"]),
            ("raylet", None),  # another user's
            ("python", ["python", "--raylet_socket_name=/s/raylet"]),
        )
    ]
    monkeypatch.setattr(cluster.psutil, "process_iter", lambda names: found)
    node = SimpleNamespace(raylet_socket_name="/s/raylet")
    monkeypatch.setattr(ray._private.worker.global_worker, "node", node)
    assert cluster.own_raylet() == [("raylet", found[0])]


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
    monkeypatch.setattr(data, "_provided", {})
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
    config = config.model_copy(update={"data": data.DataConfig()})
    context = RunContext(study_dir=tmp_path / "study", weights=weights.parent)
    before = data.load(config.dataset, None, config.data)
    shipped = inputs.ship([config, config], context)
    assert len(object_store) == 2  # once, however many trials
    content = weights.read_bytes()
    weights.unlink()
    data.read_source.cache_clear()
    root.rename(tmp_path / "gone")

    there = inputs.receive(shipped, config, context, tmp_path / "node")
    assert there.weights.read_bytes() == content
    assert there.weights.parent == tmp_path / "node"
    after = data.load(config.dataset, None, config.data)
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
