import threading

import pytest
import torch

import tune_study.memory.predict as memory_predict
from tune_study.data.place import Place
from tune_study.data.splits import load
from tune_study.machine.device import without_bf16
from tune_study.memory.predict import _Held, of_a_step, predict
from tune_study.model.build import build_model
from tune_study.model.outliers import make_static
from tune_study.trial import train

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]


@pytest.mark.parametrize("mode", [*MODES, "mixed"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_predicted_ledger_is_the_measured_one(tiny, mode, compute_dtype):
    """Weight-side categories to the byte; activations and peak within what docs/memory.md says."""
    overrides = {"blocks.0.*": "int8", "blocks.1.attn.*": "nf4-dq"} if mode == "mixed" else {}
    quantization = {"mode": "nf4" if mode == "mixed" else mode, "overrides": overrides}
    training = {"compute_dtype": compute_dtype, "per_device_train_batch_size": 5}
    config = tiny(mode, quantization=quantization, training=training)
    data = load("digits", Place(), config.data)
    random_state = torch.get_rng_state()
    expected = predict(config, 10, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random_state)
    training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
    measured = train.measure_memory(training)
    assert expected.ledger[:5] == measured.ledger[:5]
    assert expected.ledger.activation_bytes == pytest.approx(measured.activation_bytes, rel=1e-4)
    # A CPU without bf16 instructions widens the operands of a product in memory of its own.
    near = 0.03 if compute_dtype == "bf16" and without_bf16("cpu") else 3e-3
    assert expected.peak_train_bytes == pytest.approx(measured.peak_train_bytes, rel=near)


def test_int8_keeps_no_inputs_where_steps_are_a_graph(tiny):
    """As in a trial with one; the CPU's kernels take more for moments than CUDA's, the peak too."""
    found = {}
    for step in ("eager", "graph"):
        training = {"step": step, "per_device_train_batch_size": 5}
        config = tiny("int8", training=training)
        data = load("digits", Place(), config.data)
        found[step] = predict(config, 10, torch.device("cpu")).ledger
        eager = config.model_copy(update={"training": tiny("int8").training})
        training = train.start(eager, build_model(config, 10), data, torch.device("cpu"))
        training.config = config
        if step == "graph":
            make_static(training.model)
        measured = train.measure_memory(training).ledger
        assert found[step][:5] == measured[:5]
        assert found[step].activation_bytes == pytest.approx(measured.activation_bytes, rel=1e-4)
    assert found["graph"].activation_bytes < 0.9 * found["eager"].activation_bytes


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
@pytest.mark.parametrize(
    "spec",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa", "rank_pattern": {"qkv": 2}, "layers_to_transform": [0, 4]},
    ],
)
def test_the_ledger_of_other_adapters_is_the_measured_one(tiny, mode, spec):
    training = {"compute_dtype": "bf16", "per_device_train_batch_size": 5}
    config = tiny(mode, lora=spec, training=training)
    data = load("digits", Place(), config.data)
    expected = predict(config, 10, torch.device("cpu"))
    training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
    measured = train.measure_memory(training)
    assert expected.ledger[:5] == measured.ledger[:5]
    assert expected.ledger.activation_bytes == pytest.approx(measured.activation_bytes, rel=1e-4)
    near = 0.03 if without_bf16("cpu") else 0.02
    assert expected.peak_train_bytes == pytest.approx(measured.peak_train_bytes, rel=near)


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_gradient_checkpointing_shrinks_the_activations_and_changes_no_bit(tiny, mode):
    runs = {}
    for checkpointing in (False, True):
        config = tiny(mode, training={"gradient_checkpointing": checkpointing})
        data = load("digits", Place(), config.data)
        training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
        measured = train.measure_memory(training)
        expected = predict(config, 10, torch.device("cpu"))
        assert expected.ledger[:5] == measured.ledger[:5]
        assert expected.peak_train_bytes == pytest.approx(measured.peak_train_bytes, rel=0.01)
        losses = [row["train_loss"] for row in train.fit(training)]
        runs[checkpointing] = measured, expected, losses
    # int8 keeps its inputs outside of autograd, where checkpointing cannot drop them.
    share = 0.4 if mode == "int8" else 0.1
    for plain, checkpointed in zip(runs[False][:2], runs[True][:2], strict=True):
        assert checkpointed.ledger.activation_bytes < share * plain.ledger.activation_bytes
        assert checkpointed.peak_train_bytes < 0.6 * plain.peak_train_bytes
    assert runs[True][2] == runs[False][2]


def test_trials_share_a_prediction_where_their_steps_hold_the_same_bytes(tiny):
    """What is kept of a configuration is what the bytes depend on, and no more."""
    plain = of_a_step(tiny("nf4"))
    same = tiny("nf4", seed=9, lora={"lora_alpha": 32}, training={"learning_rate": 0.5})
    assert of_a_step(same) == plain
    begun = {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"qkv": 3}}
    assert of_a_step(tiny("nf4", lora=begun)) == plain
    assert of_a_step(tiny("nf4", data={"train_size": 100})) == plain
    assert of_a_step(tiny("nf4", training={"step": "graph"})) == plain
    others = [
        tiny("int8"),
        tiny("int8", training={"step": "graph"}),
        tiny("nf4", lora={"r": 8}),
        tiny("nf4", lora={"lora_dropout": 0.5}),
        tiny("nf4", lora={"use_dora": True}),
        tiny("nf4", lora={"bias": "all"}),
        tiny("nf4", lora={"rank_pattern": {"qkv": 3}}),
        tiny("nf4", data={"image_size": 64}),
        tiny("nf4", quantization={"mode": "nf4", "overrides": {"blocks.0.*": "int8"}}),
        *(
            tiny("nf4", training=changed)
            for changed in (
                {"per_device_train_batch_size": 21},
                {"compute_dtype": "fp32" if plain.training.compute_dtype == "bf16" else "bf16"},
                {"gradient_checkpointing": True},
            )
        ),
    ]
    assert len({of_a_step(other).model_dump_json() for other in [tiny("nf4"), *others]}) == 13
    assert of_a_step(others[9]).training.per_device_train_batch_size == 21


def test_modes_of_4_bit_share_the_computation_and_not_what_lies_at_rest(tiny, monkeypatch):
    steps = []
    fake = memory_predict._fake_step
    monkeypatch.setattr(memory_predict, "_fake_step", lambda *a: steps.append(0) or fake(*a))

    def found(mode, **overrides):
        quantization = {"mode": mode, "overrides": overrides}
        training = {"per_device_train_batch_size": 3}
        return predict(tiny(quantization=quantization, training=training), 10, torch.device("cpu"))

    nf4, dq, fp4 = (found(mode) for mode in ("nf4", "nf4-dq", "fp4"))
    assert found("none", **{"blocks.*": "fp4-dq"}).ledger.activation_bytes
    assert len(steps) == 2  # layers of a pattern are another model
    assert nf4 == fp4
    assert nf4.ledger.quantization_state_bytes > dq.ledger.quantization_state_bytes
    assert nf4.ledger.activation_bytes == dq.ledger.activation_bytes
    assert found("nf4", **{"blocks.0.*": "int8"}).ledger.activation_bytes > 0
    assert len(steps) == 3


def test_what_is_held_falls_when_a_tensor_goes_and_the_most_stays():
    given = torch.zeros(100)
    with _Held([given]) as held:
        first = torch.ones(10)
        assert (held.now, held.most) == (40, 40)
        view = first[2:]
        given.add_(1)
        assert held.now == 40  # a view, and what was there before
        second = torch.ones(5)
        assert (held.now, held.most) == (60, 60)
        del first
        assert held.now == 60
        del view
        assert (held.now, held.most) == (20, 60)
        third = torch.ones(5)
        assert (held.now, held.most) == (40, 60)
        del second, third
    assert held.now == 0


@pytest.mark.parametrize(("version", "stays"), [("2.11.0+cu130", True), ("2.12.0", False)])
def test_where_torch_keeps_a_pointer_into_a_thread_that_thread_stays(monkeypatch, version, stays):
    """A stand-in for the crash, which only some versions have: who entered first, and lives on?"""
    entered = []

    class Mode(memory_predict.FakeTensorMode):
        def __enter__(self):
            entered.append(threading.current_thread())
            return super().__enter__()

    monkeypatch.setattr(memory_predict, "FakeTensorMode", Mode)
    monkeypatch.setattr(torch, "__version__", version)
    memory_predict._outlive_trials.__wrapped__()
    assert [thread.is_alive() and thread.daemon for thread in entered] == [True] * stays
    assert threading.current_thread() not in entered


def test_predictions_in_threads_that_end(tiny):
    """As in a worker, whose trials are threads: torch 2.10 and 2.11 crashed in the second."""
    for batch in (2, 3):
        config = tiny("nf4", training={"per_device_train_batch_size": batch})
        thread = threading.Thread(target=predict, args=(config, 17, torch.device("cpu")))
        thread.start()
        thread.join()
        assert predict(config, 17, torch.device("cpu")).peak_train_bytes > 0
