"""Addresses, and nodes that differ."""

import pytest

from tune_study.cluster import connection
from tune_study.errors import UserError


@pytest.mark.parametrize("address", ["local", "auto", "127.0.0.1:6379", "head:6379", "[::1]:6379"])
def test_addresses(address):
    assert connection.parse_address(address) == address


@pytest.mark.parametrize(
    "address", ["", "head", "head:port", "ray://head:10001", "http://head:80", "head:6379 "]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="--address"):
        connection.parse_address(address)


def test_a_node_that_differs_is_told_by_its_difference():
    ours = {"torch": "2.7", "commit of tune-study": "abc", "device cpu": "there"}
    assert connection.first_difference(ours, dict(ours)) is None
    assert connection.first_difference(ours, {**ours, "commit of tune-study": None}) is None
    assert (
        connection.first_difference(ours, {**ours, "torch": "2.6"})
        == "torch is 2.6 and here it is 2.7"
    )
    assert "device cpu is not there" in str(
        connection.first_difference(ours, {**ours, "device cpu": "not there"})
    )
