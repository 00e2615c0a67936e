"""Keys are called as stock calls them, and in a cluster they share a slot."""

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
def test_names_are_those_of_stock(namespace, prefix):
    """A stock worker finds the circuit under the same names."""
    assert circuit_keys(namespace, needs_one_slot=False) == tuple(f"{prefix}:{name}" for name in KEY_SUFFIXES)


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
        ("{eu}{us}", "{eu}{us}:pybreaker:state"),
    ],
)
def test_keys_of_a_cluster_share_one_slot(namespace, first):
    """Scripts and transactions need all keys of a circuit on one node; a tag that is there already decides which."""
    keys = circuit_keys(namespace, needs_one_slot=True)
    assert keys[0] == first
    assert len({slot(key) for key in keys}) == 1


# -- which namespaces there may be -------------------------------------------------------------------------------------

#: What stock takes and people use.
USED = [
    *("shop", "shop:payments", "shop/payments", "a b", "a.b-c_d", "zahlung für köln", "支付", "🙂"),
    *("*", "?[a]", "\\", "'", "\u2028", "\xa0", "x" * 1000),
    *("{eu}", "shop:{eu}", "{eu}:shop", "{eu}{us}", "{ }"),
]

#: What nobody can have meant, by the part of the error that says what is accepted.
MISTAKES = {
    "at least one character": [""],
    "braces in pairs": ["{}", "a{}", "{}{eu}", "{eu}{}", "{", "}", "a{b", "a}b", "}{", "{{eu}}", "{a{b}c}"],
    "control characters or lone surrogates": ["a\nb", "\0", "shop\t", "\x7f", "\x85", "\ud800", "a\udfffb"],
}
REFUSED = [(namespace, accepted) for accepted, namespaces in MISTAKES.items() for namespace in namespaces]


@pytest.mark.parametrize("namespace", [None, *USED])
def test_namespace_that_works_with_stock_is_taken(namespace):
    """Whoever changes the import keeps the namespaces, whatever language they are in."""
    checked_namespace(namespace)


@pytest.mark.parametrize(("namespace", "accepted"), REFUSED, ids=ascii)
def test_namespace_that_nobody_can_have_meant_is_refused_at_once(namespace, accepted):
    """The error names the argument, what was given and what is accepted."""
    with pytest.raises(ValueError, match=f"namespace must .*{accepted}") as caught:
        CircuitRedisStorage("closed", lambda: None, namespace)
    assert repr(namespace) in str(caught.value)


@pytest.mark.parametrize("namespace", [b"shop", 7, ("shop",), object, True, bytearray(b"shop")])
def test_namespace_of_another_type_is_refused_at_once(namespace):
    """Bytes would become part of the names as they are printed, with a b before them."""
    with pytest.raises(TypeError, match="namespace must be a str or None, not "):
        CircuitRedisStorage("closed", lambda: None, namespace)


#: Any text, often with braces and control characters.
texts = st.text(st.one_of(st.sampled_from("{}{}a:\0\n"), st.characters()), max_size=12)


@given(namespace=texts, needs_one_slot=st.booleans())
def test_any_namespace_is_refused_or_names_one_circuit_in_one_slot(namespace, needs_one_slot):
    """What is taken can be sent, and printed, and in a cluster all keys lie in one slot: the tag that people see."""
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


# -- subclasses with names of their own --------------------------------------------------------------------------------


class Shop(CircuitRedisStorage):
    """As pybreaker's class allows it."""

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
def test_base_namespace_of_a_subclass_stands_where_stock_has_it(namespace, needs_one_slot, first):
    """In a cluster, too, all keys lie in one slot."""
    keys = circuit_keys(namespace, needs_one_slot=needs_one_slot, base=Shop.BASE_NAMESPACE)
    assert keys[0] == first
    assert not needs_one_slot or len({slot(key) for key in keys}) == 1
    assert circuit_keys(namespace, needs_one_slot=True, base="{eu}cb")[0] == f"{namespace}:{{eu}}cb:state".removeprefix(
        "None:"
    )


class Naming(CircuitRedisStorage):
    """Names its keys by a method."""

    def _namespace(self, key: str) -> str:
        """Nothing here asks it."""
        return f"mine:{key}"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Naming, "Naming._namespace is not used here"),
        (type("Number", (CircuitRedisStorage,), {"BASE_NAMESPACE": 7}), "Number.BASE_NAMESPACE must be a str"),
        (type("Nothing", (CircuitRedisStorage,), {"BASE_NAMESPACE": None}), "Nothing.BASE_NAMESPACE must be a str"),
    ],
)
def test_subclass_whose_names_cannot_be_used_is_refused_at_once(kind, said):
    """Else two tenants would become one circuit."""
    with pytest.raises(TypeError, match=said):
        kind("closed", lambda: None)


def test_base_namespace_that_makes_no_keys_is_refused_at_once():
    """As a namespace."""
    kind = type("Empty", (CircuitRedisStorage,), {"BASE_NAMESPACE": ""})
    with pytest.raises(ValueError, match=r"Empty.BASE_NAMESPACE must have at least one character"):
        kind("closed", lambda: None)
