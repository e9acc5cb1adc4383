"""What holds on every accelerator, tested without one (pretend.py); what each needs told."""

import json
import logging
import sys
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from ray._common.utils import get_default_system_temp_dir

from tests.tune_study import pretend
from tests.tune_study.pretend import pretended
from tests.tune_study.trial.recorded import Recorder
from tests.tune_study.trial.test_execution import without_times
from tune_study import doctor
from tune_study.checks import modes, products
from tune_study.data.batches import preprocess
from tune_study.data.place import Place, Preprocessing
from tune_study.data.splits import load
from tune_study.errors import UserError
from tune_study.folder.schema import MODES
from tune_study.machine import device as devices
from tune_study.machine import environment, provenance, resources
from tune_study.memory.step import _mps
from tune_study.model import outliers, quantize
from tune_study.model.build import build_model
from tune_study.trial import train
from tune_study.trial.context import RunContext
from tune_study.trial.execution import execute

CPU = torch.device("cpu")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as environment.prepare


@pytest.fixture
def small(tiny):
    """``small(mode)``: two steps an epoch, the second with a smaller batch."""

    def make(mode, **training):
        return tiny(
            mode,
            data={"train_size": 25, "val_size": 10, "test_size": 10},
            training={"compute_dtype": "bf16", "gradient_noise_scale": True, **training},
        )

    return make


def run(config, study_dir, kind, stop_after=None):
    """(results.json, the operators asked of the device) of a trial on the pretended device."""

    def report(row):
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    with pretended(kind) as operators:
        results = execute(config, RunContext(study_dir=study_dir, device=kind), report)
    return results, operators


QUICK = [("mps", "int8"), ("cuda", "nf4-dq")]
"""The others take a minute and a half together."""
SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=[] if (kind, mode) in QUICK else SLOW)
        for kind in ("mps", "cuda")
        for mode in MODES
    ],
)
def test_a_trial_is_built_measured_killed_continued_and_tested(kind, mode, small, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(small(mode), tmp_path, kind, stop_after=1)
    results, operators = run(small(mode), tmp_path, kind)
    assert results["status"] == "completed"
    assert [row["epoch"] for row in results["train"]["epochs"]] == [1, 2]
    assert results["train"]["model_metrics"]["quantized_layers"] == (0 if mode == "none" else 24)
    assert 0 < results["train"]["model_metrics"]["gradient_cosine"] <= 1
    assert results["train"]["test_metrics"]["test_loss"] > 0
    assert {"convolution", "_fused_adamw_", "_foreach_norm", "index"} <= operators
    rest = ("step_weights", "quantization_state", "adapter", "optimizer")
    taken = results["train"]["resource_metrics"]
    at_rest = sum(taken[f"{part}_bytes"] for part in rest)
    assert taken["peak_train_bytes"] == at_rest + pretend.PEAK - pretend.ALLOCATED


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nf4", pytest.param("int8", marks=pytest.mark.ci)])
def test_a_trial_with_a_graph_is_killed_and_continued_as_if_it_had_not_been(
    mode, tiny, tmp_path, monkeypatch
):
    """Five full batches an epoch, two of them by the graph, and a smaller one; as many to evaluate.
    In int8 the eager trial's product is bitsandbytes' own."""
    monkeypatch.setattr(train, "Cuda", Recorder)
    data = {"train_size": 105, "val_size": 11, "test_size": 10}
    training = {"compute_dtype": "bf16", "gradient_noise_scale": True, "step": "graph"}
    training["per_device_eval_batch_size"] = 2
    config = tiny(mode, data=data, training=training)
    whole, _ = run(config, tmp_path / "whole", "cuda")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "killed", "cuda", stop_after=1)
    continued, _ = run(config, tmp_path / "killed", "cuda")
    assert without_times(continued) == without_times(whole)
    assert continued["train"]["resource_metrics"]["step"] == "graph"
    eager, _ = run(tiny(mode, data=data, training={**training, "step": "eager"}), tmp_path, "cuda")
    assert eager["train"]["test_metrics"] == whole["train"]["test_metrics"]
    assert eager["train"]["resource_metrics"]["step"] == "eager"


def test_a_trial_with_a_graph_fails_in_a_sentence_where_outliers_have_no_room(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "Cuda", Recorder)
    monkeypatch.setattr(outliers, "ROOM", 0)
    config = tiny("int8", training={"compute_dtype": "bf16", "step": "graph"})
    with pytest.raises(UserError, match="outlier columns at once"):
        run(config, tmp_path, "cuda")
    error = json.loads((tmp_path / config.trial_id / "error.json").read_text())
    assert "set training.step=eager" in json.dumps(error)


@pytest.mark.slow
@pytest.mark.ci
def test_a_continued_trial_draws_on_from_the_devices_own_generator(small, tmp_path):
    whole, _ = run(small("none"), tmp_path / "whole", "mps")
    with pytest.raises(KeyboardInterrupt):
        run(small("none"), tmp_path / "killed", "mps", stop_after=1)
    continued, _ = run(small("none"), tmp_path / "killed", "mps")
    assert continued["train"]["test_metrics"] == whole["train"]["test_metrics"]


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_recomputed_blocks_draw_the_same_dropout_on_mps(mode, small):
    def gradients(checkpointing):
        config = small(mode, gradient_checkpointing=checkpointing)
        with pretended("mps"):
            place = torch.device("mps")
            built = build_model(config, 10, device=place)
            training = train.start(config, built, load("digits", Place(), config.data), place)
            training.model.train()
            loss, _ = train._forward(training, *training.data.train)
            loss.backward()
            return [p.grad.cpu() for p in training.parameters.values() if p.grad is not None]

    kept, recomputed = gradients(False), gradients(True)
    assert len(kept) == len(recomputed) > 20
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_what_the_pretended_device_refuses():
    with pretended("mps"):
        there, here = torch.ones(2, 2, device="mps"), torch.ones(2, 2)
        assert (there.device.type, here.device.type) == ("mps", "cpu")
        assert (there.is_mps, there.is_cpu, there.cpu().is_cpu) == (True, False, True)
        assert (there + 1).view(4)[1:].device.type == "mps"
        with pytest.raises(TypeError, match="float64"):
            there.double()
        with pytest.raises(TypeError, match="float64"):
            here.double().to("mps")
        assert there.cpu().double().dtype == torch.float64
        with pytest.raises(RuntimeError, match="same device"):
            there @ here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            there.normal_(generator=torch.Generator())
        with pytest.raises(NotImplementedError, match="linalg_eig"):
            torch.linalg.eig(there)
        assert torch.equal(here.to("mps").cpu(), here)


def test_the_pretended_device_has_a_generator_of_its_own():
    with pretended("mps"):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = torch.rand(3, device="mps")
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(5)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3, device="mps"), first)


@pytest.mark.parametrize("mode", MODES[1:])
def test_autocast_casts_the_input_of_a_quantized_layer_and_ends_there(mode, monkeypatch):
    layer = quantize.quantize_linear(torch.nn.Linear(128, 64), mode, torch.bfloat16, CPU)
    seen = []
    name = "matmul" if mode == "int8" else "matmul_4bit"
    product = getattr(bnb, name)

    def watched(x, *arguments, **named):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return product(x, *arguments, **named)

    monkeypatch.setattr(bnb, name, watched)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(3, 128))
    assert seen == [(torch.bfloat16, False)]
    assert out.dtype == torch.bfloat16  # as of a plain layer


def test_int8_products_under_autocast_are_those_of_bf16_inputs_alone():
    layer = quantize.quantize_linear(torch.nn.Linear(128, 64), "int8", torch.bfloat16, CPU).eval()
    x = torch.randn(5, 128)
    with torch.inference_mode():
        expected = layer(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)


def test_a_torch_that_multiplies_wrongly_on_mps_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "available", lambda name: name != "cuda")
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    assert devices.choose_device("auto") == "mps"
    monkeypatch.setattr(torch, "__version__", "2.13.1+cpu")
    for asked in ("mps", "auto"):
        with pytest.raises(UserError, match=r"--device mps: torch 2\.13.*torch>=2\.14.*cpu"):
            devices.choose_device(asked)
    assert devices.choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"2\.13"):
        devices.settle(torch.device("mps"))


def test_mps_memory_ends_where_the_system_recommends_it(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(devices, "OLDEST_TORCH_ON_MPS", (2, 0))
    assert devices.settle(torch.device("mps")) == {"memory_fraction": 1.0}
    assert fractions == [1.0]
    assert devices.settle(CPU) == {}


def test_free_memory_of_a_mac_is_at_most_what_all_processes_leave(monkeypatch):
    from tune_study.machine import device as devices

    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 10**9)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * 10**9)
    for available, free in ((30 * 10**9, 10 * 10**9), (3 * 10**9, 3 * 10**9)):
        left = SimpleNamespace(available=available)
        monkeypatch.setattr(devices.psutil, "virtual_memory", lambda left=left: left)
        assert devices.free_bytes(torch.device("mps")) == free


@pytest.fixture
def cuda_settings():
    """Puts back what ``settle`` sets for CUDA."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_cuda_is_settled_for_trials_that_repeat(cuda_settings, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settings = devices.settle(torch.device("cuda"))
    assert settings == {
        "deterministic": True,
        "cublas_workspace_config": ":4096:8",
        "attention": ["flash", "mem_efficient", "math"],
    }
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.slow
@pytest.mark.ci
def test_an_operation_without_a_deterministic_kernel_is_told_and_not_fatal(
    cuda_settings, small, tmp_path, monkeypatch
):
    step = train.train_step

    def strictly(training, images, labels):
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(
                "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, "
                "but you set 'torch.use_deterministic_algorithms(True)'. You can turn off ..."
            )
        return step(training, images, labels)

    monkeypatch.setattr(train, "train_step", strictly)
    results, _ = run(small("none"), tmp_path, "cuda")
    assert results["status"] == "completed"
    assert results["run"]["device_settings"]["deterministic"] is False
    [warning] = results["warnings"]
    assert "may differ" in warning
    assert "adaptive_avg_pool2d_backward_cuda" in warning


def test_the_settings_of_the_device_are_recorded(small, tmp_path, cuda_settings):
    config = small("none", num_train_epochs=1)
    run(config, tmp_path, "cuda")
    written = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert written["run"]["device_settings"]["deterministic"] is True


def test_a_device_without_statistics_bounds_the_peak_below(monkeypatch):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())

    def forward():
        return layer(torch.ones(1, 2)).sum()

    def none_kept():
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    with pretended("mps"):
        assert _mps(forward, optimizer)[1:] == (4 * 10**6, "torch.accelerator.memory_stats")
        monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", none_kept)
        assert _mps(forward, optimizer)[2].endswith("lower bound")


def test_bitsandbytes_compiles_nothing_on_a_mac(monkeypatch):
    monkeypatch.setattr(environment, "set_by_prepare", set())
    for name in (*environment.SETTINGS, "TORCH_COMPILE_DISABLE"):
        monkeypatch.setenv(name, "")
    for platform, expected in (("linux", ""), ("darwin", "1")):
        monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
        monkeypatch.setattr(sys, "platform", platform)
        environment.prepare()
        assert environment.os.environ.get("TORCH_COMPILE_DISABLE", "") == expected


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("named", [{}, {"RAY_TMPDIR": "/elsewhere"}, {"TMPDIR": "/of/the/user"}])
def test_rays_address_is_sought_where_ray_keeps_it(platform, named, monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(environment.tempfile, "tempdir", named.get("TMPDIR", "/tmp"))
    assert str(environment.ray_folder()[1]) == get_default_system_temp_dir()


def test_a_mac_is_named_by_its_chip_and_system(monkeypatch):
    chip = SimpleNamespace(stdout="Apple M2\n")
    monkeypatch.setattr(provenance.subprocess, "run", lambda *_, **__: chip)
    monkeypatch.setattr(provenance.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(provenance.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = provenance.hardware.__wrapped__()
    assert (found["system"], found["cpu"], found["gpu"]) == (
        "macOS 15.1 arm64",
        "Apple M2",
        "Apple M2 GPU",
    )


def test_the_monitor_of_a_pretended_gpu_reads_its_memory():
    with pretended("cuda"):
        assert resources._gpu_memory_bytes(torch.device("cuda")) == pretend.ALLOCATED


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [20, 112])
def test_an_accelerator_sees_the_images_that_the_cpu_sees(side, interpolation):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8, generator=generator)
    how = Preprocessing(side, interpolation, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    expected = preprocess(images, how)
    with pretended("mps"):
        ours = preprocess(images.to("mps"), how).cpu()
    difference = (ours - expected).abs()
    assert difference.max() <= 2  # as against Pillow; in one pass for both directions it is 26
    assert difference.mean() < 0.1  # whole levels: a half is rounded either way


def test_the_doctor_is_well_on_a_sound_device_and_finds_a_planted_fault(monkeypatch, cuda_settings):
    def verdicts():
        with pretended("mps"):
            there = torch.device("mps")
            return [doctor.settings(there), modes.epoch("int8", there), products.resize(there)]

    assert all(verdict.ok for verdict in verdicts())
    monkeypatch.setattr(quantize, "int8_state", lambda layer: 1 / 0)
    assert [verdict.ok for verdict in verdicts()] == [True, False, True]
