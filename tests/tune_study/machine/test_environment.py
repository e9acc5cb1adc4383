"""The settings that torch's threads get, and whose they are."""

from __future__ import annotations

import pytest

from tune_study import environment

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "300000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),  # a count would outvote it
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
    ],
)
def test_how_threads_wait_is_the_users_choice_first(given, expected, monkeypatch) -> None:
    variables: dict[str, str] = dict(given)
    monkeypatch.setattr(environment.os, "environ", variables)
    monkeypatch.setattr(environment, "set_by_prepare", set())
    environment.prepare()
    environment.prepare()  # as a process does whose parent has done it
    assert tuple(variables.get(name) for name in WAITING) == expected
    assert not environment.set_by_prepare & given.keys()
    assert environment.set_by_prepare | given.keys() == variables.keys()
