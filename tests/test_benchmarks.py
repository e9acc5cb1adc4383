"""What the benchmarks compute from times; never a time itself."""

import json
import math
import os
import subprocess

import numpy as np
import pytest

from benchmarks import cluster_scaling, peers
from benchmarks.__main__ import line
from benchmarks.scaling import PHASES, Cost, growth, table
from benchmarks.timing import Comparison, alternate, compare
from tune_study.machine import environment


def test_sides_take_turns_after_one_unmeasured_run():
    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    found = alternate({"a": side("a"), "b": side("b")}, rounds=3)
    assert "".join(order) == "ababbaab"
    assert found == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_a_ratio_is_of_neighbours_and_its_median_meets_the_target_or_not():
    measured = {"ours": [10.0, 4.0, 30.0], "theirs": [5.0, 1.0, 10.0]}
    found = compare("speed", ">= 3.0", measured, "ours", "theirs")
    assert found.ratios == [2.0, 4.0, 3.0]
    assert found.median == 3.0
    assert found.met
    assert found.sides == {"ours": 10.0, "theirs": 5.0}
    assert not found._replace(target=">= 3.1").met
    assert found._replace(target="<= 3.0").met
    assert not found._replace(target="<= 2.9").met


@pytest.mark.parametrize(("ratio", "word"), [(0.5, "met"), (1.5, "**missed**")])
def test_a_row_of_the_table_says_whether_the_target_is_met(ratio, word):
    one = Comparison("overhead", "<= 1.0", [ratio], {}, "s")
    row = line(one._asdict() | {"median": one.median, "met": one.met})
    assert row.split(" | ")[4] == word
    assert "one run" in row


def test_growth_is_per_ten_times_the_trials_and_bold_when_faster_than_linear():
    assert growth([1.0, 8.0, 64.0], [10, 100, 1000])[1:] == pytest.approx([8.0, 8.0])
    assert growth([1.0, 4.0], [10, 20])[1:] == pytest.approx([100.0])  # quadratic
    sizes = {144: Cost(1.0, math.nan, 2**20), 1440: Cost(11.0, math.nan, 2**21)}
    rows = table({size: dict.fromkeys(PHASES, cost) for size, cost in sizes.items()}).splitlines()
    assert rows[2] == "| plan | 144 | 1.00 |  |  |  |  | 1 |  |"
    assert rows[3] == "| plan | 1,440 | 11.00 | **11.0** |  |  |  | 2 | 2.0 |"


def test_slots_are_busy_while_trials_run_in_them():
    started, ended = {"a": 10.0, "b": 11.0, "c": 20.0}, {"a": 19.0, "b": 29.0, "c": 30.0}
    seen = cluster_scaling.Seen(started, ended, 42.5, 300_000_000, 310_000_000)
    text, busy = cluster_scaling.table(seen, slots=2, epoch_s=4.0)
    assert busy == (9 + 18 + 10) / (2 * 20)
    rows = dict(line.strip("| ").rsplit(" | ", 1) for line in text.splitlines()[2:])
    assert list(rows.values()) == [
        *("3", "2", "20.0", "92.5%", "60.0%", "10.0", "12.5", "300", "310"),
    ]


def test_a_study_is_watched_line_by_line_to_its_end(tmp_path):
    output = tmp_path / "output.txt"
    program = "a: started\na: epoch 1/2\na: completed, 0.9\nb: started\nb: failed, 1\n"
    command = ["sh", "-c", f"printf '{program}' > {output}"]
    output.touch()
    seen = cluster_scaling.watch(subprocess.Popen(command), output, 1)
    assert (list(seen.started), list(seen.ended)) == (["a", "b"], ["a"])
    assert seen.done >= seen.ended["a"]
    output.write_text("")
    with pytest.raises(SystemExit, match="did not complete:\na: started"):
        cluster_scaling.watch(subprocess.Popen(command), output, 2)


def test_a_verdict_can_be_written_as_json():
    ratio = np.float64(0.5)  # as pandas gives it
    one = Comparison("a / b", ">= 0.95", [ratio], {}, "s")
    assert json.loads(json.dumps({"met": one.met, "median": one.median})) == {
        "met": False,
        "median": 0.5,
    }


@pytest.mark.slow
def test_the_other_side_measures_in_a_process_without_our_settings(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(environment, "set_by_prepare", {"OMP_WAIT_POLICY"})
    seen = []

    class Seen(subprocess.Popen):
        def __init__(self, *args, **options):
            seen.append(options["env"])
            super().__init__(*args, **options)

    monkeypatch.setattr(peers.subprocess, "Popen", Seen)
    with peers.peer("step", "vit_glyphs_patch4_32", "nf4", 2, 1, "cpu", "fp32") as measure:
        assert all(0 < measure() < 10_000 for _ in range(2))
    assert "OMP_WAIT_POLICY" not in seen[0]
    assert seen[0].keys() == os.environ.keys() - {"OMP_WAIT_POLICY"}
