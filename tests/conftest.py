"""Shared by all tests: a tiny trial, and the real CIFAR images where they are at hand."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Small models gain nothing from a second thread, and on a busy machine two wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The studies of two test processes share the cores: turning threads would hold up each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    """No limit of time for the slow tests that CI leaves out: some take half an hour."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def cifar_dir() -> Path:
    """A folder with CIFAR in the Hugging Face parquet layout, kept outside the repository."""
    folder = SHARED / "data"
    if not (folder / "cifar10").is_dir():
        pytest.skip("no real CIFAR images beside the repository")
    return folder


@pytest.fixture(scope="session")
def settled():
    """``settled(values)``: the trial as the command line would plan it on this machine."""
    from tune_study.config import parse_trial
    from tune_study.study.compute_dtype import settle_compute_dtype

    return lambda values: settle_compute_dtype([parse_trial(values)], "cpu")[0][0]


@pytest.fixture
def tiny(settled):
    """``tiny(mode, **fields)``: the demo's backbone on a few digits, a second to train."""

    def make(mode="nf4", **fields):
        values = {
            "model": "vit_glyphs_patch4_32",
            "dataset": "digits",
            "lora": {"r": 4, "lora_alpha": 8},
            "quantization": mode,
            "data": {"train_size": 40, "val_size": 20, "test_size": 20},
            "training": {
                "num_train_epochs": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 1,
                "per_device_train_batch_size": 20,
            },
        }
        for name, value in fields.items():
            base = values.get(name)
            values[name] = {**base, **value} if isinstance(base, dict) else value
        return settled(values)

    return make
