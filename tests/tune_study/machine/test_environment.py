"""The settings that torch's threads get, and whose they are."""

from __future__ import annotations

import pytest

from tune_study.machine import environment

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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--address", "local"], False),
        (["--address", "127.0.0.1:6379"], False),
        (["--address=localhost:6379"], False),
        (["--address", "head:6379", "--name", "x"], True),
        (["--address=10.0.0.1:6379"], True),
        (["--address"], True),  # typer refuses it
        (["--name", "--address"], True),
    ],
)
def test_the_setting_for_clusters_follows_the_address(arguments, expected):
    assert environment.clustered(arguments) is expected


@pytest.mark.parametrize(("head", "expected"), [("127.0.0.1:1", False), ("10.1.2.3:1", True)])
def test_auto_is_what_ray_would_take_it_for(monkeypatch, head, expected):
    monkeypatch.setenv("RAY_ADDRESS", head)
    assert environment.clustered(["--address", "auto"]) is expected
