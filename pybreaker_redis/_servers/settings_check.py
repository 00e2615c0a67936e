"""Check that the storages of one circuit in this process have the same settings.

Storages are compared at their first use: before that, the location of the circuit is unknown.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._redis.endpoint import plain_endpoint_of
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.logger import emit


class SettingsCheck:
    """Settings of one storage, to be compared with those of the other storages of its circuit.

    Args:
        name: Name of the circuit, for log lines.
        settings: Values by the name of the argument.  All storages of one circuit should have the same.
        is_nameless: Whether the user gave the storage no namespace.

    Attributes:
        settings: Values by the name of the argument.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], *, is_nameless: bool) -> None:
        self._name = name
        self.settings = settings
        self._is_nameless = is_nameless
        self._users = CircuitUsers()

    def register(self, client: Any, keys: tuple[str, ...]) -> None:
        """Note that the storage is used, and log settings that differ from those of other living storages.

        Args:
            client: Client of the server that stores the circuit.
            keys: Keys of the circuit.
        """
        shared = getattr(client, "connection_pool", client)
        endpoint = plain_endpoint_of(client)
        place = endpoint.database_identity if endpoint else id(shared), keys
        self._users, others = _table.add_check(self, place)
        if others:
            self.note_second_breaker()
        if self._is_nameless:
            return
        for other in others:
            differences = {
                name: (theirs, self.settings[name])
                for name, theirs in other.settings.items()
                if theirs != self.settings[name] and self._users.claim_log_line(name)
            }
            if differences:
                emit(_log.settings_differ(self._name, differences))

    def note_second_breaker(self) -> None:
        """Log, once, that several breakers of this process use a circuit without a namespace."""
        if self._is_nameless and self._users.claim_log_line("namespace"):
            emit(_log.namespace_missing(self._name))


class CircuitUsers:
    """Storages of one circuit in this process, and the lines that were logged about them.

    Attributes:
        checks: One for each storage that was used.
    """

    def __init__(self) -> None:
        self.checks: weakref.WeakSet[SettingsCheck] = weakref.WeakSet()
        self._logged: set[str] = set()

    def claim_log_line(self, subject: str) -> bool:
        """Claim the one log line about a setting.

        Args:
            subject: Name of the setting.

        Returns:
            Whether the line was not logged yet.
        """
        is_new = subject not in self._logged
        self._logged.add(subject)
        return is_new


class CircuitTable(ForkSafe):
    """Circuits of this process, as long as storages use them."""

    def __init__(self) -> None:
        self._users_by_place: weakref.WeakValueDictionary[Hashable, CircuitUsers] = weakref.WeakValueDictionary()
        super().__init__()

    def add_check(self, check: SettingsCheck, place: Hashable) -> tuple[CircuitUsers, list[SettingsCheck]]:
        """Add a storage to those of its circuit.

        Args:
            check: Settings of the storage.
            place: Server, database and keys of the circuit.

        Returns:
            All storages of the circuit, and the others.
        """
        with self._lock:
            users = self._users_by_place.get(place)
            if users is None:
                users = self._users_by_place[place] = CircuitUsers()
            others = [other for other in users.checks if other is not check]
            users.checks.add(check)
            return users, others


_table = CircuitTable()
