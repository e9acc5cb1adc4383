"""DESIGN.md, "Determinism": on one CPU a trial is a pure function, in every mode, to the bit."""

import pytest
from safetensors.torch import load_file

from tests.tune_study.trial.test_execution import killed, without_times
from tune_study.trial.context import RunContext
from tune_study.trial.execution import execute

QUICK = ["none", "int8", "nf4-dq"]
SLOW = [pytest.mark.slow, pytest.mark.ci]
MODES = [*QUICK, *(pytest.param(mode, marks=SLOW) for mode in ("nf4", "fp4", "fp4-dq"))]


def outcome(config, folder):
    """All numbers that are not times, and the adapter's tensors."""
    results = execute(config, RunContext(study_dir=folder), lambda row: None)
    adapter = load_file(folder / config.trial_id / "adapter" / "adapter_model.safetensors")
    return without_times(results), {name: t.numpy().tobytes() for name, t in adapter.items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_is_the_same_alone_after_another_and_killed(tiny, tmp_path, mode):
    small = {"data": {"train_size": 16}, "training": {"per_device_train_batch_size": 8}}
    config = tiny(mode, **small)
    killed(config, tmp_path / "killed", 1)
    alone = outcome(config, tmp_path / "alone")
    killed(tiny("nf4", seed=9, **small), tmp_path / "other", 1)
    assert outcome(config, tmp_path / "after another") == alone
    assert outcome(config, tmp_path / "killed") == alone


@pytest.mark.parametrize(
    ("mode", "spec"),
    [
        ("nf4", {"init_lora_weights": "pissa_niter_2", "bias": "all"}),
        pytest.param("nf4-dq", {"init_lora_weights": "loftq", "loftq_iter": 2}, marks=SLOW),
        ("int8", {"init_lora_weights": "loftq", "use_dora": True}),
        pytest.param("none", {"init_lora_weights": "pissa", "use_dora": True}, marks=SLOW),
        pytest.param("int8", {"lora_bias": True, "rank_pattern": {"qkv": 2}}, marks=SLOW),
    ],
)
def test_a_base_without_what_the_adapters_took_is_rebuilt_the_same(tiny, tmp_path, mode, spec):
    small = {"data": {"train_size": 16}, "training": {"per_device_train_batch_size": 8}}
    config = tiny(mode, lora=spec, **small)
    killed(config, tmp_path / "killed", 1)
    alone = outcome(config, tmp_path / "alone")
    assert outcome(config, tmp_path / "killed") == alone


@pytest.mark.slow
@pytest.mark.ci
def test_the_seed_matters(tiny, tmp_path):
    one, other = (outcome(tiny("nf4", seed=seed), tmp_path) for seed in (1, 2))
    assert one[1] != other[1]
