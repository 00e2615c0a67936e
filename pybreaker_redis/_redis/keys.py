"""Keys of a circuit, and their names on the server of a client that renames keys.

Applications share a server by clients that put a prefix before each key.  Other clients retry, wait or trace in methods
of a subclass or of a single object.  `server_key_names` finds the names on the server without sending a command.  From
then on, a plain client of the library uses these names, on connections that keep deadlines.
"""

from __future__ import annotations

import binascii
import copy
import re
from typing import Any, NamedTuple

from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors

#: Packages of client libraries.  Their classes rename no keys.
_LIBRARIES = frozenset(("fakeredis", "redis", "rediscluster", "valkey"))

#: Methods that may rename keys, and the position of the key in the command.  Scripts come first, because existing
#: circuits have the names that scripts got.
_RENAMING_COMMANDS = (("evalsha", 3), ("eval", 3), ("get", 1))


@calls_user_code
def unwrap_client(client: Any) -> Any:
    """Return the client behind a wrapper that delegates scripts, as flask-redis and lazy objects do."""
    with suppress_errors():
        owner = getattr(client.evalsha, "__self__", client)
        if library_class_of(client) is None and library_class_of(owner) is not None:
            return owner
    return client


def library_class_of(client: Any) -> type[Any] | None:
    """Return the library's class among a client's ancestors (``None``: the client is of no known library)."""
    for cls in type(client).__mro__:
        if cls.__module__.partition(".")[0] in _LIBRARIES:
            return cls
    return None


@calls_user_code
def plain_copy(client: Any) -> Any:
    """Return a copy of a client that has only the library's methods.

    Raises:
        TypeError: The client is of no known library, or its class cannot be changed.  A class that cannot be copied may
            raise another error.
    """
    base = library_class_of(client)
    if base is None:
        msg = f"not of a known client library: {type(client).__name__}"
        raise TypeError(msg)
    plain = copy.copy(client)
    if type(plain) is not base:
        plain.__class__ = base
    for name in _patched_methods(plain):
        del vars(plain)[name]
    # The end of the copy must not close the client's pool, or its single connection.
    plain.auto_close_connection_pool = False
    plain.connection = None
    return plain


def has_plain_copy(client: Any) -> bool:
    """Return whether a plain client of the library can replace a client."""
    if type(client) is library_class_of(client):
        return True
    # A class that cannot be copied may raise anything.
    with suppress_errors():
        plain_copy(client)
        return True
    return False


def _patched_methods(client: Any) -> list[str]:
    """Return the methods that an object has in place of its class's methods, as tracing libraries set them."""
    cls = type(client)
    return [name for name, value in vars(client).items() if callable(value) and callable(getattr(cls, name, None))]


def server_key_names(client: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that keys have on the server of a client, without sending a command.

    A client of the library's class renames nothing.  The methods of any other class are called on a copy that records
    commands and sends none.

    Args:
        client: The user's client.
        keys: Keys as this package names them.
    """
    base = library_class_of(client)
    if base is None or type(client) is base:
        return keys
    # A class that cannot be made in this way may raise anything.
    with suppress_errors():
        if not hasattr(client, "nodes_manager"):
            # Without a plain copy, the client would rename the new names once more.
            plain_copy(client)
        return _observed_key_names(client, base, keys)
    return keys


@calls_user_code
def _observed_key_names(client: Any, base: type[Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    sent: list[tuple[Any, ...]] = []

    def execute_command(self: Any, *command: Any, **options: Any) -> None:
        sent.append(command)

    def nothing(self: Any) -> None:
        """Close nothing: the copy shares everything with the client."""

    # The class directly before the library's class, so that commands by way of `super` are recorded, too.
    last = type("Last", (base,), {"execute_command": execute_command})
    kind = type("Observed", (type(client), last), {"__del__": nothing, "close": nothing})
    observed: Any = object.__new__(kind)
    patches = _patched_methods(client)
    vars(observed).update((name, value) for name, value in vars(client).items() if name not in patches)

    @calls_user_code
    def name_of(method: str, place: int, key: str) -> str:
        sent.clear()
        with suppress_errors():
            # One key at a time, because kombu's client renames only the first key of a script.
            getattr(observed, method)(*(["0" * 40, 1] if place > 1 else []), key)
        # The method may send other commands, too.
        named = [command[place] for command in sent if str(command[0]).lower() == method and len(command) > place]
        name = named[0] if named else key
        return name.decode() if isinstance(name, bytes) else str(name)

    for method, place in _RENAMING_COMMANDS:
        names = tuple(name_of(method, place, key) for key in keys)
        if names != keys:
            return names
    return keys


#: First part of every key, as in pybreaker's own storage.
KEY_BASE = "pybreaker"


class CircuitKeys(NamedTuple):
    """Keys of one circuit, in the order of the scripts.

    Attributes:
        state: Key of the state, as pybreaker's storage writes it.
        fail_counter: Key of the number of failures.
        success_counter: Key of the number of successful probes.
        opened_at: Key of the time of the last trip.
        circuit: Key of the hash that only this package writes.
    """

    state: str
    fail_counter: str
    success_counter: str
    opened_at: str
    circuit: str


#: Last parts of the keys of a circuit.
KEY_SUFFIXES = CircuitKeys._fields


#: Hash tag of a key: the text in the first pair of braces, unless that pair is empty.
_HASH_TAG = re.compile(r"[^{]*\{([^}]+)\}")


#: Number of slots of a cluster.
CLUSTER_SLOT_COUNT = 16384


def circuit_keys(namespace: str | None, *, needs_one_slot: bool, base: str = KEY_BASE) -> CircuitKeys:
    """Return the keys of a circuit.

    Args:
        namespace: Prefix of the keys (``None``: the one circuit without a namespace).
        needs_one_slot: Whether a hash tag puts all keys into one slot.  A namespace with a tag keeps its tag.
        base: Part between the namespace and the names of the values, a storage's ``BASE_NAMESPACE``.
    """
    prefix = f"{namespace}:{base}" if namespace else base
    if needs_one_slot and not _HASH_TAG.match(prefix):
        prefix = f"{{{namespace}}}:{base}" if namespace else f"{{{base}}}"
    return CircuitKeys(*(f"{prefix}:{name}" for name in KEY_SUFFIXES))


def slot_of(key: str) -> int:
    """Return the slot of a key: the CRC16 of its hash tag, or of the whole key (Redis Cluster specification)."""
    tag = _HASH_TAG.match(key)
    return binascii.crc_hqx((tag[1] if tag else key).encode(), 0) % CLUSTER_SLOT_COUNT


def channel_of(keys: tuple[str, ...], db: int) -> str:
    """Return the channel on which transitions of a circuit are published.

    Args:
        keys: Keys of the circuit.
        db: Number of the database.  Databases share channels, but not keys.
    """
    return f"{keys[-1]}@{db}"
