"""Which names do a client's keys have on the server, and what is the client without its own methods?

Knows: classes of client libraries, subclasses and wrappers of them.  Does not know: circuits, connections.

Applications share a server by clients that rename keys: subclasses that put a prefix before each.  Others retry, wait
or trace in methods of their own, of the class or of one object.  The names are found without a command being sent, and
from then on a plain client of the library uses them, on connections that keep deadlines.
"""

from __future__ import annotations

import binascii
import copy
import re
from typing import Any

from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors

#: Packages whose classes execute commands as they are given.
_LIBRARIES = frozenset(("fakeredis", "redis", "rediscluster", "valkey"))

#: Methods by which clients rename keys, and where each puts the key among the words of its command.  Scripts first:
#: under the names that they are given circuits lie already.
_RENAMING_COMMANDS = (("evalsha", 3), ("eval", 3), ("get", 1))


@calls_user_code
def unwrap_client(client: Any) -> Any:
    """Return the client behind a wrapper that has no method of its own for scripts, as flask-redis and lazy objects."""
    with suppress_errors():
        owner = getattr(client.evalsha, "__self__", client)
        if library_class_of(client) is None and library_class_of(owner) is not None:
            return owner
    return client


def library_class_of(client: Any) -> type[Any] | None:
    """Return the library's own class of a client; ``None``: it is of no such class, so its methods are not known."""
    for cls in type(client).__mro__:
        if cls.__module__.partition(".")[0] in _LIBRARIES:
            return cls
    return None


@calls_user_code
def plain_copy(client: Any) -> Any:
    """Return a copy of a client that has only the library's own methods.

    Raises:
        TypeError: It is of no library's class, or of one that cannot be left.
        Exception: Whatever a class raises that cannot be copied.
    """
    base = library_class_of(client)
    if base is None:
        msg = f"not of a known client library: {type(client).__name__}"
        raise TypeError(msg)
    own = copy.copy(client)
    if type(own) is not base:
        own.__class__ = base
    for name in _patched_methods(own):
        del vars(own)[name]
    # What the client closes when it ends is not closed with its copy: its pool, and the one connection of a client that
    # has no more.
    own.auto_close_connection_pool = False
    own.connection = None
    return own


def has_plain_copy(client: Any) -> bool:
    """Whether a plain client of its library can stand for a client."""
    if type(client) is library_class_of(client):
        return True
    # Whatever a class raises that cannot be copied.
    with suppress_errors():
        plain_copy(client)
        return True
    return False


def _patched_methods(client: Any) -> list[str]:
    """The methods that one object has in place of those of its class, as tracing libraries do it."""
    cls = type(client)
    return [name for name, value in vars(client).items() if callable(value) and callable(getattr(cls, name, None))]


def server_key_names(client: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that keys have on the server of a client; nothing is sent.

    A client whose class is the library's own renames nothing.  The methods of any other class are called on a copy that
    sends nothing and notes what would be sent.
    """
    base = library_class_of(client)
    if base is None or type(client) is base:
        return keys
    # Whatever a class raises that cannot be made in this way.
    with suppress_errors():
        if not hasattr(client, "nodes_manager"):
            # Else the new names would be renamed once more.
            plain_copy(client)
        return _observed_key_names(client, base, keys)
    return keys


@calls_user_code
def _observed_key_names(client: Any, base: type[Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    sent: list[tuple[Any, ...]] = []

    def execute_command(self: Any, *words: Any, **options: Any) -> None:
        sent.append(words)

    def nothing(self: Any) -> None:
        """Nothing of the client's is closed by its copy."""

    # The last class before the library's own, so that whatever a subclass calls by `super` is noted.
    last = type("Last", (base,), {"execute_command": execute_command})
    kind = type("Observed", (type(client), last), {"__del__": nothing, "close": nothing})
    observed: Any = object.__new__(kind)
    patches = _patched_methods(client)
    vars(observed).update((name, value) for name, value in vars(client).items() if name not in patches)

    @calls_user_code
    def name_of(method: str, place: int, key: str) -> str:
        sent.clear()
        with suppress_errors():
            # One key at a time: kombu's client renames only the first of a script.
            getattr(observed, method)(*(["0" * 40, 1] if place > 1 else []), key)
        # A client may send other commands, too.
        named = [words[place] for words in sent if str(words[0]).lower() == method and len(words) > place]
        name = named[0] if named else key
        return name.decode() if isinstance(name, bytes) else str(name)

    for method, place in _RENAMING_COMMANDS:
        names = tuple(name_of(method, place, key) for key in keys)
        if names != keys:
            return names
    return keys


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
