"""Which words of a client's connections decide what they reach, and which are its own?

Knows: what constructors of connections of redis-py and its kin take.  Does not know: pools, sockets, commands.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pybreaker_redis import _secrets
from pybreaker_redis._clock import monotonic
from pybreaker_redis._outside import calls_user_code

#: Seconds that a connection may be idle and is used again: load balancers forget silent ones after a minute or more,
#: and what is sent on these is never answered.
IDLE_MAX_S = 30.0

#: Seconds for which credentials are new: what was rejected before they were taken is worth another attempt.
NEW_CREDENTIALS_S = 1.0

#: Words that this package's own connections leave out: waiting and retries are decided elsewhere, and caches, names and
#: notifications of maintenance belong to the client's own connections.
_DROPPED_ARGUMENTS = frozenset(
    (
        "cache",
        "cache_config",
        "client_name",
        "event_dispatcher",
        "health_check_interval",
        "himport_registry",
        "parser_class",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_timeout",
    )
)

#: Words that change neither what a connection reaches nor by what right: timing, spelling of answers, greetings.
_IRRELEVANT_ARGUMENTS = frozenset(
    (
        *("decode_responses", "encoding", "encoding_errors", "legacy_responses", "protocol"),
        *("driver_info", "lib_name", "lib_version"),
        *("max_connections", "timeout", "socket_connect_timeout", "socket_read_size"),
        *("socket_keepalive", "socket_keepalive_options"),
        # Those of connections of our own (`_deadline.py`).
        *("credentials", "idle_limit"),
    )
)

#: What a function is called that connects in place of the library's own handshake.
CONNECT_HOOK_ARGUMENTS = frozenset(("redis_connect_func", "valkey_connect_func"))

_CREDENTIALS = ("username", "password", "credential_provider")


class ArgumentValue:
    """A value that compares and hashes as what it is, or as itself where that is impossible."""

    def __init__(self, value: Any) -> None:
        self._key: Any = _hashable(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArgumentValue) and bool(self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((str(name), _hashable(item)) for name, item in value.items()))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


EndpointIdentity = tuple[tuple[str, ArgumentValue], ...]


def kept_arguments(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of a client's connections that those of our own have, too; secrets among them are remembered."""
    left_out = {*_DROPPED_ARGUMENTS, *(name for name in words if "maint_" in name or name.startswith("orig_"))}
    kept = {name: value for name, value in words.items() if name not in left_out}
    for name in CONNECT_HOOK_ARGUMENTS & kept.keys():
        if (function := _user_connect_hook(kept.pop(name))) is not None:
            kept[name] = function
    for name, value in kept.items():
        if "password" in name:
            _secrets.register_secret(value)
    return kept


def identity_of(connection_class: Any, words: Mapping[str, Any]) -> EndpointIdentity:
    """Return what tells connections apart that must not be shared: all words that change what they reach, and how.

    What a word says that is not given is what its constructor says: however the same is said, it is the same.
    """
    usual = {**_default_arguments(connection_class), "db": 0}
    said = {name: value for name, value in words.items() if name not in _IRRELEVANT_ARGUMENTS}
    said["db"] = int(words.get("db") or 0)
    return tuple(
        (name, ArgumentValue(value))
        for name, value in sorted(said.items())
        if ArgumentValue(value) != ArgumentValue(usual.get(name))
    )


@lru_cache(maxsize=64)
def _default_arguments(connection_class: Any) -> dict[str, Any]:
    """What the constructors of a class take for words that are not given."""
    usual: dict[str, Any] = {}
    for cls in reversed(getattr(connection_class, "__mro__", ())):
        if "__init__" in vars(cls) and cls is not object:
            # Some that are not written in Python have none.
            with contextlib.suppress(TypeError, ValueError):
                parameters = inspect.signature(cls.__init__).parameters.values()
                usual.update((item.name, item.default) for item in parameters if item.default is not item.empty)
    return usual


@dataclass(frozen=True)
class _HookAfterHandshake:
    """What a connection does in place of its handshake: the handshake, and then a function of the user's.

    Attributes:
        function: Of the user's, called with the connection.
    """

    function: Callable[[Any], Any]

    def __call__(self, connection: Any) -> None:
        connection.on_connect()
        self.function(connection)


def _user_connect_hook(function: Any) -> Any:
    """What there is to do when connected; of a cluster client's own function only what its user has asked for."""
    owner = getattr(function, "__self__", None)
    if not hasattr(owner, "nodes_manager"):
        return function
    own = getattr(owner, "user_on_connect_func", None)
    return None if own is None else _HookAfterHandshake(own)


def idle_limit(words: Mapping[str, Any]) -> float:
    """Return for how many seconds a connection may be idle and is used again, as far as the client's words say."""
    interval = words.get("health_check_interval")
    return min(float(interval), IDLE_MAX_S) if isinstance(interval, int | float) and interval > 0 else IDLE_MAX_S


class Credentials:
    """The credentials of a client, as they are when a connection is made.

    Args:
        words: Of the client's connections: the mapping itself, which its owner changes when a password is replaced.
    """

    def __init__(self, words: Mapping[str, Any]) -> None:
        self._words = words
        self._switched_at = -math.inf

    def read_credentials(self) -> dict[str, Any]:
        """Return the credentials, by the word for each."""
        found = credentials_of(self._words)
        if found["credential_provider"] is not None:
            found["credential_provider"] = _RegisteringProvider(found["credential_provider"])
        _secrets.register_secret(found["password"])
        return found

    def switch_arguments(self, words: Mapping[str, Any]) -> bool:
        """Use other words from now on; returns whether their credentials differ, or those of a moment ago did.

        Several threads are rejected at the same time, and one of them takes the new ones.
        """
        before, self._words = credentials_of(self._words), words
        if credentials_of(words) != before:
            self._switched_at = monotonic()
        return monotonic() - self._switched_at < NEW_CREDENTIALS_S


def credentials_of(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the credentials among words, ``None`` for each that is missing."""
    return {name: words.get(name) for name in _CREDENTIALS}


class _RegisteringProvider:
    """A credential provider whose secrets are masked from then on; everything else is the provider's own."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    @calls_user_code
    def get_credentials(self) -> Any:
        """Return what the provider returns."""
        credentials = self._provider.get_credentials()
        _secrets.register_secret(credentials[-1])
        return credentials
