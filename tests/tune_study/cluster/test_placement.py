"""How many trials share a GPU, and what is said of it."""

import pytest

from tune_study.cluster.placement import Room, fit, share_of_all, told
from tune_study.errors import UserError
from tune_study.machine.gpus import Card, Need

GB = 10**9
L4, H100 = Card("NVIDIA L4", 24 * GB), Card("NVIDIA H100", 80 * GB)


@pytest.mark.parametrize(
    ("step", "images", "share"),
    [
        (24 * GB, 0, 1.0),
        (12 * GB + 1, 0, 1.0),
        (12 * GB, 0, 0.5),
        (8 * GB, 0, 0.3333),
        (2 * GB, 0, 0.0833),
        (6 * GB, 2 * GB, 0.3333),
        (6 * GB, 7 * GB, 0.25),  # so many images stay in their file
        (None, 0, 1.0),
        (1, 0, 0.01),
    ],
)
def test_as_many_share_a_gpu_as_its_memory_holds(step, images, share):
    assert share_of_all(Need(step, images), {"here": L4}) == share
    assert share_of_all(Need(step, images), {"here": L4, "there": H100}) == share
    # Ray gives a share out as often as it goes into one, in ten-thousandths.
    assert int(10_000 // round(share * 10_000)) == fit({"GPU": 1}, {"GPU": share})


def test_a_card_that_is_too_small_is_named():
    with pytest.raises(
        UserError, match=r"auto: a trial can take 30.0 GB of a GPU, and NVIDIA L4 of b has 24.0 GB"
    ):
        share_of_all(Need(30 * GB, 0), {"a": H100, "b": L4})


@pytest.mark.parametrize(
    ("there", "each", "trials"),
    [
        ({"CPU": 8, "GPU": 1}, {"CPU": 2, "GPU": 0.5}, 2),
        ({"CPU": 3, "GPU": 9}, {"CPU": 2, "GPU": 0.5}, 1),
        ({"CPU": 8}, {"CPU": 2, "GPU": 0.5}, 0),
        ({"CPU": 8}, {"CPU": 2, "GPU": 0}, 4),
        ({"CPU": 8, "GPU": 2}, {"CPU": 1, "GPU": 0.4}, 4),  # 5 only if one lay on two GPUs
        ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.3333}, 3),
        ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.1}, 8),
        ({"CPU": 8, "GPU": 5}, {"CPU": 1, "GPU": 2}, 2),
    ],
)
def test_a_trial_takes_what_there_is_least_of(there, each, trials):
    assert fit(there, each) == trials


def test_where_trials_run_is_told_by_node_and_of_many_by_kind():
    some = [Room("node a (1.2.3.4)", None, 4), Room("node b (1.2.3.5)", L4, 2)]
    assert told(some, 6) == (
        "6 trials at a time: 4 on node a (1.2.3.4), 2 on node b (1.2.3.5) with NVIDIA L4"
    )
    assert told(some[:1], 1) == "1 trial at a time, of 4 that have room: 4 on node a (1.2.3.4)"
    many = [Room(f"node {n}", H100, 4) for n in range(1_000)] + some
    assert told(many, 4_006) == (
        "4,006 trials at a time: 4 on each of 1,000 nodes with NVIDIA H100, 4 on one node, "
        "2 on one node with NVIDIA L4"
    )
