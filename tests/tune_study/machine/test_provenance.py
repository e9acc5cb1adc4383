import torch

from tune_study.machine import provenance


def test_what_computes_names_every_package_that_must_be_equal():
    found = provenance.what_computes("cpu")
    packages = {"python", "ray", "torch", "timm", "peft", "bitsandbytes", "tune-study"}
    assert packages <= found.keys()
    assert found["device cpu"] == "there"
    if not torch.cuda.is_available():
        assert provenance.what_computes("cuda")["device cuda"] == "not there"
