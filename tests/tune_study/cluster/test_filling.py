"""Every node has the images before the first trial, or is named."""

from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError

from tests.tune_study.data.pictures import class_folders
from tune_study.cluster import filling, local
from tune_study.cluster.inputs import Distant, Inputs, ship
from tune_study.cluster.stop import Stop
from tune_study.config import DataConfig
from tune_study.data import cache
from tune_study.data.place import Place
from tune_study.errors import UserError
from tune_study.trial.context import RunContext

SHAPE = (10, 3, 8, 8)


def distant(name="k-8-bicubic.pixels"):
    return Distant(None, name, SHAPE, {}, ["a", "b"], "sha", {}, "folder:d", "bicubic", None)


@pytest.fixture
def nodes(monkeypatch):
    """Nodes of which each is asked once; ``answers`` by name, in the order in which they come."""
    found = SimpleNamespace(answers={}, written={}, asked=[], said=[])

    def filler(node, distant, place):
        name = node["NodeID"]
        found.asked.append(name)
        return SimpleNamespace(
            fill=SimpleNamespace(remote=lambda: name),
            written=SimpleNamespace(remote=lambda: f"written {name}"),
        )

    def get(reference):
        kind, _, name = reference.rpartition(" ")
        answer = found.written[name] if kind else found.answers.pop(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(references, num_returns=1, timeout=None):
        if references[0].startswith("written"):
            return references, []
        ready = next(iter(found.answers), None)
        if ready == "nothing yet":
            del found.answers[ready]
            return [], references
        return [ready], [name for name in references if name != ready]

    monkeypatch.setattr(filling, "_filler", filler)
    monkeypatch.setattr(filling, "nodes_for", lambda resources: found.there)
    monkeypatch.setattr(filling, "name_of", lambda node: node["NodeID"])
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(Stop, "reason", None)
    return found


def filled(nodes, inputs, *names):
    nodes.there = [{"NodeID": name} for name in names]
    filling.fill(inputs, Place(), {"CPU": 1}, "auto", nodes.said.append)


def test_it_ends_when_all_nodes_have_the_images(nodes):
    nodes.answers.update({"b": None, "nothing yet": None, "a": None})
    nodes.written["a"] = 960
    filled(nodes, Inputs({"x": distant(), "y": "a reference"}, {}), "a", "b")
    assert nodes.answers == {}
    assert nodes.said == ["images: 1 of 2 nodes have them (75% of 0.0 GB in all)"]


def test_other_data_sets_need_no_filling(nodes):
    filled(nodes, Inputs({"digits": "a reference"}, {}), "a", "b")
    assert nodes.asked == []


def test_a_node_without_room_is_named_and_the_others_are_not_waited_for(nodes):
    nodes.answers["b"] = "--cache-dir: 10 images take 3 GB"
    with pytest.raises(UserError, match=r"^--address auto: on b, --cache-dir: 10 images take 3 GB"):
        filled(nodes, Inputs({"x": distant()}, {}), "a", "b")


def test_a_node_that_dies_is_told_and_the_others_go_on(nodes):
    nodes.answers.update({"nothing yet": None, "b": ActorDiedError(), "a": None})
    nodes.written.update({"a": 0, "b": ActorDiedError()})
    filled(nodes, Inputs({"x": distant()}, {}), "a", "b")
    assert nodes.said[0] == "images: 0 of 2 nodes have them (0% of 0.0 GB in all)"
    assert nodes.said[1].startswith("images: b did not take them (")
    assert len(nodes.said) == 2


def test_a_study_that_is_to_stop_waits_for_no_node(nodes, monkeypatch):
    monkeypatch.setattr(Stop, "reason", "interrupt")
    filled(nodes, Inputs({"x": distant()}, {}), "a")
    assert nodes.said == []


def test_a_node_is_asked_for_the_room_of_all_data_sets_before_it_takes_any(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(filling, "into_cache", lambda some, place: taken.append(some.name))
    place = Place(cache_dir=tmp_path)
    usage = cache.shutil.disk_usage(tmp_path)
    filler = filling._Filler([distant("a"), distant("b")], place)
    needed = 2 * 10 * 3 * 8 * 8
    for free in (needed - 1, needed):
        there = usage._replace(free=cache.LEFT_FREE_BYTES + free)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder, there=there: there)
        why = filler.fill()
        assert (why is None) == (taken == ["a", "b"]) == (free == needed)
    (tmp_path / "images" / ".a.7.tmp").write_bytes(b"x" * 100)
    assert 0 < filler.written() <= 4096


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_node_fetches_from_a_real_driver(tiny, tmp_path):
    root = class_folders(tmp_path / "images", side=40, cat=12, dog=12)
    config = tiny("nf4", dataset=f"folder:{root}").model_copy(update={"data": DataConfig()})
    context = RunContext(study_dir=tmp_path / "study", cache_dir=tmp_path / "drivers")
    ray.init(address="local", num_cpus=1, include_dashboard=False, **local.QUIET)
    try:
        shipped = ship([config], context)
        root.rename(tmp_path / "gone")
        place = Place(cache_dir=tmp_path / "nodes")
        filling.fill(shipped, place, {"CPU": 1}, "local", lambda line: None)
    finally:
        ray.shutdown()
    (given,) = shipped.data.values()
    ours, theirs = (tmp_path / who / "images" / given.name for who in ("nodes", "drivers"))
    assert ours.read_bytes() == theirs.read_bytes()
