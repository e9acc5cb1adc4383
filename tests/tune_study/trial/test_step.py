"""A step of static shape is the plain step of plain.py, to the last bit."""

import copy

import pytest
import torch

from tests.tune_study.trial import plain
from tune_study.data.mapped import Mapped
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.folder.schema import MODES
from tune_study.model.build import build_model
from tune_study.trial import train

CPU = torch.device("cpu")


def started(config):
    """45 images: with batches of 20 the last has 5, which are no two equal halves."""
    return train.start(config, build_model(config, 10), load("digits", Place(), config.data), CPU)


def left(training):
    """Everything that the next epoch begins with."""
    optimizer = training.optimizer.state_dict()
    states = [v for state in optimizer["state"].values() for v in state.values()]
    generators = [training.generator.get_state(), torch.get_rng_state()]
    rates = [torch.tensor(float(group["lr"])).double() for group in optimizer["param_groups"]]
    return [*training.parameters.values(), *states, *generators, *rates]


def ours(training, monkeypatch):
    """(row of an epoch, what the monitor and the noise scale kept of its steps)."""
    kept = {}
    for watch in filter(None, (training.monitor, training.noise)):

        def end(watch=watch, ended=watch.end_epoch):
            kept[type(watch).__name__] = watch._records[: watch._kept].clone()
            return ended()

        monkeypatch.setattr(watch, "end_epoch", end)
    row, _ = train._train_epoch(training)
    monkeypatch.undo()
    return row, kept


def assert_equal(mine, theirs):
    """NaN equals NaN."""
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_same_epochs(training, other, schedule, epochs, monkeypatch):
    """Trains both, and compares every figure, tensor and generator after each epoch."""
    for _ in range(epochs):
        torch.manual_seed(8)  # of the dropout; both draw from the one generator
        row, kept = ours(training, monkeypatch)
        mine = [tensor.clone() for tensor in left(training)]
        torch.manual_seed(8)
        found = plain.epoch(other, schedule)
        assert_equal(mine, left(other))
        assert_equal(kept["GradientFlowMonitor"], torch.stack(found.watched))
        if training.noise is not None:
            assert len(found.noise) > 0
            assert_equal(kept["NoiseScale"], torch.stack(found.noise))
        total = len(training.data.train.labels)
        sums = (found.loss / total, found.hits / total, found.learning_rate)
        assert (row["train_loss"], row["train_accuracy"], row["learning_rate"]) == sums


def case(tiny, mode, *, augment="flip-crop", **training):
    data = {"train_size": 45, "augment": augment}
    return tiny(mode, data=data, training={"warmup_steps": 2, **training})


NOISE = {"gradient_noise_scale": True}
ACCUMULATED = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        *((mode, NOISE) for mode in MODES),
        ("none", {}),
        ("int8", {"augment": "crop"}),
        ("nf4", {"augment": "none"}),
        ("none", {**NOISE, **ACCUMULATED}),
        ("int8", ACCUMULATED),
        ("nf4", {"compute_dtype": "fp32", "gradient_checkpointing": True}),
    ],
)
def test_a_step_is_the_plain_one_to_the_last_bit(tiny, monkeypatch, mode, settings):
    config = case(tiny, mode, **settings)
    training, other = started(config), started(config)
    schedule = plain.schedule_of(other, steps_per_epoch=3)
    assert_same_epochs(training, other, schedule, 2, monkeypatch)


def test_images_in_a_file_are_trained_on_as_those_in_memory(tiny, monkeypatch, tmp_path):
    config = case(tiny, "none")
    training, other = started(config), started(config)
    split = training.data.train
    split.images.numpy().tofile(tmp_path / "x.pixels")
    mapped = Mapped(tmp_path / "x.pixels", tuple(split.images.shape))
    training.data = training.data._replace(train=split._replace(images=mapped))
    schedule = plain.schedule_of(other, steps_per_epoch=3)
    assert_same_epochs(training, other, schedule, 1, monkeypatch)


def test_a_trial_goes_on_from_a_checkpoint_with_torchs_own_schedule(tiny, monkeypatch):
    """As versions wrote it that had transformers' schedule."""
    config = case(tiny, "nf4")
    other = started(config)
    schedule = plain.schedule_of(other, steps_per_epoch=3)
    plain.epoch(other, schedule)
    state = copy.deepcopy(other.state_dict() | {"schedule": schedule.state_dict()})
    assert state["schedule"]["last_epoch"] == 3
    training = started(config)
    training.load_state_dict(state)
    assert_same_epochs(training, other, schedule, 1, monkeypatch)


def test_what_a_step_reads_and_writes_stays_where_it_is(tiny):
    training = started(case(tiny, "none", **NOISE))

    def places():
        watches = [vars(watch).values() for watch in (training.monitor, training.noise)]
        states = [state.values() for state in training.optimizer.state.values()]
        tensors = [t for some in (*watches, *states) for t in some if isinstance(t, torch.Tensor)]
        learned = list(training.parameters.values())
        return [t.data_ptr() for t in (*tensors, *learned, *training.normalisation)]

    train._train_epoch(training)
    before = places()
    assert len(before) > 100
    train._train_epoch(training)
    assert places() == before


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 7), (100, 150), (9, 5)])
def test_the_schedule_is_transformers_to_the_last_bit(warmup, total):
    def optimizer():
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=3e-4)

    theirs = optimizer()
    reference = plain.get_cosine_schedule_with_warmup(theirs, warmup, total)
    mine = optimizer()
    schedule = train.Schedule(mine, 3e-4, warmup, total)
    for _ in range(total):
        assert schedule.rate == reference.get_last_lr()[0] == mine.param_groups[0]["lr"]
        theirs.step(), reference.step(), schedule.step()


def test_a_rate_on_the_device_stays_in_its_tensor():
    rate = torch.tensor(3e-4)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=rate, fused=True)
    schedule = train.Schedule(optimizer, 3e-4, 0, 10)
    for _ in range(4):
        schedule.step()
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(schedule.rate, rel=1e-7)
    assert schedule.rate < 3e-4
