"""A captured step is the eager one to the last bit, by a recorder in the place of a CUDA graph."""

import copy

import pytest
import torch

from tests.tune_study.trial.recorded import Recorder
from tests.tune_study.trial.test_step import ACCUMULATED, NOISE, assert_equal, left, ours
from tune_study.data.mapped import Mapped
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.errors import UserError
from tune_study.model import outliers
from tune_study.model.build import build_model
from tune_study.model.outliers import make_static
from tune_study.trial import graph, train

CPU = torch.device("cpu")
IMAGES = 128
"""In batches of 20: three before the graph, three by it, and one of 8."""


def started(config, recorder=None):
    """A trial whose learning rate lies in a tensor, as on CUDA; its steps captured by one."""
    training = train.start(
        config, build_model(config, 10), load("digits", Place(), config.data), CPU
    )
    in_a_tensor(training)
    training.outliers = make_static(training.model)  # as of every trial with a graph
    if recorder is not None:
        training.graph = train.graphed(training, recorder)
    return training


def in_a_tensor(training):
    for group in training.optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]))
        group["capturable"] = True


def case(tiny, mode, **training):
    data = {"train_size": IMAGES, "augment": "flip-crop"}
    return tiny(mode, data=data, training={"warmup_steps": 2, "num_train_epochs": 3, **training})


def assert_same_epoch(captured, eager, monkeypatch):
    torch.manual_seed(8)  # of the dropout; both draw from the one generator
    row, kept = ours(captured, monkeypatch)
    mine = [tensor.clone() for tensor in left(captured)]
    torch.manual_seed(8)
    other, theirs = ours(eager, monkeypatch)
    assert_equal(mine, left(eager))
    assert kept.keys() == theirs.keys()
    for name, records in kept.items():
        assert_equal(records, theirs[name])
    assert {k: repr(v) for k, v in row.items()} == {k: repr(v) for k, v in other.items()}


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("none", {}), ("int8", NOISE), ("nf4", NOISE), ("nf4-dq", {**NOISE, **ACCUMULATED})],
)
def test_a_captured_step_is_the_eager_one_to_the_last_bit(tiny, monkeypatch, mode, settings):
    config, recorder = case(tiny, mode, **settings), Recorder()
    captured, eager = started(config, recorder), started(config)
    for replays in (3, 9):  # then all six full batches, and never the last one
        assert_same_epoch(captured, eager, monkeypatch)
        assert (recorder.captures, recorder.replays) == (1, replays)
    assert captured.step == "graph"
    assert eager.step == "eager"


def test_a_captured_evaluation_is_the_eager_one_to_the_last_bit(tiny):
    """Six full batches, three of them eager the first time, and one of two images."""
    config, recorder = case(tiny, "int8", per_device_eval_batch_size=3), Recorder()
    captured, eager = started(config), started(config)
    captured.evaluation = train.graphed_evaluation(captured, recorder)
    found = []
    for replays in (3, 9):
        found.append(train.evaluate(captured, captured.data.val))
        assert found[-1] == train.evaluate(eager, eager.data.val)
        assert (recorder.captures, recorder.replays) == (1, replays)
        for training in (captured, eager):  # a graph reads what was learned since
            with torch.no_grad():
                for parameter in training.parameters.values():
                    parameter.add_(0.01)
    assert found[0] != found[1]


def test_outliers_without_room_are_found_in_replays_and_in_evaluation(tiny, monkeypatch):
    config = case(tiny, "int8")
    monkeypatch.setattr(outliers, "ROOM", 0)
    replayed, evaluated = started(config, Recorder()), started(config)
    count = train._count_step

    def first_met_in_a_replay(training, images):
        count(training, images)
        if not training.graph.captured:
            training.outliers.met.zero_()

    monkeypatch.setattr(train, "_count_step", first_met_in_a_replay)
    words = (
        r"graph: blocks\.0\.\S+ has met \d+ outlier columns at once, and a graph has room for 0;"
    )
    with pytest.raises(UserError, match=words):
        train._train_epoch(replayed)
    with pytest.raises(UserError, match=words):
        train.evaluate(evaluated, evaluated.data.val)


def test_images_in_a_file_are_copied_to_where_the_graph_reads(tiny, monkeypatch, tmp_path):
    config, recorder = case(tiny, "none"), Recorder()
    captured, eager = started(config), started(config)
    split = captured.data.train
    split.images.numpy().tofile(tmp_path / "x.pixels")
    mapped = Mapped(tmp_path / "x.pixels", tuple(split.images.shape))
    captured.data = captured.data._replace(train=split._replace(images=mapped))
    captured.graph = train.graphed(captured, recorder)
    assert_same_epoch(captured, eager, monkeypatch)
    assert recorder.replays == 3


def test_a_captured_trial_goes_on_from_a_checkpoint(tiny, monkeypatch):
    config = case(tiny, "nf4")
    eager = started(config)
    torch.manual_seed(8)
    train._train_epoch(eager)
    state = copy.deepcopy(eager.state_dict())
    captured = started(config, Recorder())
    captured.load_state_dict(state)
    in_a_tensor(captured)
    assert_same_epoch(captured, eager, monkeypatch)


def test_a_capture_that_fails_leaves_no_trace_and_the_steps_eager(tiny, monkeypatch):
    """Out of memory within the capture: the micro-batch has fitted three times."""
    config = case(tiny, "none", **NOISE)
    captured, eager = started(config, Recorder()), started(config)
    step, calls = train.step_on_device, []

    def failing(training, images, labels):
        calls.append(training is captured)
        found = step(training, images, labels) if sum(calls) != 4 else None
        if found is None:
            with train.gradients_of_first_half() as first:
                train._forward(training, images[:8], labels[:8])[0].backward()
            training.noise.observe_halves(first)
            raise torch.OutOfMemoryError("CUDA out of memory. Planted")
        return found

    monkeypatch.setattr(train, "step_on_device", failing)
    torch.manual_seed(8)
    row = train._train_epoch(captured)
    torch.manual_seed(8)
    assert row == train._train_epoch(eager)
    assert_equal(left(captured)[:-4], left(eager)[:-4])
    assert captured.graph.failure == "CUDA out of memory. Planted"
    assert captured.step == "eager"


def test_what_would_break_a_capture_is_refused_by_the_recorder():
    x = torch.arange(4.0)
    broken = [
        lambda: (x, float(x.sum())),
        lambda: (x, x[x > 2]),
        lambda: (x, x + torch.tensor([1.0])),
    ]
    for work in broken:
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            Recorder().capture(work)


def test_a_recording_computes_nothing_and_a_replay_leaves_everything_in_its_place():
    total, number = torch.zeros(2), torch.ones(2)
    torch.manual_seed(3)
    first = torch.get_rng_state()
    found, replay = Recorder().capture(lambda: (total.add_(number * 2).clone(), torch.rand(2)))
    assert total.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), first)
    drawn = []
    for _ in range(2):
        replay()
        drawn.append(found[1].clone())
    assert found[0].tolist() == total.tolist() == [4, 4]
    torch.set_rng_state(first)
    assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(2), torch.rand(2)]))


@pytest.mark.parametrize(
    ("device", "change", "reason"),
    [
        ("cpu", {}, "--device cpu has no CUDA graphs"),
        ("mps", {}, "--device mps has no CUDA graphs"),
        ("cuda", {"data": {"augment": "code:mine"}}, "code:mine is code of yours"),
        ("cuda", {"training": {"gradient_checkpointing": True}}, "computed twice"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_in_a_sentence(tiny, device, change, reason):
    fields = {"training": {"step": "graph", **change.get("training", {})}}
    fields["data"] = change.get("data", {})
    config = tiny("nf4", **fields)
    with pytest.raises(UserError, match=f"training.step = graph: .*{reason}.*training.step=eager"):
        graph.refuse_graph(config, device)
    for step in ("eager", "auto"):
        training = config.training.model_copy(update={"step": step})
        graph.refuse_graph(config.model_copy(update={"training": training}), device)


def test_a_trial_on_a_cpu_refuses_the_graph_before_it_trains(tiny):
    config = tiny("nf4", training={"step": "graph"})
    with pytest.raises(UserError, match="--device cpu has no CUDA graphs"):
        train.start(config, None, None, CPU)


def test_auto_is_eager_and_says_so_on_cuda_alone(tiny):
    config = tiny("nf4")
    assert graph.step_of(config) == "eager"
    assert "passed its gate" in graph.why_eager(config, "cuda")
    assert graph.why_eager(config, "cpu") is graph.why_eager(config, "mps") is None
    for step in ("eager", "graph"):
        named = tiny("nf4", training={"step": step})
        assert graph.step_of(named) == step
        assert graph.why_eager(named, "cuda") is None
        assert named.trial_id != config.trial_id
