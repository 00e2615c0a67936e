"""Names of keys: equal to those of stock, and in one slot of a cluster."""

from __future__ import annotations

from binascii import crc_hqx
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.keys import KEY_SUFFIXES, channel_of, circuit_keys
from pybreaker_redis._runtime.validation import checked_namespace


@pytest.mark.parametrize(("namespace", "prefix"), [(None, "pybreaker"), ("shop", "shop:pybreaker")])
def test_names_equal_those_of_stock(namespace, prefix):
    """A stock worker finds the circuit under the same names."""
    assert circuit_keys(namespace, needs_one_slot=False) == tuple(f"{prefix}:{name}" for name in KEY_SUFFIXES)


def slot(key: str) -> int:
    """Return the slot of a key by the rule of the cluster specification."""
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
        ("{eu}{us}", "{eu}{us}:pybreaker:state"),
    ],
)
def test_keys_of_a_cluster_share_one_slot(namespace, first):
    """Scripts and transactions need all keys of a circuit on one node. An existing hash tag decides about the node."""
    keys = circuit_keys(namespace, needs_one_slot=True)
    assert keys[0] == first
    assert len({slot(key) for key in keys}) == 1


#: Namespaces that stock accepts and that are in use.
VALID_NAMESPACES = [
    *("shop", "shop:payments", "shop/payments", "a b", "a.b-c_d", "zahlung für köln", "支付", "🙂"),
    *("*", "?[a]", "\\", "'", "\u2028", "\xa0", "x" * 1000),
    *("{eu}", "shop:{eu}", "{eu}:shop", "{eu}{us}", "{ }"),
]

#: Invalid namespaces, by the part of the error that states what is accepted.
MISTAKES = {
    "at least one character": [""],
    "braces in pairs": ["{}", "a{}", "{}{eu}", "{eu}{}", "{", "}", "a{b", "a}b", "}{", "{{eu}}", "{a{b}c}"],
    "control characters or lone surrogates": ["a\nb", "\0", "shop\t", "\x7f", "\x85", "\ud800", "a\udfffb"],
}
REFUSED = [(namespace, accepted) for accepted, namespaces in MISTAKES.items() for namespace in namespaces]


@pytest.mark.parametrize("namespace", [None, *VALID_NAMESPACES])
def test_namespace_that_works_with_stock_is_accepted(namespace):
    """A change of the import keeps existing namespaces valid, in any language."""
    checked_namespace(namespace)


@pytest.mark.parametrize(("namespace", "accepted"), REFUSED, ids=ascii)
def test_invalid_namespace_is_refused_at_once(namespace, accepted):
    """The error contains the argument's name, its value and the accepted values."""
    with pytest.raises(ValueError, match=f"namespace must .*{accepted}") as caught:
        CircuitRedisStorage("closed", lambda: None, namespace)
    assert repr(namespace) in str(caught.value)


@pytest.mark.parametrize("namespace", [b"shop", 7, ("shop",), object, True, bytearray(b"shop")])
def test_namespace_of_another_type_is_refused_at_once(namespace):
    """The names would contain the repr of the bytes, with a b before them."""
    with pytest.raises(TypeError, match="namespace must be a str or None, not "):
        CircuitRedisStorage("closed", lambda: None, namespace)


#: Any text, often with braces and control characters.
texts = st.text(st.one_of(st.sampled_from("{}{}a:\0\n"), st.characters()), max_size=12)


@given(namespace=texts, needs_one_slot=st.booleans())
def test_any_namespace_is_refused_or_names_one_circuit_in_one_slot(namespace, needs_one_slot):
    """A valid namespace can be sent and printed. In a cluster, all its keys lie in the slot of the visible hash tag."""
    try:
        checked_namespace(namespace)
    except ValueError:
        braced = "{" in namespace or "}" in namespace
        assert not namespace or braced or any(category(char) in ("Cc", "Cs") for char in namespace)
        return
    keys = circuit_keys(namespace, needs_one_slot=needs_one_slot)
    assert all(key.encode().startswith(namespace.encode()) or key.startswith(f"{{{namespace}}}:") for key in keys)
    assert channel_of(keys, 0).isprintable() or not namespace.isprintable()
    if needs_one_slot or "{" in namespace:
        assert len({slot(key) for key in keys}) == 1


class Shop(CircuitRedisStorage):
    """Subclass with a base namespace, which pybreaker's class supports."""

    BASE_NAMESPACE = "shop:cb"


@pytest.mark.parametrize(
    ("namespace", "needs_one_slot", "first"),
    [
        ("pay", False, "pay:shop:cb:state"),
        (None, False, "shop:cb:state"),
        ("pay", True, "{pay}:shop:cb:state"),
        (None, True, "{shop:cb}:state"),
    ],
)
def test_base_namespace_of_a_subclass_has_the_place_that_stock_gives_it(namespace, needs_one_slot, first):
    """In a cluster, all keys of a subclass lie in one slot, too."""
    keys = circuit_keys(namespace, needs_one_slot=needs_one_slot, base=Shop.BASE_NAMESPACE)
    assert keys[0] == first
    assert not needs_one_slot or len({slot(key) for key in keys}) == 1
    assert circuit_keys(namespace, needs_one_slot=True, base="{eu}cb")[0] == f"{namespace}:{{eu}}cb:state".removeprefix(
        "None:"
    )


class Naming(CircuitRedisStorage):
    """Subclass with a method for the names of keys."""

    def _namespace(self, key: str) -> str:
        """Return a name that this package never requests."""
        return f"mine:{key}"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Naming, "Naming._namespace is not used here"),
        (type("Number", (CircuitRedisStorage,), {"BASE_NAMESPACE": 7}), "Number.BASE_NAMESPACE must be a str"),
        (type("Nothing", (CircuitRedisStorage,), {"BASE_NAMESPACE": None}), "Nothing.BASE_NAMESPACE must be a str"),
    ],
)
def test_subclass_whose_names_cannot_be_used_is_refused_at_once(kind, message):
    """Otherwise, two tenants would share one circuit."""
    with pytest.raises(TypeError, match=message):
        kind("closed", lambda: None)


def test_base_namespace_that_makes_no_keys_is_refused_at_once():
    """A base namespace follows the rules of a namespace."""
    kind = type("Empty", (CircuitRedisStorage,), {"BASE_NAMESPACE": ""})
    with pytest.raises(ValueError, match=r"Empty.BASE_NAMESPACE must have at least one character"):
        kind("closed", lambda: None)
