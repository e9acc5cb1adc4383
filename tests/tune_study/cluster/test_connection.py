"""Addresses, and nodes that differ."""

from types import SimpleNamespace

import pytest
import ray

from search_spaces.own_code import Code
from tune_study.cluster import connection
from tune_study.errors import UserError
from tune_study.machine.gpus import Card, Need
from tune_study.trial.context import RunContext, Simulation


@pytest.mark.parametrize("address", ["local", "auto", "127.0.0.1:6379", "head:6379", "[::1]:6379"])
def test_addresses(address):
    assert connection.parse_address(address) == address


@pytest.mark.parametrize(
    "address", ["", "head", "head:port", "ray://head:10001", "http://head:80", "head:6379 "]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="--address"):
        connection.parse_address(address)


def test_a_node_that_differs_is_told_by_its_difference():
    ours = {"torch": "2.7", "commit of tune-study": "abc", "device cpu": "there"}
    assert connection.first_difference(ours, dict(ours)) is None
    assert connection.first_difference(ours, {**ours, "commit of tune-study": None}) is None
    assert (
        connection.first_difference(ours, {**ours, "torch": "2.6"})
        == "torch is 2.6 and here it is 2.7"
    )
    assert "device cpu is not there" in str(
        connection.first_difference(ours, {**ours, "device cpu": "not there"})
    )


def test_a_cluster_needs_a_store():
    connection.check_options("local", None)
    connection.check_options("auto", "s3://b/p")
    with pytest.raises(UserError, match="add --storage"):
        connection.check_options("auto", None)


@pytest.fixture
def environment(monkeypatch):
    """Tune's lists of what workers inherit, restored afterwards."""
    names = {*connection.AWS_SECRETS, "AWS_REGION"}
    cache = SimpleNamespace(ENV_VARS_TO_PROPAGATE=set(names), DEFAULT_ENV_VARS={"A": "1"})
    monkeypatch.setattr(connection, "class_cache", cache)
    return cache


@pytest.mark.parametrize(
    ("device", "share", "gpus"), [("cpu", None, 0), ("cuda", None, 1), ("cuda", 0.5, 0.5)]
)
def test_on_this_machine_a_trial_takes_a_slot_and_no_cpu(
    tmp_path, monkeypatch, environment, device, share, gpus
):
    started = []
    monkeypatch.setattr(
        connection.local, "start", lambda slots, **options: started.append((slots, options))
    )
    context = RunContext(study_dir=tmp_path, device=device, num_threads=3)
    drawn = context.model_copy(update={"simulation": Simulation()})
    for most, dashboard in ((None, False), (4, True)):
        found = connection.connect(
            "local", context, max_concurrent=most, gpus_per_trial=share, dashboard=dashboard
        )
        assert found.resources == {"CPU": 0, "GPU": gpus, "trial_slot": 1}
        assert (found.at_a_time, found.limit) == (most or 1, None)
        assert found.on_device == {0: most or 1, 1: 1, 0.5: 2 if most else 1}[gpus]
    connection.connect("local", drawn, max_concurrent=None, gpus_per_trial=None)
    options = [(1, False, False), (4, True, False), (1, False, True)]
    assert started == [(n, {"dashboard": d, "simulated": s}) for n, d, s in options]
    assert not environment.ENV_VARS_TO_PROPAGATE
    assert not environment.DEFAULT_ENV_VARS


def node(name, alive=True, **resources):
    return {"NodeID": name * 56, "NodeManagerAddress": "h", "Alive": alive, "Resources": resources}


@pytest.fixture
def cluster(monkeypatch, environment):
    """Nodes of 8, 5 and 1 CPUs, and a dead one; ``answers`` by name. Trials take 2 CPUs."""
    nodes = [node("a", CPU=8.0), node("b", CPU=5.0), node("c", CPU=1.0), node("d", False, CPU=64.0)]
    asked, answers, cards = [], {}, {}

    class Remote:
        def options(self, scheduling_strategy):
            asked.append((scheduling_strategy.node_id, scheduling_strategy.soft))
            return self

        def remote(self, device, code):
            return asked[-1][0]

    def get(reference, timeout):
        assert timeout == 600
        answer = answers.get(reference[0], {"torch": "2.7"})
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, str) else (answer, cards.get(reference[0]))

    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: Remote())
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(connection.provenance, "what_computes", lambda device: {"torch": "2.7"})
    return SimpleNamespace(nodes=nodes, asked=asked, answers=answers, cards=cards)


def joined(tmp_path, most=None, cpus=2, gpus=None):
    context = RunContext(study_dir=tmp_path, num_threads=cpus, on_cluster=True)
    return connection.connect("auto", context, max_concurrent=most, gpus_per_trial=gpus)


def test_trials_at_a_time_are_what_the_living_nodes_hold(tmp_path, cluster, environment):
    told = "6 trials at a time: 4 on node aaaaaaaa (h), 2 on node bbbbbbbb (h)"
    assert joined(tmp_path) == connection.Slots({"CPU": 2, "GPU": 0}, 6, told, None, 4)
    assert cluster.asked == [("a" * 56, False), ("b" * 56, False)]  # the others run none
    assert joined(tmp_path, 6).limit is None
    told = told.replace("6 trials at a time", "5 trials at a time, of 6 that have room")
    assert joined(tmp_path, 5)[1:] == (5, told, 5, 4)
    assert joined(tmp_path, 3).on_device == 3
    assert {"AWS_REGION"} == environment.ENV_VARS_TO_PROPAGATE
    assert environment.DEFAULT_ENV_VARS
    assert joined(tmp_path, cpus=8).at_a_time == 1
    with pytest.raises(UserError, match="no node has 9 CPUs and 0 GPUs"):
        joined(tmp_path, cpus=9)


def test_a_node_that_differs_or_does_not_answer_is_named(tmp_path, cluster):
    cluster.answers["b"] = {"torch": "2.6"}
    with pytest.raises(UserError, match=r"on node bbbbbbbb \(h\), torch is 2.6 and here it is 2.7"):
        joined(tmp_path)
    cluster.answers["a"] = TimeoutError("first\nno module tune_study")
    with pytest.raises(
        UserError, match=r"node aaaaaaaa \(h\) can't run trials \(no module tune_study\)"
    ):
        joined(tmp_path)


def test_a_node_without_what_the_users_own_file_imports_is_named(tmp_path, cluster):
    code = Code("my_model.py", "grid", "import not_on_this_node", "sha", ("leaf_vit",))
    cluster.answers["b"] = connection._what_is_there("cpu", code)
    with pytest.raises(
        UserError, match=r"on node bbbbbbbb \(h\), my_model\.py runs for .*'not_on_this_node'\)"
    ):
        joined(tmp_path)
    assert connection._what_is_there("cpu", None) == ({"torch": "2.7"}, None)


def test_the_smallest_card_of_a_cluster_decides_how_many_trials_share_one(tmp_path, cluster):
    cluster.nodes[0]["Resources"]["GPU"] = 2.0
    cluster.nodes[1]["Resources"]["GPU"] = 1.0
    cluster.cards |= {"a": Card("L4", 24 * 10**9), "b": Card("H100", 80 * 10**9)}
    need = Need(7 * 10**9, 10**9)
    found = joined(tmp_path, cpus=1, gpus=need)
    assert found.resources == {"CPU": 1, "GPU": 0.3333}
    assert (found.at_a_time, found.on_device) == (6 + 3, 3)
    assert found.told == (
        "9 trials at a time: 6 on node aaaaaaaa (h) with L4, 3 on node bbbbbbbb (h) with H100"
    )
    assert joined(tmp_path, cpus=2, gpus=need).at_a_time == 4 + 2  # for want of CPUs
    assert cluster.asked[:2] == [("a" * 56, False), ("b" * 56, False)]  # those without are not
    with pytest.raises(
        UserError, match=r"can take 30.0 GB of a GPU, and L4 of node aaaaaaaa \(h\)"
    ):
        joined(tmp_path, gpus=Need(30 * 10**9, 0))


@pytest.mark.parametrize(("most", "at_a_time"), [(None, 6), (4, 4), (9, 6)])
def test_on_this_machine_the_card_decides_too(tmp_path, monkeypatch, environment, most, at_a_time):
    started = []
    monkeypatch.setattr(connection.local, "start", lambda slots, **options: started.append(slots))
    monkeypatch.setattr(connection.gpus, "smallest", lambda name: Card("L4", 24 * 10**9))
    monkeypatch.setattr(connection.gpus, "count", lambda: 2)
    monkeypatch.setattr(connection, "cores", lambda: 13)
    context = RunContext(study_dir=tmp_path, device="cuda", num_threads=2)
    need = Need(7 * 10**9, 10**9)
    found = connection.connect("local", context, max_concurrent=most, gpus_per_trial=need)
    assert found.resources == {"CPU": 0, "GPU": 0.3333, "trial_slot": 1}
    assert started == [found.at_a_time] == [at_a_time]
    assert found.told == f"{at_a_time} trials at a time: {at_a_time} on this machine with L4"
