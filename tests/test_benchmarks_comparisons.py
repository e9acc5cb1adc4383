"""Our training against others': what can't be had is a row, and the rest is compared."""

import contextlib
import sys

import pytest
import torch

from benchmarks import accelerator, comparisons, peers, timm_script
from benchmarks.comparisons import ratios, told, turns
from benchmarks.peers import Missing, Side
from benchmarks.processes import Row
from benchmarks.timing import Comparison
from tests.tune_study.pretend import pretended
from tests.tune_study.trial.recorded import Recorder
from tune_study.trial import train

TINY = "vit_glyphs_patch4_32"
SMALL = {
    "models": [TINY], "model": TINY, "mode": "nf4", "batch": 4, "steps": 2, "device": "cpu",
    "large_batch": None,
}  # fmt: skip
ON_GPU = {**SMALL, "batch": 32, "device": "cuda"}


def planted(*rates):
    left = list(rates)
    return lambda: left.pop(0)


def missing():
    raise Missing("no such card")


def raising():
    raise ValueError("planted\nand more")


def returned(generator):
    """(rows, what a generator of rows returns)."""
    rows = []
    while True:
        try:
            rows.append(next(generator))
        except StopIteration as end:
            return rows, end.value


@pytest.fixture
def fixed(monkeypatch):
    """Every side has a rate by its name; nothing is trained and no process started."""
    rates = {"eager": 1.0, "graph": 8.0, "step": 2.0, "captured": 4.0, "tuned": 0.5}
    rates |= {"compiled": 2.0, "script": 4.0}

    class Ours:
        def __init__(self, cell, step):
            self.step = step

        def rate(self):
            return rates[self.step]

    monkeypatch.setattr(comparisons, "Ours", Ours)
    monkeypatch.setattr(comparisons.Cell, "dtype", "bf16")  # a GPU's, and there is none
    peer = lambda what, *given: contextlib.nullcontext(lambda: rates[what])  # noqa: E731
    monkeypatch.setattr(comparisons, "peer", peer)
    for name in ("_share", "_against_kernels"):
        monkeypatch.setattr(comparisons, name, lambda name, *given: Row(name, None, "planted"))
    return rates


def found_by(rows):
    return {row.name: row.found for row in rows}


def test_a_part_for_each_comparison_and_the_most_telling_first():
    parts = accelerator.comparisons(accelerator.FULL)
    kinds = [part.function.partition(":")[2] for part in parts.values()]
    counts = {kind: kinds.count(kind) for kind in accelerator.COMPARISONS}
    assert counts == {"steps": 16, "modes": 1, "epochs": 16, "script": 4}
    assert all(callable(getattr(comparisons, kind)) for kind in kinds)
    assert kinds[:3] == ["steps", "modes", "epochs"]
    first = parts["compare-steps-deit_tiny_patch16_224-32-none"]
    assert first.given == {"model": "deit_tiny_patch16_224", "batch": 32, "mode": "none"}
    assert next(iter(parts.values())) == first
    cells = {(part.given["model"], part.given["batch"]) for part in parts.values()}
    assert len(cells) == 4
    assert len(accelerator.comparisons(accelerator.QUICK)) == 4 + 1 + 4 + 1


def test_a_name_stands_for_all_parts_that_begin_with_it():
    parts = {**accelerator.PARTS, **accelerator.comparisons(accelerator.QUICK)}
    everything = ",".join(accelerator.PARTS).split(",")
    assert not any(name.startswith("compare") for name in accelerator.chosen(everything, parts))
    found = list(accelerator.chosen(["compare-epochs", "models"], parts))
    assert [name.rpartition("-")[2] for name in found[:-1]] == ["none", "nf4", "int8", "dq"]
    assert found[-1] == "models"
    assert list(accelerator.chosen(["demo"], {"demo": 1, "demo-large": 2})) == ["demo"]
    for name in ("compare-nonsense", ""):
        with pytest.raises(KeyError) as refused:
            accelerator.chosen(["doctor", name], parts)
        assert refused.value.args == (name,)


def test_what_a_part_is_given_of_its_own_reaches_it(tmp_path):
    part = accelerator.Part("tests.planted_parts:sound", 60.0, {"batch": 32})
    found = {"parts": {}}
    accelerator.check({"x": part}, SMALL, 6.0, 1e12, found, lambda: None)
    assert found["parts"]["x"]["rows"][0]["found"] == "32 | images"


def test_a_side_that_cannot_be_had_is_a_row_and_the_others_are_compared(capsys):
    ours, theirs = planted(0, 0, *[4.0, 6.0, 5.0, 4.0, 9.0]), planted(0, 0, *[2.0] * 5)
    sides = {"ours": ours, "theirs": theirs, "far": missing, "broken": raising}
    rows, rates = returned(turns(sides))
    assert rows[:2] == [
        Row("far", None, "missing: no such card"),
        Row("broken", False, "ValueError: planted"),
    ]
    assert rates == {"ours": [4.0, 6.0, 5.0, 4.0, 9.0], "theirs": [2.0] * 5}
    assert rows[2].found == "5.0 images/s (4.0 to 9.0)"
    assert "and more" in capsys.readouterr().err
    bounds = {("ours", "theirs"): 3.0, ("ours", "far"): 1.0}
    (row,) = ratios(rates, bounds, "cpu")
    assert (row.name, row.found) == ("ours / theirs", "2.50 (2.00 to 4.50)")
    assert row.figures == {"ratios": [2.0, 3.0, 2.5, 2.0, 4.5]}
    (row,) = ratios(rates, bounds, "cuda")
    assert row.found == "2.50 (2.00 to 4.50), target >= 3.0: **missed**"
    assert row.ok is None
    assert returned(turns({"far": missing}))[1] == {}


def test_a_ratio_that_is_promised_says_whether_it_is_met():
    found = Comparison("a / b", "<= 1.15", [1.1, 1.2, 1.1], {}, "")
    assert told(found, judged=True) == "1.10 (1.10 to 1.20), target <= 1.15: met"
    assert told(found, judged=False) == "1.10 (1.10 to 1.20)"


def test_steps_are_compared_eager_and_captured_with_what_is_promised_of_them(fixed):
    found = found_by(comparisons.steps(ON_GPU))
    assert found["graph / eager"] == "8.00 (8.00 to 8.00), target >= 9.0: **missed**"
    assert found["graph / plain, captured"] == "2.00 (2.00 to 2.00), target >= 1.15: met"
    assert found["graph / plain"] == "4.00 (4.00 to 4.00)"
    assert found["eager / plain"] == "0.50 (0.50 to 0.50)"
    assert found["graph: share of the card's product rate"] == "planted"
    assert "graph: time / its kernels' time" in found
    large = found_by(comparisons.steps({**ON_GPU, "batch": 256}))
    assert large["graph / eager"] == "8.00 (8.00 to 8.00)"
    assert "target >= 1.15" in large["graph / plain, captured"]


def test_an_epoch_is_held_against_the_faster_trainer(fixed):
    found = found_by(comparisons.epochs(ON_GPU))
    assert found["graph / Trainer"] == "16.00 (16.00 to 16.00)"
    assert found["graph / Trainer, compiled"] == "4.00 (4.00 to 4.00), target >= 5.0: **missed**"


def test_timms_script_is_compared_with_none(fixed):
    assert found_by(comparisons.script(SMALL))["eager / timm"] == "0.25 (0.25 to 0.25)"


def test_the_full_grid_is_estimated_from_all_modes_of_both_models(fixed, monkeypatch):
    fixed["graph"] = 100.0
    seconds = dict.fromkeys(comparisons.MODES, 1.0)
    row = Row("beside", None, "", {"seconds": seconds})
    monkeypatch.setattr(comparisons, "_beside", lambda *given: row)
    both = {**ON_GPU, "models": [TINY, "another"]}
    rows = {row.name: row for row in comparisons.modes(both)}
    assert rows["another, nf4 / another, none"].found.endswith("target >= 0.9: met")
    assert rows["another, nf4-dq / another, none"].found == "1.00 (1.00 to 1.00)"
    grid = rows["the full grid"]
    assert grid.figures == {"steps_min": 8 * 18 * 250 * 32 / 100 / 60, "beside_min": 2.4}
    assert grid.found.startswith("estimated, 144 trials of 250 steps one after the other: 192.0")
    assert grid.found.endswith("target <= 15 min: **missed**")
    alone = {row.name: row for row in comparisons.modes(ON_GPU)}
    assert alone["the full grid"].found == "missing: it needs every mode of both models"


def test_what_a_further_trial_costs_is_all_but_its_epochs_and_its_test(monkeypatch, tmp_path):
    seen, clock = [], iter(range(0, 1000, 10))

    def execute(config, context, report):
        seen.append((config.quantization.mode, config.seed, config.data.train_size))
        times = {"train_time_s": 4.0, "eval_time_s": 2.5}
        return {"train": {"training_results": times}}

    monkeypatch.setattr(comparisons, "execute", execute)
    monkeypatch.setattr(comparisons.time, "perf_counter", lambda: next(clock))
    row = comparisons._beside("x", {**SMALL, "folder": str(tmp_path)})
    assert [mode for mode, _, _ in seen] == ["none", *comparisons.MODES]
    assert len(set(seen)) == 5  # the first is a trial of its own
    assert seen[1][1:] == (42, 8)
    assert row.figures["seconds"] == dict.fromkeys(comparisons.MODES, 3.5)


def test_the_time_of_a_step_is_held_against_its_kernels(monkeypatch):
    work = {"kernels_ms": 500.0, "found": "3 kernels"}
    monkeypatch.setattr(comparisons, "device_work", lambda *given: work)
    cell = comparisons.cell_of(ON_GPU)
    ours = comparisons.Ours(cell, "graph")  # of 64 images
    row = comparisons._against_kernels("x", cell, ours, [128.0, 64.0, 128.0])
    assert row.found == "1.00 (1.00 to 2.00), target <= 1.15: met; 3 kernels"
    row = comparisons._against_kernels("x", cell._replace(mode="int8"), ours, [128.0])
    assert "target" not in row.found
    row = comparisons._against_kernels("x", cell._replace(device="cpu"), ours, [128.0])
    assert row.found == "missing: --device cpu launches no kernels of CUDA's"


def test_our_side_is_a_trials_epoch_and_has_no_graph_on_a_cpu(monkeypatch):
    cell = comparisons.cell_of(SMALL)
    with pytest.raises(Missing, match="--device cpu has no CUDA graphs"):
        comparisons.Ours(cell, "graph").rate()
    ours = comparisons.Ours(cell, "eager")
    trained = []
    monkeypatch.setattr(train, "_train_epoch", trained.append)
    assert ours.rate() > 0
    assert ours.rate() > 0
    first, second = trained
    assert first is second
    assert len(first.data.train.labels) == ours.images == 8
    monkeypatch.setattr(comparisons, "started", None)  # it is built once
    ours.rate()


@pytest.mark.slow
@pytest.mark.ci
def test_our_side_is_replayed_where_there_are_graphs_or_says_why_not(monkeypatch):
    monkeypatch.setattr(train, "Cuda", Recorder)
    with pretended("cuda"):
        cell = comparisons.cell_of({**SMALL, "mode": "none", "steps": 4, "device": "cuda"})
        ours = comparisons.Ours(cell, "graph")
        ours.epoch()
        assert ours._training.graph.captured

        def failing(*_):
            raise RuntimeError("planted")

        monkeypatch.setattr(Recorder, "capture", failing)
        with pytest.raises(RuntimeError, match="no graph: planted"):
            comparisons.Ours(cell, "graph").epoch()


def test_there_are_as_many_images_as_are_asked_for():
    training = comparisons.started(comparisons.cell_of(SMALL).config, "cpu", 2000)
    images, labels = training.data.train
    assert len(images) == len(labels) == 2000
    again = 2000 - len(peers.load("digits", peers.Place(), training.config.data).train.labels)
    assert torch.equal(images[-again:], images[:again])


def test_the_other_side_says_why_it_cannot_be_had(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    side = Side(TINY, "none", 4, 2, "cpu", "fp32", "")
    with pytest.raises(Missing, match="no module transformers"):
        peers.trainer_of(side, bool)
    with pytest.raises(Missing, match="--device cpu has no CUDA graphs"):
        peers.SIDES["captured"](side, [], print)


@pytest.mark.slow
@pytest.mark.ci
def test_a_reason_comes_from_the_other_process():
    with peers.peer("captured", TINY, "none", 4, 2, "cpu", "fp32") as measure:
        with pytest.raises(Missing, match="--device cpu has no CUDA graphs"):
            measure()
        for _ in range(2):  # the second time it has surely ended, and the question stays behind
            with pytest.raises(Missing, match="its process ended with 0"):
                measure()


@pytest.mark.slow
@pytest.mark.ci
def test_timms_loop_trains_all_weights(monkeypatch):
    made = []
    create = timm_script.timm.create_model
    monkeypatch.setattr(
        timm_script.timm, "create_model", lambda *a, **o: made.append(create(*a, **o)) or made[0]
    )
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    pairs = list(zip(peers.pictures(images), range(4), strict=True))
    epoch = timm_script.epoch_of(TINY, pairs, 2, "cpu", 0)
    before = {name: p.detach().clone() for name, p in made[0].named_parameters()}
    epoch()
    same = [n for n, p in made[0].named_parameters() if torch.equal(p, before[n])]
    assert same == []


@pytest.mark.slow
@pytest.mark.ci
def test_a_trainer_goes_on_as_long_as_somebody_asks(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(peers, "workers", lambda: 1)
    answers = []
    side = Side(TINY, "none", 2, 2, "cpu", "fp32", str(tmp_path))
    peers._tuned(side, iter(["\n"] * 3), answers.append)
    assert len(answers) == 3
    assert all(0 < rate < 10_000 for rate in answers)
    peers._tuned(side, iter([]), answers.append)
    assert len(answers) == 3
