"""The card that decides how many trials share a GPU."""

from types import SimpleNamespace

import torch

from tune_study.machine import gpus


def test_of_several_cards_the_smallest_is_told(monkeypatch):
    sizes = {"A": 40, "B": 24, "C": 80}
    every = [SimpleNamespace(name=n, total_memory=size) for n, size in sizes.items()]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: every[number])
    assert gpus.count() == 3
    assert gpus.smallest("cuda") == gpus.Card("B", 24)
    assert gpus.smallest("cpu") is None
    assert gpus.smallest("mps") is None
