import copy
import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from search_spaces import own_code
from search_spaces.own_code import Code
from tune_study.data.batches import preprocess
from tune_study.data.place import Place, Preprocessing
from tune_study.data.sources import Split
from tune_study.data.splits import Dataset, load
from tune_study.model.build import build_model, trainable
from tune_study.trial import train

CPU = torch.device("cpu")
MODES = ["none", "int8", "nf4", "nf4-dq"]


def started(config):
    return train.start(config, build_model(config, 10), load("digits", Place(), config.data), CPU)


def comparable(rows):
    timed = ("epoch_time_s", "train_time_s", "train_energy_j", "images_per_s")
    return [{k: repr(v) for k, v in row.items() if k not in timed} for row in rows]


@pytest.mark.parametrize("mode", MODES)
def test_training_moves_adapters_and_head_and_nothing_else(tiny, mode):
    training = started(tiny(mode))
    model = training.model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    learning = {n: p.detach().clone() for n, p in training.parameters.items()}
    list(train.fit(training))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "bias" not in name:
            assert torch.equal(parameter, frozen[name]), name
        elif not parameter.requires_grad:
            # bitsandbytes casts the bias of a 4-bit layer to the compute dtype, for good.
            torch.testing.assert_close(
                parameter.float(), frozen[name].float(), rtol=1e-2, atol=1e-3
            )
    moved = {n: not torch.equal(p, learning[n]) for n, p in training.parameters.items()}
    assert all(moved.values()), [n for n, m in moved.items() if not m]


@pytest.mark.parametrize("mode", ["none", "int8", "nf4", "nf4-dq"])
def test_the_same_trial_twice_and_resumed_is_equal_to_the_last_bit(tiny, mode):
    config = tiny(mode, training={"num_train_epochs": 3})
    whole = started(config)
    rows = list(train.fit(whole))
    again = started(config)
    assert comparable(train.fit(again)) == comparable(rows)

    first = started(config)
    next(iter(train.fit(first)))
    state = copy.deepcopy(first.state_dict())
    torch.manual_seed(999)  # whatever another trial left behind
    resumed = started(config)
    resumed.load_state_dict(state)
    list(train.fit(resumed))
    assert comparable(resumed.history) == comparable(rows)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    assert train.test(whole) == train.test(resumed)


def test_a_transform_of_ones_own_is_repeated_and_resumed_to_the_last_bit(tiny):
    """In the place of the crops: what it sees are the images themselves, and nothing else is."""
    text = (
        "import torch\n"
        "SEEN = []\n"
        "def noisy(images, generator):\n"
        "    SEEN.append(images.clone())\n"
        "    return images + 90 * torch.rand(images.shape, generator=generator)\n"
    )
    code = Code("/me/mine.py", "grid", text, hashlib.sha256(text.encode()).hexdigest())
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 16}
    config = tiny("nf4", data={"augment": "code:noisy"}, training=training)
    data = load("digits", Place(), config.data)

    def begun(config=config):
        return train.start(config, build_model(config, 10), data, CPU, code)

    whole = begun()
    rows = list(train.fit(whole))
    seen = own_code.module_of(code).SEEN
    assert [len(images) for images in seen] == [16, 16, 8] * 3  # in training alone
    images = [torch.cat(seen[start : start + 3]).flatten(1) for start in (0, 3, 6)]
    expected = data.train.images.flatten(1).unique(dim=0)
    assert all(torch.equal(epoch.unique(dim=0), expected) for epoch in images)

    first = begun()
    next(iter(train.fit(first)))
    state = copy.deepcopy(first.state_dict())
    torch.manual_seed(999)
    resumed = begun()
    resumed.load_state_dict(state)
    list(train.fit(resumed))
    assert comparable(resumed.history) == comparable(rows)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name

    plain = begun(tiny("nf4", data={"augment": "none"}, training=training))
    assert plain.transform is None
    assert comparable(train.fit(plain)) != comparable(rows)


def test_seeds_differ(tiny):
    losses = [next(iter(train.fit(started(tiny("none", seed=s)))))["train_loss"] for s in (1, 2)]
    assert losses[0] != losses[1]


def test_accumulation_equals_one_large_batch(tiny):
    settings = {"compute_dtype": "fp32", "num_train_epochs": 1}
    lora = {"lora_dropout": 0.0}
    large = started(tiny("none", lora=lora, training={**settings}))
    small = started(
        tiny(
            "none",
            lora=lora,
            training={
                **settings,
                "per_device_train_batch_size": 5,
                "gradient_accumulation_steps": 4,
            },
        )
    )
    for training in (large, small):
        list(train.fit(training))
    assert large.history[0]["train_loss"] == pytest.approx(small.history[0]["train_loss"], rel=1e-5)
    for name, parameter in large.parameters.items():
        torch.testing.assert_close(parameter, small.parameters[name], rtol=1e-3, atol=1e-5)


def test_the_monitor_reads_the_true_gradients_before_clipping(tiny):
    config = tiny("none", training={"max_grad_norm": 1e-6, "num_train_epochs": 1})
    training = started(config)
    seen = []
    observe = training.monitor.observe

    def spy(loss):
        grads = [p.grad for p in training.parameters.values()]
        seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        return observe(loss)

    training.monitor.observe = spy
    row = next(iter(train.fit(training)))
    assert row["grad_norm_mean"] == pytest.approx(sum(seen) / len(seen), rel=1e-4)
    assert row["grad_norm_mean"] > 1e-3  # far above the clip
    assert len(seen) == 2


def test_a_disconnected_monitor_fails_the_trial(tiny):
    training = started(tiny("none"))
    training.monitor.observe = lambda loss: torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="not connected"):
        next(iter(train.fit(training)))


def test_evaluate_equals_the_plain_computation(tiny):
    training = started(tiny("nf4", data={"train_size": 40, "val_size": 70, "test_size": 20}))
    split = training.data.val
    assert len(split.labels) > 2 * train.EVAL_IMAGES_ON_CPU
    loss, accuracy = train.evaluate(training, split)
    training.model.eval()
    with torch.no_grad(), train.autocast(training):
        scores = training.model(preprocess(split.images, training.preprocessing)).float()
    assert loss == pytest.approx(float(cross_entropy(scores, split.labels)), rel=1e-3)
    hits = int((scores.argmax(-1) == split.labels).sum())
    assert accuracy == hits / len(split.labels)


def test_only_a_batch_without_int8_is_evaluated_in_parts(tiny):
    sizes = {mode: train.images_per_evaluation(started(tiny(mode))) for mode in ("none", "int8")}
    assert sizes == {"none": train.EVAL_IMAGES_ON_CPU, "int8": 128}
    overridden = {"mode": "none", "overrides": {"*.qkv": "int8"}}
    assert train.images_per_evaluation(started(tiny(overridden))) == 128
    small = tiny("none", training={"per_device_eval_batch_size": 7})
    assert train.images_per_evaluation(started(small)) == 7


def test_early_stopping_keeps_the_best_epoch_and_tests_it(tiny, monkeypatch):
    config = tiny("none", training={"num_train_epochs": 9, "early_stopping_patience": 2})
    training = started(config)
    accuracies = iter([0.3, 0.5, 0.5, 0.4])
    monkeypatch.setattr(train, "evaluate", lambda t, split: (1.0, next(accuracies)))
    rows = list(train.fit(training))
    assert len(rows) == 4
    assert train.finished(training) == "early_stopped"
    assert training.best_epoch == 2
    assert training.best_accuracy == 0.5
    final = {n: p.detach().clone() for n, p in training.parameters.items()}
    accuracies = iter([0.9])
    assert train.test(training)["test_accuracy"] == 0.9
    for name, parameter in training.parameters.items():
        assert torch.equal(parameter, training.best[name])
    assert any(not torch.equal(final[n], p) for n, p in training.parameters.items())


def test_a_loss_that_is_not_finite_ends_the_trial_as_diverged(tiny):
    training = started(tiny("none", training={"learning_rate": 10.0, "max_grad_norm": 1e9}))
    with torch.no_grad():
        training.parameters["head.weight"].fill_(torch.nan)
    rows = list(train.fit(training))
    assert len(rows) == 1
    assert math.isnan(rows[0]["train_loss"])
    assert train.finished(training) == "diverged"
    assert training.best_epoch == 0


def test_schedule_warms_up_then_follows_the_cosine(tiny):
    config = tiny("none", training={"num_train_epochs": 4, "warmup_steps": 4, "learning_rate": 1})
    training = started(config)  # 2 steps an epoch
    rates = []
    for _ in range(8):
        rates.append(training.schedule.rate)
        training.optimizer.step()
        training.schedule.step()
    expected = [0, 0.25, 0.5, 0.75] + [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx(expected)


def test_weight_decay_spares_biases(tiny):
    training = started(tiny("none"))
    decays = {group["weight_decay"]: group["params"] for group in training.optimizer.param_groups}
    assert len(decays[0.0]) == 1  # the head's bias
    assert len(decays[0.01]) == len(trainable(training.model)) - 1


def test_training_learns(tiny):
    config = tiny(
        "nf4",
        data={"train_size": 200, "val_size": 100, "test_size": 100},
        training={"num_train_epochs": 3},
    )
    training = started(config)
    rows = list(train.fit(training))
    assert rows[-1]["val_accuracy"] > 0.6
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_scale_is_measured_and_changes_no_bit_of_the_training(tiny, mode):
    plain = started(tiny(mode))
    rows = list(train.fit(plain))
    watched = started(tiny(mode, training={"gradient_noise_scale": True}))
    found = list(train.fit(watched))
    assert all(math.isnan(row["gradient_noise_scale"]) for row in rows)
    assert all(row["gradient_noise_trace"] > 0 for row in found)
    noise = train.NO_NOISE_SCALE
    assert comparable([r | noise for r in found]) == comparable([r | noise for r in rows])
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, watched.parameters[name]), name


def test_the_noise_of_halves_is_that_of_two_micro_batches(tiny):
    """Without dropout: the same halves, once from one pass and once from two."""
    found = []
    for micro, accumulated in ((20, 1), (10, 2)):
        settings = {
            "gradient_noise_scale": True,
            "compute_dtype": "fp32",
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulated,
        }
        config = tiny("none", lora={"lora_dropout": 0.0}, training=settings)
        found.append(next(iter(train.fit(started(config)))))
    halves, parts = found
    for name in train.NO_NOISE_SCALE:
        assert halves[name] == pytest.approx(parts[name], rel=1e-3), name


def test_gradients_are_clipped_to_the_configured_norm(tiny, monkeypatch):
    training = started(tiny("nf4", training={"max_grad_norm": 0.01}))
    training.model.train()
    norms, step = [], training.optimizer.step

    def watched():
        gradients = [p.grad for p in training.parameters.values() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step()

    monkeypatch.setattr(training.optimizer, "step", watched)
    train.train_step(training, *(tensor[:20] for tensor in training.data.train))
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def bare(tiny, images=45, **fields):
    """A trial whose model is one layer: ``start`` without the second that a backbone takes."""
    split = Split(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), torch.zeros(images).long())
    test = Split(split.images[:3], split.labels[:3])
    data = Dataset(split, Split(split.images[:7], split.labels[:7]), test, ["a", "b"], "")
    built = SimpleNamespace(model=torch.nn.Linear(2, 2), preprocessing=None, factors={})
    return train.start(tiny("none", **fields), built, data, CPU)


def test_a_started_trial_has_the_seed_the_steps_and_the_settings_of_its_configuration(tiny):
    settings = {"warmup_steps": 2, "num_train_epochs": 4, "weight_decay": 0.25}
    training = bare(tiny, seed=17, training={**settings, "learning_rate": 0.5})
    assert torch.initial_seed() == training.generator.initial_seed() == 17
    decayed, spared = training.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in spared["params"]] == [1]
    assert training.schedule.peak == 0.5
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.0, 0.0]
    assert training.monitor._warmup_steps == 2
    assert training.noise is None
    for _ in range(11):  # of 12 steps: 45 images are 3 an epoch
        assert training.schedule.rate >= 0
        training.optimizer.step()
        training.schedule.step()
    assert training.schedule.rate == pytest.approx(0.25 * (1 + math.cos(math.pi * 9 / 10)))
    assert training.optimizer.param_groups[1]["lr"] == training.schedule.rate
    assert bare(tiny, training={"gradient_noise_scale": True}).noise is not None


def test_an_epoch_averages_over_its_images_and_says_its_last_rate(tiny, monkeypatch):
    training = bare(tiny)
    steps = iter([(20, 1.0, 5), (20, 2.0, 7), (5, 8.0, 0)])

    def step(_, images, labels):
        count, loss, hits = next(steps)
        assert len(images) == len(labels) == count
        return torch.tensor(loss), torch.tensor(hits)

    training.monitor = SimpleNamespace(end_epoch=lambda: ({"grad_norm_mean": 3.0}, [1.0]))
    rates = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(train.Schedule, "rate", property(lambda _: next(rates)))
    monkeypatch.setattr(train, "train_step", step)
    training.model.eval()
    row, layers = train._train_epoch(training)
    assert training.model.training
    assert row["train_loss"] == pytest.approx((20 * 1 + 20 * 2 + 5 * 8) / 45)
    assert row["train_accuracy"] == 12 / 45
    assert (row["learning_rate"], row["grad_norm_mean"], layers) == (0.3, 3.0, [1.0])


def test_times_and_speed_of_an_epoch(tiny, monkeypatch):
    training = bare(tiny, training={"num_train_epochs": 1})
    clock, asked = iter([100.0, 104.0, 105.0]), []
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    counter = iter([70.0, 82.0])
    training.joules = lambda: next(counter)
    monkeypatch.setattr(train, "_train_epoch", lambda t: ({"train_loss": 1.0}, [2.0]))
    monkeypatch.setattr(train, "evaluate", lambda t, split: asked.append(split) or (0.5, 0.75))
    (row,) = train.fit(training)
    assert row == {
        "epoch": 1,
        "train_loss": 1.0,
        "val_loss": 0.5,
        "val_accuracy": 0.75,
        "epoch_time_s": 5.0,
        "train_time_s": 4.0,
        "train_energy_j": 12.0,
        "images_per_s": 45 / 4,
    }
    assert training.layer_gradients == [[2.0]]
    assert train.test(training) == {"test_accuracy": 0.75, "test_loss": 0.5}
    assert asked == [training.data.val, training.data.test]


@pytest.mark.parametrize(
    ("losses", "accuracies", "patience", "status", "best"),
    [
        ([], [], 0, None, 0),
        ([(1, 1)], [0.1], 0, None, 1),
        ([(math.nan, 1)], [0.1], 0, "diverged", 0),
        ([(1, 1), (1, math.inf)], [0.1, 0.9], 0, "diverged", 1),
        ([(1, 1)] * 3, [0.3, 0.3, 0.2], 0, "completed", 1),
        ([(1, 1)] * 2, [0.3, 0.3], 1, "early_stopped", 1),
        ([(1, 1)] * 2, [0.3, 0.3], 2, None, 1),
        ([(1, 1)] * 2, [0.3, 0.4], 1, None, 2),
    ],
)
def test_when_a_trial_ends(tiny, losses, accuracies, patience, status, best):
    settings = {"num_train_epochs": 3, "early_stopping_patience": patience}
    training = bare(tiny, training=settings)
    for (train_loss, val_loss), accuracy in zip(losses, accuracies, strict=True):
        row = {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": accuracy}
        training.history.append(row)
        train._keep_best(training)
    assert train.finished(training) == status
    assert training.best_epoch == best
    assert bool(training.best) == bool(best)


def test_a_loaded_state_is_the_one_that_was_saved(tiny):
    training, other = bare(tiny), bare(tiny, seed=5)
    training.history = [{"epoch": 1, "val_accuracy": 0.5}]
    training.layer_gradients, training.best_epoch = [[1.0, 2.0]], 1
    training.best = {"weight": torch.ones(2, 2)}
    training.monitor._step, training.monitor._loss_tail = 9, [3.0]
    training.optimizer.step()
    training.schedule.step()
    torch.rand(3)
    state = copy.deepcopy(training.state_dict())
    drawn = torch.rand(1), torch.rand(1, generator=training.generator)
    other.load_state_dict(state)
    assert repr(other.state_dict()) == repr(state)
    assert other.best_accuracy == 0.5
    assert (torch.rand(1), torch.rand(1, generator=other.generator)) == drawn


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bf16_is_autocast_and_fp32_is_plain(tiny, dtype):
    with train.autocast(bare(tiny, training={"compute_dtype": dtype})):
        assert torch.is_autocast_enabled("cpu") is (dtype == "bf16")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_another_device_evaluates_whole_batches(tiny):
    training = bare(tiny, training={"per_device_eval_batch_size": 100})
    assert train.images_per_evaluation(training) == train.EVAL_IMAGES_ON_CPU == 32
    training.device = torch.device("cuda")
    assert train.images_per_evaluation(training) == 100


def test_evaluation_drops_nothing_and_memory_is_that_of_training(tiny, monkeypatch):
    settings = {"compute_dtype": "fp32", "per_device_eval_batch_size": 3}
    training = bare(tiny, training={**settings, "per_device_train_batch_size": 4})
    assert training.optimizer.defaults["fused"] is True
    layers = torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 64, 2)
    training.model = torch.nn.Sequential(*layers)
    training.preprocessing = Preprocessing(8, "bilinear", (0.5,) * 3, (0.5,) * 3)
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.tensor([0, 1, 1, 0, 1, 1, 1]))
    training.model.train()
    loss, accuracy = train.evaluate(training, split)
    assert not training.model.training
    scores = training.model(preprocess(images, training.preprocessing)).detach()
    assert loss == pytest.approx(float(cross_entropy(scores, split.labels)))
    assert accuracy == int((scores.argmax(-1) == split.labels).sum()) / 7

    def measured(model, optimizer, forward, device):
        assert model.training
        seen = []
        monkeypatch.setattr(train, "_forward", lambda t, x, y: seen.append((len(x), len(y))) or [0])
        forward(None), forward(1)
        return seen

    monkeypatch.setattr(train, "measure_step", measured)
    assert train.measure_memory(training) == [(4, 4), (1, 1)]
