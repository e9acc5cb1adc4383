"""Planted faults, each counted exactly; a healthy run counts none."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tune_study.trial.gradients import (
    EXPLOSION_FACTOR,
    WINDOW,
    GradientFlowMonitor,
    count_explosions,
    count_loss_spikes,
    norm_statistics,
)


def monitored(gradients, losses=None, warmup_steps=0, weights=(1.0, 1.0)):
    """A monitor that saw ``gradients`` [steps][layers] of scalars in one epoch."""
    names = [f"layer{i}" for i in range(len(gradients[0]))]
    parameters = {
        name: nn.Parameter(torch.full((3,), weight))
        for name, weight in zip(names, weights, strict=False)
    }
    monitor = GradientFlowMonitor(parameters, warmup_steps=warmup_steps, steps=len(gradients) + 40)
    losses = [1.0] * len(gradients) if losses is None else losses
    for step, loss in zip(gradients, losses, strict=True):
        for parameter, value in zip(parameters.values(), step, strict=True):
            parameter.grad = torch.as_tensor(value, dtype=torch.float32).expand(3).clone()
        monitor.observe(torch.tensor(loss))
        monitor.keep()
    return monitor


def healthy(steps, layers=2):
    rng = np.random.default_rng(0)
    return rng.uniform(0.8, 1.2, (steps, layers)).tolist()


def test_a_healthy_run_counts_nothing_and_equals_the_obvious_statistics():
    gradients = healthy(60)
    columns, layers = monitored(gradients).end_epoch()
    per_layer = np.abs(np.asarray(gradients)) * math.sqrt(3)
    norms = np.linalg.norm(per_layer, axis=1)
    assert columns["grad_norm_mean"] == pytest.approx(norms.mean(), rel=1e-5)
    assert columns["grad_norm_std"] == pytest.approx(norms.std(), rel=1e-4)
    assert columns["grad_norm_min"] == pytest.approx(norms.min(), rel=1e-5)
    assert columns["grad_norm_max"] == pytest.approx(norms.max(), rel=1e-5)
    cv = norms.std() / norms.mean()
    assert columns["grad_norm_cv"] == pytest.approx(cv, rel=1e-4)
    assert columns["stability_score"] == pytest.approx(1 / (1 + cv), rel=1e-5)
    assert layers == pytest.approx(per_layer.mean(0).tolist(), rel=1e-5)
    faults = ("grad_explosions", "grad_vanishing_layers", "loss_spikes")
    assert [columns[name] for name in faults] == [0, 0, 0]


def test_the_norm_it_returns_is_the_one_that_clipping_uses():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    model(torch.randn(2, 5)).square().sum().backward()
    monitor = GradientFlowMonitor(dict(model.named_parameters()), warmup_steps=0, steps=1)
    norm = monitor.observe(torch.tensor(0.0))
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(model.parameters(), 1e9))


def test_an_explosion_is_counted_once_and_does_not_hide_the_next():
    gradients = healthy(60)
    gradients[30] = [1e3, 1e3]
    gradients[45] = [2e3, 2e3]
    columns, _ = monitored(gradients).end_epoch()
    assert columns["grad_explosions"] == 2
    assert columns["loss_spikes"] == 0


def test_a_nan_is_an_explosion_and_no_stability():
    gradients = healthy(60)
    gradients[20] = [float("nan"), 1.0]
    columns, layers = monitored(gradients).end_epoch()
    assert columns["grad_explosions"] == 1
    assert columns["stability_score"] == 0
    assert math.isfinite(columns["grad_norm_mean"])
    assert all(math.isfinite(value) for value in layers)


def test_a_vanishing_layer_is_counted_after_twenty_steps_in_a_row():
    for tiny_steps, expected in ((19, 0), (20, 1), (40, 1)):
        gradients = healthy(60)
        for step in range(10, 10 + tiny_steps):
            gradients[step][1] = 1e-9
        assert monitored(gradients).end_epoch()[0]["grad_vanishing_layers"] == expected
    broken = healthy(60)
    for step in [*range(10, 25), *range(26, 41)]:  # 15 and 15 with a normal step between
        broken[step][1] = 1e-9
    assert monitored(broken).end_epoch()[0]["grad_vanishing_layers"] == 0


def test_vanishing_is_relative_to_the_weights_and_starts_after_warm_up():
    small = [[1e-4, 1e-4]] * 60
    assert monitored(small).end_epoch()[0]["grad_vanishing_layers"] == 0
    heavy = monitored(small, weights=(1.0, 1e4))
    assert heavy.end_epoch()[0]["grad_vanishing_layers"] == 1
    zero = [[0.0, 1.0]] * 25
    assert monitored(zero, warmup_steps=10).end_epoch()[0]["grad_vanishing_layers"] == 0
    assert monitored(zero, warmup_steps=5).end_epoch()[0]["grad_vanishing_layers"] == 1
    # Step 0 is exempt: B is 0 there, and the gradient of A with it.
    assert monitored([[0.0, 1.0]] * 20).end_epoch()[0]["grad_vanishing_layers"] == 0
    assert monitored([[0.0, 1.0]] * 21).end_epoch()[0]["grad_vanishing_layers"] == 1


def test_a_vanishing_run_goes_on_over_the_epoch_and_a_restart():
    monitor = monitored([[0.0, 1.0]] * 15)
    assert monitor.end_epoch()[0]["grad_vanishing_layers"] == 0
    other = monitored([[1.0, 1.0]])
    other.load_state_dict(monitor.state_dict())
    for again in (monitor, other):
        for _ in range(10):
            for parameter, value in zip(again._parameters, (0.0, 1.0), strict=True):
                parameter.grad = torch.full((3,), value)
            again.observe(torch.tensor(1.0))
            again.keep()
        assert again.end_epoch()[0]["grad_vanishing_layers"] == 1


def test_a_loss_spike_is_counted():
    losses = (1 + 0.05 * np.sin(np.arange(60))).tolist()
    losses[40] = 3.0
    columns, _ = monitored(healthy(60), losses).end_epoch()
    assert (columns["loss_spikes"], columns["grad_explosions"]) == (1, 0)
    losses[50] = float("inf")
    assert monitored(healthy(60), losses).end_epoch()[0]["loss_spikes"] == 2


def test_noise_of_small_batches_is_no_spike():
    for seed in range(5):
        losses = np.random.default_rng(seed).gamma(4, 0.05, 2000)  # a heavy tail around 0.2 nats
        assert count_loss_spikes(losses, [])[0] == 0


def test_an_oscillating_gradient_has_a_negative_cosine():
    flipping = [[(-1.0) ** step, (-1.0) ** step] for step in range(20)]
    assert monitored(flipping).end_epoch()[0]["gradient_cosine_successive"] == pytest.approx(-1)
    steady = [[1.0, 2.0]] * 20
    assert monitored(steady).end_epoch()[0]["gradient_cosine_successive"] == pytest.approx(1)


def test_a_monitor_that_is_not_connected_raises():
    weight = nn.Parameter(torch.ones(2))
    monitor = GradientFlowMonitor({"w": weight}, warmup_steps=0, steps=3)
    with pytest.raises(RuntimeError, match="not connected"):
        monitor.end_epoch()
    monitor.observe(torch.tensor(1.0))
    monitor.keep()
    monitor.keep()  # a step that it did not see
    with pytest.raises(RuntimeError, match="not connected"):
        monitor.end_epoch()


def test_more_steps_than_an_epoch_has_are_no_epoch():
    monitor = monitored(healthy(60))
    for _ in range(41):  # there is room for 100
        monitor.observe(torch.tensor(1.0))
        monitor.keep()
    with pytest.raises(RuntimeError, match="101 steps in an epoch of 100"):
        monitor.end_epoch()


def test_a_layer_without_gradient_counts_as_zero():
    parameters = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    monitor = GradientFlowMonitor(parameters, warmup_steps=0, steps=30)
    for _ in range(30):
        parameters["a"].grad = torch.ones(2)
        monitor.observe(torch.tensor(1.0))
        monitor.keep()
    columns, layers = monitor.end_epoch()
    assert columns["grad_vanishing_layers"] == 1
    assert layers[1] == 0


def slow_explosions(norms):
    """The definition, step by step."""
    count = 0
    for step, norm in enumerate(norms):
        before = [n for n in norms[:step] if math.isfinite(n)][-WINDOW:]
        if not math.isfinite(norm) or (
            len(before) >= 5 and norm > EXPLOSION_FACTOR * float(np.median(before))
        ):
            count += 1
    return count


def test_explosions_equal_the_slow_version_however_the_epochs_are_cut():
    rng = np.random.default_rng(2)
    norms = rng.lognormal(0, 1.5, 300)
    norms[[7, 100, 250]] = np.nan
    expected = slow_explosions(norms.tolist())
    assert expected > 10
    for pieces in (1, 2, 7):
        total, tail = 0, []
        for piece in np.array_split(norms, pieces):
            count, tail = count_explosions(piece, tail)
            total += count
        assert total == expected


def test_statistics_of_nothing_finite_are_nan_and_not_zero():
    columns = norm_statistics(np.array([np.nan, np.inf]))
    assert math.isnan(columns["grad_norm_mean"])
    assert columns["stability_score"] == 0


def test_an_explosion_is_more_than_ten_times_the_median_of_fifty_steps():
    assert count_explosions(np.array([1.0] * 5 + [10.0]), [])[0] == 0
    assert count_explosions(np.array([1.0] * 5 + [10.5]), [])[0] == 1
    assert count_explosions(np.array([1.0] * 4 + [99.0]), [])[0] == 0  # no median yet
    window = [1.0] * 25 + [9.0] * 25  # its median is 5; with one more of either it is not
    for before in ([], [9.0] * 9):
        count, tail = count_explosions(np.array([51.0]), [*before, *window])
        assert (count, tail) == (1, [*window[1:], 51.0])
        assert count_explosions(np.array([49.0]), [*before, *window])[0] == 0


def test_a_spike_is_above_a_nat_and_six_deviations():
    calm = np.array([2.0] * 5)
    for last, count in ((3.0, 0), (3.01, 1), (0.0, 0)):
        assert count_loss_spikes(np.array([*calm, last]), [])[0] == count
    assert count_loss_spikes(np.array([*calm[1:], 9.0]), [])[0] == 0  # no median yet
    noisy = [1.0, 2.0, 3.0] * 20  # a deviation of 1.4826 around 2: to 10.9
    for last, count in ((10.8, 0), (11.0, 1)):
        found, tail = count_loss_spikes(np.array([last]), noisy)
        assert (found, tail) == (count, [*noisy[-49:], last])
    window = [1.0] * 25 + [2.0] * 25  # the median of fifty is 1.5, the deviation 0.7413
    for before in ([], [2.0] * 9):
        assert count_loss_spikes(np.array([5.9]), [*before, *window])[0] == 0
        assert count_loss_spikes(np.array([6.0]), [*before, *window])[0] == 1


def test_norms_of_zero_have_no_variation():
    columns = norm_statistics(np.zeros(3))
    assert columns["grad_norm_mean"] == columns["grad_norm_max"] == 0
    assert math.isnan(columns["grad_norm_cv"])
    assert set(columns) == set(norm_statistics(np.array([np.nan])))


def test_the_columns_of_an_epoch_by_hand():
    columns, layers = monitored([[1.0, 0.0], [0.0, 2.0], [0.0, 6.0]]).end_epoch()
    root = math.sqrt(3)  # of a layer's three equal values
    assert columns["grad_norm_mean"] == pytest.approx(3 * root)
    assert columns["grad_norm_std"] == pytest.approx(math.sqrt(14 / 3) * root)
    assert columns["grad_norm_min"] == pytest.approx(root)
    assert columns["grad_norm_max"] == pytest.approx(6 * root)
    assert columns["gradient_cosine_successive"] == pytest.approx(0.5)  # of 0 and 1
    assert layers == pytest.approx([root / 3, 8 * root / 3])


def test_a_layer_is_tiny_under_a_ten_millionth_of_its_weights():
    for value, count in ((0.99e-7, 1), (1.01e-7, 0)):
        gradients = [[value, 1.0]] * 30
        assert monitored(gradients).end_epoch()[0]["grad_vanishing_layers"] == count


def test_what_the_next_epoch_counts_by_survives_a_restart():
    monitor = monitored([[0.0, 1.0]] * 7, [2.0] * 7, warmup_steps=3)
    monitor.end_epoch()
    state = monitor.state_dict()
    norm = pytest.approx([math.sqrt(3)] * 7)
    tails = {"norm_tail": norm, "loss_tail": [2.0] * 7}
    assert state == {"step": 7, "tiny_run": [4, 0], **tails}
    other = monitored([[1.0, 1.0]], warmup_steps=3)
    other.load_state_dict(state)
    assert other.state_dict() == state
    for parameter in other._parameters:
        parameter.grad = torch.full((3,), 50.0)
    other.observe(torch.tensor(9.0))
    other.keep()
    columns, _ = other.end_epoch()
    assert (columns["grad_explosions"], columns["loss_spikes"]) == (1, 1)
    assert math.isnan(columns["gradient_cosine_successive"])  # not with what was seen before


def test_small_norms_vary_as_large_ones_do():
    for scale in (0.01, 1.0, 100.0):
        columns = norm_statistics(scale * np.array([1.0, 1.0, 4.0]))
        assert columns["grad_norm_cv"] == pytest.approx(math.sqrt(2) / 2)
        assert columns["stability_score"] == pytest.approx(1 / (1 + math.sqrt(2) / 2))
