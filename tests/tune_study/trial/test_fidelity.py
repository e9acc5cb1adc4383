import copy
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tune_study.data.batches import preprocess
from tune_study.data.place import Place, Preprocessing
from tune_study.data.splits import load
from tune_study.errors import UserError
from tune_study.model import build
from tune_study.model.build import build_model
from tune_study.model.initial import effective_weight, lora_layers
from tune_study.trial import fidelity, train
from tune_study.trial.fidelity import (
    features_of,
    gradient_fidelity,
    gradients_of,
    output_fidelity,
    twin,
)

CPU = torch.device("cpu")


def started(config):
    return train.start(config, build_model(config, 10), load("digits", Place(), config.data), CPU)


def both(training):
    """By the plain way: a twin that was built, even beside full precision, and no look shared."""
    with twin(training, None) as other:
        gradients = [gradients_of(training, model) for model in (training.model, other)]
        features = [features_of(training, model) for model in (training.model, other)]
    head = fidelity._pretrained_head(training, None)
    return gradient_fidelity(*gradients), output_fidelity(*features, head)


def test_full_precision_equals_its_twin_exactly(tiny):
    training = started(tiny("none"))
    for _ in range(2):  # before training and after
        gradients, outputs = both(training)
        assert (gradients.cosine, gradients.norm_ratio) == (1.0, 1.0)
        known = [layer for layer in gradients.layers.values() if layer["cosine"] is not None]
        assert known
        assert all(layer == {"cosine": 1.0, "norm_ratio": 1.0} for layer in known)
        assert tuple(outputs) == (1.0, 1.0, 0.0)
        list(train.fit(training))


def test_coarser_quantization_is_further_away(tiny):
    found = {mode: both(started(tiny(mode))) for mode in ("int8", "nf4", "fp4")}
    cosines = [gradients.cosine for gradients, _ in found.values()]
    assert 1 > cosines[0] > cosines[1] > cosines[2] > 0.5
    features = [outputs.feature_cosine for _, outputs in found.values()]
    assert 1 > features[0] > features[1] > features[2] > 0.5
    divergences = [outputs.pretrained_logit_kl for _, outputs in found.values()]
    assert 0 < divergences[0] < divergences[1]
    assert all(0.5 < outputs.pretrained_top1_agreement <= 1 for _, outputs in found.values())


def test_gradients_are_those_of_the_plain_loss(tiny):
    """The independent answer: both gradients by hand, without dropout, in one batch."""
    training = started(tiny("nf4", lora={"lora_dropout": 0.0}))
    list(train.fit(training))
    with twin(training, None) as other:
        found = gradient_fidelity(
            *(gradients_of(training, model) for model in (training.model, other))
        )
        sides = []
        for model in (training.model, other):
            model.train()
            images, labels = (tensor[:32] for tensor in training.data.train)
            with train.autocast(training):
                scores = model(preprocess(images, training.preprocessing))
            cross_entropy(scores.float(), labels).backward()
            learning = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
            sides.append(torch.cat([g.flatten() for g in learning.values() if g is not None]))
    expected = torch.cosine_similarity(*(side.double() for side in sides), dim=0)
    assert found.cosine == pytest.approx(float(expected), abs=1e-3)
    ratio = sides[0].norm() / sides[1].norm()
    assert found.norm_ratio == pytest.approx(float(ratio), rel=1e-2)


def test_before_the_first_step_only_b_and_the_head_have_a_gradient(tiny):
    layers = both(started(tiny("nf4")))[0].layers
    assert all(
        (layer["cosine"] is None) == name.endswith("lora_A") for name, layer in layers.items()
    )


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_it_leaves_no_trace(tiny, mode):
    runs = []
    for look in (False, True):
        training = started(tiny(mode))
        rows = []
        for row in train.fit(training):
            if look:
                states = torch.get_rng_state(), training.generator.get_state()
                both(training)
                assert torch.equal(torch.get_rng_state(), states[0])
                assert torch.equal(training.generator.get_state(), states[1])
                assert all(p.grad is None for p in training.parameters.values())
            rows.append((row["train_loss"], row["val_loss"], row["grad_norm_mean"]))
        runs.append((rows, {n: p.detach().clone() for n, p in training.parameters.items()}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, runs[1][1][n]) for n, p in runs[0][1].items())


def test_a_model_without_a_pretrained_head_has_no_logits(tiny):
    outputs = both(started(tiny("nf4", pretrained=False)))[1]
    assert 0 < outputs.feature_cosine < 1
    assert math.isnan(outputs.pretrained_top1_agreement)
    assert math.isnan(outputs.pretrained_logit_kl)


@pytest.mark.parametrize(
    "spec",
    [
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq", "use_dora": True},
    ],
)
def test_the_twin_of_a_base_without_what_the_adapters_took(tiny, spec):
    """It begins at the full-precision weights, so that the rest is the error of quantization."""
    fp32 = {"compute_dtype": "fp32"}
    training = started(tiny("nf4", lora=spec, training=fp32))
    whole = dict(lora_layers(started(tiny("none", training=fp32)).model))
    before = training.model.base_model.model.blocks[0].attn.qkv.lora_B["default"].weight
    before = before.detach().clone()
    for moment in ("start", "end"):
        with twin(training, None) as other:
            for name, layer in lora_layers(other):
                mine = training.parameters[f"{name}.lora_B"]
                assert torch.equal(layer.lora_B["default"].weight, mine)
                if moment == "start":
                    full = whole[name].base_layer.weight
                    assert float((effective_weight(layer) - full).norm() / full.norm()) < 1e-5
        if moment == "start":
            list(train.fit(training))
    assert not torch.equal(training.parameters["blocks.0.attn.qkv.lora_B"], before)


def test_an_initialisation_made_for_quantized_bases_brings_the_features_nearer(tiny):
    found = {
        how: both(started(tiny("nf4", lora={"init_lora_weights": how, "loftq_iter": 5})))
        for how in ("default", "loftq", "pissa")
    }
    for how in ("loftq", "pissa"):
        assert found[how][1].feature_cosine > found["default"][1].feature_cosine
        # Neither A nor B is 0: every tensor has a gradient from the first step on.
        assert all(layer["cosine"] is not None for layer in found[how][0].layers.values())


def test_a_wrong_twin_is_seen(tiny):
    training = started(tiny("none"))
    list(train.fit(training))
    with twin(training, None) as other:
        broken = copy.deepcopy(other)
        with torch.no_grad():
            broken.base_model.model.blocks[2].attn.qkv.base_layer.weight.mul_(1.05)
        ours, theirs = (gradients_of(training, model) for model in (training.model, broken))
        assert gradient_fidelity(ours, theirs).cosine < 1


def test_products_that_are_not_finite_are_nan():
    assert all(math.isnan(value) for value in fidelity._compare((math.nan, math.nan, 1.0)))
    assert all(math.isnan(value) for value in fidelity._compare((0.0, 0.0, 1.0)))


@pytest.fixture
def builds(monkeypatch):
    """Grows by one with every twin that is built; what an earlier test looked at is forgotten."""
    builds = []
    real = build.build_model
    monkeypatch.setattr(
        fidelity, "build_model", lambda *given, **more: builds.append(0) or real(*given, **more)
    )
    monkeypatch.setattr(fidelity, "_latest", {})
    return builds


@pytest.mark.parametrize("modes", [("none", "int8", "nf4"), ("int8", "none", "nf4")])
def test_modes_of_a_seed_share_one_look_at_their_twin_and_get_what_they_would_alone(
    tiny, builds, modes
):
    trials = [started(tiny(mode)) for mode in modes]
    found = [fidelity.at_start(training, None) for training in trials]
    # At full precision a trial is its own twin, and the twin of the modes after it.
    assert len(builds) == (0 if modes[0] == "none" else 1)
    assert found == [both(training) for training in trials]


def test_another_seed_and_another_state_of_the_adapters_have_another_twin(tiny, builds):
    fidelity.at_start(started(tiny("nf4")), None)
    training = started(tiny("nf4", seed=43))
    for count in (2, 3):
        found = fidelity.at_start(training, None)
        assert len(builds) == count
        assert found == both(training)
        del builds[count:]
        next(iter(train.fit(training)))


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_the_end_is_that_of_a_twin_that_was_built(tiny, builds, mode):
    training = started(tiny(mode))
    list(train.fit(training))
    found = fidelity.at_end(training, None)
    assert len(builds) == (mode != "none")
    assert found == both(training)[0]


def test_the_divergence_is_that_of_the_quantized_classes_from_the_twins():
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    ours, theirs = torch.tensor([[0.0, 3.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    q, p = (math.exp(x) / (1 + math.exp(x)) for x in (3.0, 1.0))  # of the second class
    by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    reverse = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    found = output_fidelity(ours, theirs, head)
    assert found.pretrained_logit_kl == pytest.approx(by_hand, rel=1e-6)
    assert abs(by_hand - reverse) > 0.05
    assert found.pretrained_top1_agreement == 1.0


def test_the_cosine_is_over_all_of_lora_and_the_layers_are_all_that_learn():
    ours = {
        "a.lora_A": torch.tensor([[3.0, 4.0]]),
        "b.lora_B": torch.tensor([1.0]),
        "head.weight": torch.tensor([5.0]),
        "c.lora_A": torch.zeros(2),
    }
    theirs = {
        "a.lora_A": torch.tensor([[0.0, 2.0]]),
        "b.lora_B": torch.tensor([-3.0]),
        "head.weight": torch.tensor([-1.0]),
        "c.lora_A": torch.ones(2),
    }
    found = gradient_fidelity(ours, theirs)
    # Products of a, b and c: 8, -3, 0; squares 25, 1, 0 against 4, 9, 2.
    assert found.cosine == pytest.approx(5 / math.sqrt(26 * 15))
    assert found.norm_ratio == pytest.approx(math.sqrt(26 / 15))
    assert found.layers == {
        "a.lora_A": {"cosine": pytest.approx(0.8), "norm_ratio": 2.5},
        "b.lora_B": {"cosine": -1.0, "norm_ratio": pytest.approx(1 / 3)},
        "head.weight": {"cosine": -1.0, "norm_ratio": 5.0},
        "c.lora_A": {"cosine": None, "norm_ratio": None},
    }


def test_outputs_are_means_over_uneven_images():
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]]).double()
    theirs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [4.0, 3.0], [1.0, 0.0]]).double()
    found = output_fidelity(ours, theirs, head)
    assert found.feature_cosine == pytest.approx((1 + 0 + 0.96 + 1) / 4)
    assert found.pretrained_top1_agreement == 0.5
    each = (math.e - 1) / (math.e + 1)  # of the two images whose classes are exchanged
    assert found.pretrained_logit_kl == pytest.approx(2 * each / 4, rel=1e-6)
    without = output_fidelity(ours, theirs, None)
    assert without.feature_cosine == found.feature_cosine
    assert math.isnan(without.pretrained_top1_agreement)
    assert math.isnan(without.pretrained_logit_kl)


def test_looking_leaves_every_layer_in_its_mode_and_drops_nothing(tiny):
    """On a model of one layer, in two micro-batches of 20 and 12 of the first 32 images."""
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 64, 3), torch.nn.ReLU()
    )
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(50) % 3
    how = Preprocessing(8, "bilinear", (0.5,) * 3, (0.5,) * 3)
    config = tiny("none", training={"compute_dtype": "fp32"})
    training = SimpleNamespace(
        config=config,
        device=CPU,
        preprocessing=how,
        data=SimpleNamespace(train=(images, labels)),
    )
    model.eval()
    model[2].train()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = gradients_of(training, model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model[2].weight.grad is None
    model.eval()
    cross_entropy(model(preprocess(images[:32], how)), labels[:32]).backward()
    torch.testing.assert_close(found["2.weight"], model[2].weight.grad)
    torch.testing.assert_close(found["2.bias"], model[2].bias.grad)


def test_a_look_is_shared_only_where_all_that_it_depends_on_is_the_same(tiny, monkeypatch):
    looks = []
    monkeypatch.setattr(fidelity, "_latest", {})
    monkeypatch.setattr(fidelity, "_look", lambda *_: fidelity.Look({}, torch.zeros(1)))
    monkeypatch.setattr(fidelity, "_pretrained_head", lambda *_: looks.append(0))
    monkeypatch.setattr(fidelity, "_full_precision", lambda *_: nullcontext())
    monkeypatch.setattr(fidelity, "gradient_fidelity", lambda *_: None)
    monkeypatch.setattr(fidelity, "output_fidelity", lambda *_: None)

    def look(mode="nf4", *, weights=None, sha256="a", state=(1.0, 2.0), **fields):
        parameters = {str(n): torch.tensor(value) for n, value in enumerate(state)}
        data = SimpleNamespace(sha256=sha256)
        config = tiny(mode, **fields)
        training = SimpleNamespace(
            config=config, data=data, device=CPU, parameters=parameters, model=None
        )
        before = len(looks)
        fidelity.at_start(training, weights)
        assert len(fidelity._latest) == 1
        return len(looks) > before

    assert look()
    assert not look()
    assert not look("int8")
    assert not look("none")
    others = [
        {"weights": Path("file")},
        {"sha256": "b"},
        {"seed": 9},
        {"lora": {"r": 8}},
        {"state": (1.0, 3.0)},
    ]
    for other in others:
        assert look(**other)
        assert look()


def test_the_pretrained_head_is_the_one_linear_classifier_there_is(tiny, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    cfg, names, asked = SimpleNamespace(num_classes=3), ["0"], []
    monkeypatch.setattr(fidelity.timm, "get_pretrained_cfg", lambda name: cfg)
    monkeypatch.setattr(fidelity, "load_base", lambda *given: asked.append(given) or model)
    monkeypatch.setattr(fidelity, "classifier_names", lambda model: names)

    def head(**fields):
        training = SimpleNamespace(config=tiny("none", **fields))
        return fidelity._pretrained_head(training, Path("weights"))

    assert head() is model[0]
    assert [given[1:] for given in asked] == [(3, Path("weights"))]
    assert head(pretrained=False) is None
    for found in (["1"], ["0", "1"], []):
        names[:] = found
        assert head() is None
    names[:] = ["0"]
    cfg.num_classes = 0
    assert head() is None
    cfg.num_classes = 1
    assert head() is model[0]

    def features_alone(*_):
        torch.rand(1)
        raise UserError("no head")

    monkeypatch.setattr(fidelity, "load_base", features_alone)
    state = torch.get_rng_state()
    assert head() is None
    assert torch.equal(torch.get_rng_state(), state)
