import pytest
import torch
from torch import nn

from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.memory import step as steps
from tune_study.memory.predict import _Held
from tune_study.memory.step import (
    Ledger,
    SavedTensors,
    StepMemory,
    measure_step,
    optimizer_tensors,
    replay,
)
from tune_study.model.build import build_model
from tune_study.model.footprint import model_tensors
from tune_study.model.quantize import tensor_bytes
from tune_study.trial import train

CPU = torch.device("cpu")


def started(tiny, mode):
    config = tiny(mode)
    return train.start(config, build_model(config, 10), load("digits", Place(), config.data), CPU)


def test_replay_of_events():
    changes = [(1, 100), (2, 50), (3, -50), (5, 200), (6, -100), (7, -200)]
    assert replay(changes, mark=4) == (100, 300)
    assert replay(changes, mark=0) == (0, 300)


def test_known_sizes_are_measured_to_the_byte():
    """One linear layer whose every buffer can be counted by hand."""
    model = nn.Linear(256, 128, bias=False)
    images = torch.randn(64, 256)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    measured = measure_step(
        model, optimizer, lambda count: model(images[:count]).square().sum(), CPU
    )
    weight, output = 256 * 128 * 4, 64 * 128 * 4
    assert measured.adapter_bytes == measured.gradient_bytes == weight
    assert measured.optimizer_bytes == 2 * weight + 4
    # The output is kept for the square, the scalar loss beside it; the input was there before.
    assert output <= measured.activation_bytes <= output + 64
    assert measured.peak_train_bytes >= 3 * weight + output + weight


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_measured_bytes_repeat_to_the_byte_and_leave_no_trace(tiny, mode):
    training = started(tiny, mode)
    before = {n: p.detach().clone() for n, p in training.parameters.items()}
    random_state = torch.get_rng_state()
    first, second = train.measure_memory(training), train.measure_memory(training)
    assert first == second
    assert all(torch.equal(p, before[n]) for n, p in training.parameters.items())
    assert all(p.grad is None for p in training.parameters.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not training.optimizer.state


def test_measuring_does_not_change_the_training(tiny):
    rows = []
    for measure in (False, True):
        training = started(tiny, "nf4")
        if measure:
            train.measure_memory(training)
        rows.append([row["train_loss"] for row in train.fit(training)])
    assert rows[0] == rows[1]


def test_measuring_in_the_middle_of_a_training_does_not_change_it(tiny):
    """As when a trial resumes with a smaller micro-batch: its optimizer has state already."""

    def trained(measured):
        training = started(tiny, "nf4")
        training.model.train()
        images, labels = (tensor[:20] for tensor in training.data.train)
        for step in range(2):
            if step and measured:
                train.measure_memory(training)
            train.train_step(training, images, labels)
        states = training.optimizer.state_dict()["state"].values()
        return [v for state in states for v in state.values()] + list(training.parameters.values())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_adapter_gradient_and_optimizer_bytes_are_those_of_a_real_step(tiny):
    training = started(tiny, "nf4")
    measured = train.measure_memory(training)
    count = sum(p.numel() for p in training.parameters.values())
    assert measured.adapter_bytes == measured.gradient_bytes == 4 * count
    next(iter(train.fit(training)))
    state = optimizer_tensors(training.optimizer)
    assert measured.optimizer_bytes == tensor_bytes(state)
    assert measured.optimizer_bytes == 8 * count + 4 * len(training.parameters)


def test_activations_equal_the_saved_tensors_of_autograd(tiny):
    """The independent answer, for modes that keep everything where autograd can see it."""
    for mode in ("none", "nf4"):
        training = started(tiny, mode)
        measured = train.measure_memory(training)
        training.model.train()
        images, labels = (part[:20] for part in training.data.train)
        at_rest = {t.untyped_storage().data_ptr() for t in model_tensors(training.model)}
        saved = {}

        def pack(tensor, saved=saved, at_rest=at_rest):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in at_rest:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so never reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train._forward(training, images, labels)
        expected = sum(size for size, _ in saved.values())
        assert measured.activation_bytes == pytest.approx(expected, rel=0.001)
        assert measured.saved_tensor_bytes == expected


def test_saved_tensors_count_shared_storage_once_and_parameters_never():
    weight = nn.Parameter(torch.ones(8, 8))
    images = torch.ones(4, 8)
    with SavedTensors([weight]) as seen:
        first = images @ weight  # saves images and a view of the weight
        second = first * first.view(4, 8)  # saves first twice, once as a view
        loss = (second.exp() + images.sum()).sum()  # saves the result of exp
    assert seen.nbytes == 3 * 4 * 8 * 4
    loss.backward()


def test_int8_keeps_its_inputs_where_autograd_cannot_see_them(tiny):
    measured = train.measure_memory(started(tiny, "int8"))
    plain = train.measure_memory(started(tiny, "none"))
    assert measured.saved_tensor_bytes < 0.9 * measured.activation_bytes
    assert plain.saved_tensor_bytes == pytest.approx(plain.activation_bytes, rel=0.001)


def test_activations_grow_with_the_batch_in_a_straight_line(tiny):
    """From a constant: in bf16 ``none`` holds the cast weights too, whatever the batch."""
    found = []
    for size in (10, 20, 40):
        config = tiny("none", training={"per_device_train_batch_size": size})
        data = load("digits", Place(), config.data)
        training = train.start(config, build_model(config, 10), data, CPU)
        found.append(train.measure_memory(training))
    small, middle, large = (measured.activation_bytes for measured in found)
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.001)
    assert small > 0.9 * (middle - small)
    assert found[0].adapter_bytes == found[2].adapter_bytes


def test_an_event_exactly_at_the_mark_is_before_it():
    assert replay([(1, 5), (2, 3)], 2) == (8, 8)
    assert replay([(1, 5), (2, 3), (3, -4)], 2) == (8, 8)


def test_at_rest_are_all_but_gradients_and_activations():
    measured = StepMemory(1, 20, 300, 4_000, 50_000, 600_000, 7, 8, "a source")
    assert measured.ledger == Ledger(1, 20, 300, 4_000, 50_000, 600_000)
    assert measured.ledger.at_rest_bytes == 50_321


@pytest.mark.parametrize("extra", [1000, None])
def test_the_peak_is_what_the_step_held_beyond_the_bytes_at_rest(monkeypatch, extra):
    """A layer of 24 bytes of weights and 8 of bias, only the weights learning, by plain SGD."""
    model, asked = nn.Linear(3, 2), []
    model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model.weight], lr=1.0, momentum=0.5)

    def forward(count):
        asked.append(count)
        return model(torch.ones(4, 3)).sum()

    def meter(watched, given):
        watched().backward()
        assert given is optimizer
        return 99, extra, "planted"

    monkeypatch.setitem(steps._METERS, "cpu", meter)
    before = model.weight.detach().clone()
    found = measure_step(model, optimizer, forward, CPU)
    assert asked == [1, None]
    assert found.ledger == Ledger(8, 0, 24, 24, 24, 99)
    assert found.peak_train_bytes == (None if extra is None else 8 + 24 + 24 + 1000)
    assert found.peak_source == "planted"
    assert torch.equal(model.weight, before)
    assert not optimizer.state


def test_what_the_forward_pass_drops_is_neither_counted_nor_held():
    weight = nn.Parameter(torch.ones(1000))
    with _Held([weight]) as held, SavedTensors([weight]) as seen:
        kept = weight.exp()  # saves its result
        dropped = weight.exp()
        assert held.now == 8000
        del dropped
        assert held.now == 4000
    assert seen.nbytes == 4000
    kept.sum().backward()
