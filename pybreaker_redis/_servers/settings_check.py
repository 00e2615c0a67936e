"""Which storages of this process are the same circuit, and do they agree about it?

Knows: where each of them leads, its settings, when one is gone.  Does not know: what the settings are for, breakers.

Storages are told apart when they are first used: nobody knows before where they lead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._redis.endpoint import plain_endpoint_of
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._runtime.logger import emit


class SettingsCheck:
    """One storage, among those of the same circuit.

    Args:
        name: Of the circuit, for people.
        settings: By the name of the argument.  Of one circuit they should be the same.
        is_nameless: Whether its user gave it no namespace.

    Attributes:
        settings: See above.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], *, is_nameless: bool) -> None:
        self._name = name
        self.settings = settings
        self._is_nameless = is_nameless
        self._circuit = _CircuitUsers()

    def register(self, client: Any, keys: tuple[str, ...]) -> None:
        """The storage is used; say so if others that are alive should be like it, and are not.

        Args:
            client: Of its server.
            keys: Of its circuit.
        """
        shared = getattr(client, "connection_pool", client)
        endpoint = plain_endpoint_of(client)
        others = _twins.join(self, (endpoint.database_identity if endpoint else id(shared), keys))
        if others:
            self.note_second_breaker()
        if self._is_nameless:
            return
        for other in others:
            differences = {
                name: (theirs, self.settings[name])
                for name, theirs in other.settings.items()
                if theirs != self.settings[name] and self._circuit.claim_log_line(name)
            }
            if differences:
                emit(_log.settings_differ(self._name, differences))

    def note_second_breaker(self) -> None:
        """Another breaker of this process uses the circuit; say so if nobody can have meant that."""
        if self._is_nameless and self._circuit.claim_log_line("namespace"):
            emit(_log.namespace_missing(self._name))

    def join(self, circuit: _CircuitUsers) -> list[SettingsCheck]:
        """Be one of a circuit's storages; returns the others."""
        self._circuit = circuit
        others = [twin for twin in circuit.twins if twin is not self]
        circuit.twins.add(self)
        return others


class _CircuitUsers:
    """A circuit, as long as it has storages here.

    Attributes:
        twins: Those that were used.
    """

    def __init__(self) -> None:
        self.twins: weakref.WeakSet[SettingsCheck] = weakref.WeakSet()
        self._logged: set[str] = set()

    def claim_log_line(self, what: str) -> bool:
        """Whether this was not said yet; from now on it was."""
        is_new = what not in self._logged
        self._logged.add(what)
        return is_new


class _CircuitTable:
    """The circuits of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._circuits: weakref.WeakValueDictionary[Hashable, _CircuitUsers] = weakref.WeakValueDictionary()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock."""
        self._lock = threading.RLock()

    def join(self, twin: SettingsCheck, place: Hashable) -> list[SettingsCheck]:
        """Put a storage to those of the same place; returns the others."""
        with self._lock:
            circuit = self._circuits.get(place)
            if circuit is None:
                circuit = self._circuits[place] = _CircuitUsers()
            return twin.join(circuit)


_twins = _CircuitTable()
