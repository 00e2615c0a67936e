"""Keys are called as stock calls them, and in a cluster they share a slot."""

from __future__ import annotations

from binascii import crc_hqx

import pytest

from pybreaker_redis._keys import NAMES, circuit_keys


@pytest.mark.parametrize(("namespace", "prefix"), [(None, "pybreaker"), ("", "pybreaker"), ("shop", "shop:pybreaker")])
def test_names_are_those_of_stock(namespace, prefix):
    """A stock worker finds the circuit under the same names."""
    assert circuit_keys(namespace, one_slot=False) == tuple(f"{prefix}:{name}" for name in NAMES)


def slot(key: str) -> int:
    """The slot of a key, as the cluster specification has it."""
    _, brace, after = key.partition("{")
    tag, closing, _ = after.partition("}")
    return crc_hqx((tag if brace and closing and tag else key).encode(), 0) % 16384


@pytest.mark.parametrize(
    ("namespace", "first"),
    [
        (None, "{pybreaker}:state"),
        ("shop", "{shop}:pybreaker:state"),
        ("shop:{eu}", "shop:{eu}:pybreaker:state"),
        ("{eu}", "{eu}:pybreaker:state"),
        ("{}shop", "{{}shop}:pybreaker:state"),
        ("a{}b{c}", "{a{}b{c}}:pybreaker:state"),
    ],
)
def test_keys_of_a_cluster_share_one_slot(namespace, first):
    """Scripts and transactions need all keys of a circuit on one node; a tag that is there already decides which."""
    keys = circuit_keys(namespace, one_slot=True)
    assert keys[0] == first
    assert len({slot(key) for key in keys}) == 1
