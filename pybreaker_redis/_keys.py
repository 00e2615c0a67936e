"""How are the keys and the channel of a circuit called?

Knows: stock pybreaker's names, hash tags.  Does not know: what lies under the names.
"""

from __future__ import annotations

import binascii
import re

#: First part of every name, as in stock pybreaker.
KEY_BASE = "pybreaker"

#: The five values of a circuit, in the order in which the scripts take them.
KEY_SUFFIXES = ("state", "fail_counter", "success_counter", "opened_at", "circuit")

#: Redis looks at the first pair of braces only, and ignores it if there is nothing in it.
_HASH_TAG = re.compile(r"[^{]*\{([^}]+)\}")

#: Into so many a cluster divides the keys.
CLUSTER_SLOT_COUNT = 16384


def circuit_keys(namespace: str | None, *, needs_one_slot: bool, base: str = KEY_BASE) -> tuple[str, ...]:
    """The keys of a circuit, in the order of `NAMES`.

    Args:
        namespace: Prefix, or ``None``: the one circuit without a name.
        needs_one_slot: Whether a hash tag puts all keys into one slot.  A namespace that carries a tag keeps its own.
        base: What stands between the namespace and the names; a storage's ``BASE_NAMESPACE``.
    """
    prefix = f"{namespace}:{base}" if namespace else base
    if needs_one_slot and not _HASH_TAG.match(prefix):
        prefix = f"{{{namespace}}}:{base}" if namespace else f"{{{base}}}"
    return tuple(f"{prefix}:{name}" for name in KEY_SUFFIXES)


def slot_of(key: str) -> int:
    """The slot of a cluster that a key lies in: the CRC16 of its tag, or else of all of it (Redis Cluster's rule)."""
    tag = _HASH_TAG.match(key)
    return binascii.crc_hqx((tag[1] if tag else key).encode(), 0) % CLUSTER_SLOT_COUNT


def channel_of(keys: tuple[str, ...], db: int) -> str:
    """Where moves of a circuit are published.

    Args:
        keys: Of the circuit.
        db: Its database: keys are distinct in each, channels are common to all.
    """
    return f"{keys[-1]}@{db}"
