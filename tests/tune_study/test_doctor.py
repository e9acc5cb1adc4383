"""Each check passes on a sound machine, and fails when its fault is planted."""

import ctypes
import math
from collections import namedtuple

import bitsandbytes as bnb
import pytest
import torch
from typer.testing import CliRunner

from tune_study import doctor
from tune_study.checks import modes, products
from tune_study.checks.modes import Operations, Verdict, Wrong, check
from tune_study.data import batches
from tune_study.doctor import QUANTIZED
from tune_study.folder.schema import MODES
from tune_study.model import lora, quantize
from tune_study.trial import checkpoint, train
from tune_study.trial.gradients import GradientFlowMonitor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_kernels():
    yield
    quantize.check_kernel.cache_clear()


def run(*arguments):
    app = doctor.typer.Typer()
    app.command()(doctor.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_a_sound_layer_passes(mode):
    for sound in (modes.dequantization, modes.train_eval_train, modes.kernels):
        verdict = sound(mode, CPU)
        assert verdict.ok, verdict
        assert verdict.found
        assert not verdict.remedy


@pytest.mark.parametrize("mode", ["none", "int8", "nf4-dq"])
def test_a_sound_trial_passes(mode):
    for sound in (modes.epoch, modes.checkpoint_round_trip, modes.peak):
        verdict = sound(mode, CPU)
        assert verdict.ok, verdict
    assert "cpu allocator events" in verdict.found


@pytest.mark.parametrize("mode", QUANTIZED)
def test_the_products_of_a_sound_layer_pass(mode):
    assert products.block_layers(mode, CPU).ok


@pytest.mark.parametrize(
    "sound",
    [
        products.lora_layer,
        products.attention,
        products.head_and_loss,
        products.resize,
        products.whole_gradient,
    ],
)
def test_sound_products_pass(sound):
    verdict = sound(CPU)
    assert verdict.ok, verdict


# --- any exception is its check's verdict ---


class Odd(Exception):
    """No exception that anything in this project knows."""


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (Odd("the first line\nthe second"), "Odd: the first line"),
        (TypeError("Cannot convert a MPS Tensor"), "TypeError: Cannot convert a MPS Tensor"),
        (AssertionError(), "AssertionError: "),
        (Wrong("another number"), "another number"),
    ],
)
def test_an_exception_of_any_type_is_the_verdict_of_its_check(error, found):
    @check("planted of {}", "what to do")
    def planted(mode):
        raise error

    assert planted("nf4") == Verdict("planted of nf4", False, found, "what to do")


def test_a_fault_that_knows_its_remedy_tells_it():
    @check("planted", "of the check")
    def planted():
        raise Wrong("seen", "of the fault")

    assert planted().remedy == "of the fault"


def test_ctrl_c_is_no_verdict():
    @check("planted", "")
    def planted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planted()


def test_no_check_raises_on_a_device_that_can_compute_nothing():
    """On ``meta`` nothing has a value: nearly all checks meet an exception of some type."""
    verdicts = list(doctor.examine(torch.device("meta")))
    names = [verdict.check for verdict in verdicts]
    assert names[0] == "versions"
    assert names[-1] == f"peak of {MODES[-1]}"
    assert len(set(names)) == len(names) == 6 + 4 * len(QUANTIZED) + 5 + 3 * len(MODES)
    assert all(verdict.remedy for verdict in verdicts if not verdict.ok)
    assert sum(verdict.ok for verdict in verdicts) < 10


def test_the_checks_after_a_fault_still_run_and_the_exit_code_is_1(monkeypatch):
    def not_there():
        raise Odd("[/no] markup")

    def mps():
        raise TypeError("Cannot convert a MPS Tensor to float64")

    monkeypatch.setattr(doctor, "MODES", ("none",))
    monkeypatch.setattr(doctor, "QUANTIZED", ("int8",))
    monkeypatch.setattr(doctor.provenance, "versions", not_there)
    monkeypatch.setattr(GradientFlowMonitor, "end_epoch", lambda self: mps())
    result = run("--device", "cpu")
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert "versions: Odd: [/no] markup. Remedy: install the packages" in text
    found = "TypeError: Cannot convert a MPS Tensor to float64"
    for name in ("epoch of none", "checkpoint of none"):
        assert f"{name}: {found}. Remedy: choose another mode" in text
    assert "3 wrong" in text
    assert "peak of none" in text  # the last check


# --- planted faults ---


def test_int8_that_cannot_be_built_on_the_device_is_found(monkeypatch):
    """As where the weights already lie on a GPU: bitsandbytes leaves them as they are there."""
    sound = quantize.quantize_linear

    def faulty(linear, mode, compute_dtype, device):
        layer = sound(linear, mode, compute_dtype, device)
        if mode == "int8":
            layer.weight.CB = None
        return layer

    monkeypatch.setattr(quantize, "quantize_linear", faulty)
    for faulty_check in (modes.epoch, products.block_layers, modes.dequantization):
        verdict = faulty_check("int8", CPU)
        assert not verdict.ok
        assert "QuantizationFailed: a Linear8bitLt holds no int8 codes" in verdict.found
        assert faulty_check("nf4", CPU).ok


def test_layers_are_made_from_weights_that_lie_on_the_device(monkeypatch):
    monkeypatch.setattr(quantize, "quantize_linear", lambda linear, *_: linear)
    assert modes.quantized_layer("int8", torch.device("meta")).weight.is_meta


def test_an_evaluation_that_raises_is_found(monkeypatch):
    def raises(training, split):
        raise TypeError("no float64 here")

    monkeypatch.setattr(train, "evaluate", raises)
    for of_a_trial in (modes.epoch, modes.checkpoint_round_trip):
        assert of_a_trial("none", CPU).found == "TypeError: no float64 here"
    assert modes.peak("none", CPU).ok


@pytest.mark.parametrize("what", ["loss", "parameter"])
def test_numbers_that_are_not_finite_are_found(what, monkeypatch):
    true = train.train_step

    def broken(training, images, labels):
        loss, hits = true(training, images, labels)
        with torch.no_grad():
            training.parameters["head.bias"][0] = math.nan if what == "parameter" else 0
        return (loss * math.inf if what == "loss" else loss), hits

    monkeypatch.setattr(train, "train_step", broken)
    verdict = modes.epoch("none", CPU)
    assert not verdict.ok
    assert ("train_loss" if what == "loss" else "head.bias") in verdict.found


def lost(state):
    del state["adapter"]["head.bias"]


def zeroed(state):
    state["adapter"]["head.bias"] = torch.zeros(10)


def forgotten_moments(state):
    state["optimizer"]["state"].clear()


def forgotten_dropout(state):
    state["generators"]["torch"] = torch.Generator().manual_seed(5).get_state()


def another_best(state):
    state["best"]["head.bias"] = state["best"]["head.bias"] + 1


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lost, "KeyError: 'head.bias'"),
        (zeroed, "loaded, it evaluates to"),
        (another_best, "its best epoch is another one"),
        (forgotten_moments, "a further epoch differs"),
        (forgotten_dropout, "a further epoch differs"),
    ],
)
def test_a_checkpoint_that_loses_something_is_found(damage, found, monkeypatch):
    true = checkpoint.load

    def loses(folder):
        state, extra = true(folder)
        damage(state)
        return state, extra

    monkeypatch.setattr(checkpoint, "load", loses)
    verdict = modes.checkpoint_round_trip("nf4", CPU)
    assert not verdict.ok
    assert found in verdict.found
    assert verdict.remedy


def test_steps_that_differ_are_found(monkeypatch):
    true, noise = train.train_step, torch.Generator()

    def noisy(training, images, labels):
        with torch.no_grad():
            training.parameters["head.bias"].add_(torch.rand((), generator=noise) * 1e-6)
        return true(training, images, labels)

    monkeypatch.setattr(train, "train_step", noisy)
    verdict = modes.checkpoint_round_trip("none", CPU)
    assert not verdict.ok
    assert "spread over seeds" in verdict.remedy


@pytest.mark.skipif(
    not hasattr(bnb.functional, "has_avx512bf16") or not bnb.functional.has_avx512bf16(),
    reason="the fault shows on CPUs with AVX512-BF16 only",
)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_the_avx512bf16_fault_is_found_when_it_is_switched_back_on(mode, monkeypatch):
    sound = quantize.quantize_linear

    def faulty(*arguments):
        layer = sound(*arguments)
        layer.support_avx512bf16_for_cpu = True
        return layer

    monkeypatch.setattr(quantize, "quantize_linear", faulty)
    verdict = modes.train_eval_train(mode, CPU)
    assert not verdict.ok
    assert "support_avx512bf16_for_cpu" in verdict.remedy


def test_a_kernel_that_returns_other_weights_is_found(monkeypatch):
    true = quantize.dequantize
    monkeypatch.setattr(quantize, "dequantize", lambda layer: true(layer).roll(1))
    quantize.check_kernel.cache_clear()
    assert not modes.dequantization("int8", CPU).ok
    verdict = products.block_layers("int8", CPU)
    assert "qkv:y in fp32 by " in verdict.found
    assert "fc2:dx in bf16 by " in verdict.found


def test_a_product_that_is_wrong_over_more_than_32768_terms_is_found(monkeypatch):
    """It forgets the rest, as torch before 2.14 does on M1 and M2."""
    true = torch.Tensor.__matmul__

    def short(a, b):
        return true(a[..., :32768], b[..., :32768, :]) if b.shape[-2] > 32768 else true(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", short)
    verdict = products.lora_layer(CPU)
    assert not verdict.ok
    for name in ("dA in fp32", "dB in fp32", "dA in bf16", "dB in bf16"):
        assert f"{name} by 4" in verdict.found  # sqrt(6632 / 39400) = 0.41
    assert "y in" not in verdict.found
    assert "dx in" not in verdict.found
    assert "2.14" in verdict.remedy


def test_another_dropout_mask_in_the_backward_pass_is_found(monkeypatch):
    true = lora._dropped_again
    monkeypatch.setattr(lora, "_dropped_again", lambda x, mask, p: true(x, mask.roll(1), p))
    found = products.lora_layer(CPU).found
    assert "dx in fp32 by " in found
    assert "y in" not in found


def test_wrong_attention_is_found(monkeypatch):
    true = products.scaled_dot_product_attention

    def scaled(q, k, v):
        return true(q, k, v) if q.dtype == torch.float64 else true(q * 1.05, k, v)

    monkeypatch.setattr(products, "scaled_dot_product_attention", scaled)
    found = products.attention(CPU).found
    assert "dq in fp32 by " in found
    assert "dq in bf16 by " in found


def test_a_wrong_loss_is_found(monkeypatch):
    true = products.cross_entropy

    def rounded(scores, labels):
        exact = scores.dtype == torch.float64
        return true(scores if exact else scores.half().float() * 1.03, labels)

    monkeypatch.setattr(products, "cross_entropy", rounded)
    found = products.head_and_loss(CPU).found
    assert "dW in fp32 by " in found
    assert "dW in bf16 by " in found


def test_another_resize_is_found(monkeypatch):
    true = batches.preprocess

    def nearest(images, how):
        return true(images, how._replace(interpolation="nearest"))

    monkeypatch.setattr(products, "preprocess", nearest)
    assert not products.resize(CPU).ok


def test_another_activation_is_found_in_the_whole_gradient(monkeypatch):
    """The approximation by tanh is off by 0.0005 at most."""

    def forward(layer, x):
        approximate = "none" if x.dtype == torch.float64 else "tanh"
        return torch.nn.functional.gelu(x, approximate=approximate)

    monkeypatch.setattr(torch.nn.GELU, "forward", forward)
    verdict = products.whole_gradient(CPU)
    assert "blocks.0.mlp.fc2.lora_A in fp32 by " in verdict.found


def test_an_error_that_is_no_number_is_wrong():
    with pytest.raises(Wrong, match="y by nan"):
        products.judged([products.Error("y", math.nan, 1.0)])


def test_fp32_that_is_tf32_in_truth_is_more_than_allowed():
    a, b = torch.randn(192, 768), torch.randn(768, 192)

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    error = products.relative(tf32(a) @ tf32(b), a.double() @ b.double())
    assert products.relative(a @ b, a.double() @ b.double()) < products.allowed(a.dtype, 768) / 10
    assert error > 2 * products.allowed(a.dtype, 768)


# --- kernels ---


def called(name, *arguments):
    with Operations(CPU) as seen:
        getattr(torch.ops.bitsandbytes, name)(*arguments)
    return seen.own


def test_plain_torch_is_not_own_though_it_is_registered_for_the_device():
    codes = torch.ones(8, 16, dtype=torch.int8)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert has("bitsandbytes::int8_linear_matmul", "CPU")
    assert called("int8_linear_matmul", codes, codes) == {"int8_linear_matmul": False}


def test_what_is_not_registered_for_the_device_is_plain_torch():
    weights = torch.randn(64, 64)
    assert called("quantize_4bit", weights, 64, "nf4", torch.uint8) == {"quantize_4bit": False}
    half = torch.randn(8, 64).half() * 4
    assert called("int8_vectorwise_quant", half, 6.0) == {"int8_vectorwise_quant": False}


def test_the_native_library_is_own_and_what_calls_it_is_judged_by_itself():
    layer = modes.quantized_layer("nf4", CPU)
    state = layer.weight.quant_state
    packed = [layer.weight.data, state.absmax, 64, "nf4", [192, 192], torch.float32]
    native = torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::dequantize_4bit", "CPU")
    assert native, "without it this test says nothing"
    assert called("dequantize_4bit", *packed) == {"dequantize_4bit": True}
    rows = torch.randn(4, 192)
    product = called("gemm_4bit", rows, layer.weight.data, [192, 192], state.absmax, 64, "nf4")
    assert product == {"gemm_4bit": False, "dequantize_4bit": True}


def native_then_torch(a):
    """As bitsandbytes' int8 on CUDA: the library fills an empty tensor, torch adds and casts."""
    out = torch.empty_like(a)
    ctypes.memmove(out.data_ptr(), a.data_ptr(), a.nbytes)
    return out.add_(1).to(torch.bfloat16)


def native_behind_a_view(a):
    out = torch.empty(2 * a.numel())
    ctypes.memmove(out.data_ptr(), a.data_ptr(), a.nbytes)
    return out[: a.numel()].view(a.shape)


def foreign(a):
    return torch.ops.doctors_test.hub(a)


def torch_into_an_empty_one(a):
    out = torch.empty(a.numel(), dtype=torch.bfloat16)
    out[::2], out[1::2] = a.flatten()[::2], a.flatten()[1::2]
    torch.add(a, 1, out=(other := torch.empty_like(a)))
    return out.view(a.shape) + other


def native_into_out(a, out):
    ctypes.memmove(out.data_ptr(), a.data_ptr(), a.nbytes)


def torch_into_out(a, out):
    out.copy_(a)


@pytest.mark.parametrize(("kernel", "own"), [(native_into_out, True), (torch_into_out, False)])
def test_a_kernel_that_fills_what_it_is_given(kernel, own):
    with torch.library._scoped_library("bitsandbytes", "FRAGMENT") as library:
        library.define("planted.out(Tensor a, Tensor(a!) out) -> ()")
        library.impl("planted.out", kernel, "CPU")
        library.define("caller(Tensor a) -> Tensor")

        def caller(a):
            out = torch.empty_like(a)
            torch.ops.bitsandbytes.planted.out(a, out)
            return out

        library.impl("caller", caller, "CPU")
        assert called("caller", torch.randn(3)) == {"caller": False, "planted": own}


@pytest.mark.parametrize(
    ("kernel", "own"),
    [
        (native_then_torch, True),
        (native_behind_a_view, True),
        (foreign, True),
        (torch_into_an_empty_one, False),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_kernel_is_own_when_something_else_than_torch_computes(kernel, own, inference):
    with (
        torch.library._scoped_library("bitsandbytes", "FRAGMENT") as library,
        torch.library._scoped_library("doctors_test", "DEF") as hub,
    ):
        hub.define("hub(Tensor a) -> Tensor")
        hub.impl("hub", torch.clone, "CPU")
        library.define("planted(Tensor a) -> Tensor")
        library.impl("planted", kernel, "CPU")
        with torch.inference_mode(inference):
            assert called("planted", torch.randn(4, 6)) == {"planted": own}


# --- the machine, and the door ---


def test_a_full_disk_is_found(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")(1, 1, 10)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert not doctor.disk(tmp_path).ok


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_and_the_remedy(ok, code, monkeypatch):
    verdict = Verdict("planted", ok, "what was seen", "" if ok else "what to do")
    monkeypatch.setattr(doctor, "examine", lambda device: iter([verdict]))
    result = run("--device", "cpu")
    assert result.exit_code == code
    assert ("what to do" in result.output) is not ok


def test_a_device_that_is_not_there_is_refused():
    absent = next(d for d in ("cuda", "mps") if not doctor.available(d))
    assert run("--device", absent).exit_code == 2
