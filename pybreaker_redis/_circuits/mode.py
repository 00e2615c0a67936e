"""Switch between the two circuits that may answer a call: the shared one and the local one."""

from __future__ import annotations

import enum
from collections.abc import Hashable

from pybreaker_redis._circuits.local import LocalCircuit, common_local_circuit
from pybreaker_redis._circuits.shared import SharedCircuit
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import ClaimProbe, Intent, Reply
from pybreaker_redis._redis.classify import ErrorKind
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._servers.availability import Availability, Outage

#: Seconds for which calls may use the fast path of a local circuit that follows the shared one.
FOLLOWING_TRUST_MAX_S = 0.1

#: The same for a local circuit that stands alone: only the end of the outage has to be noticed.
LOCAL_TRUST_MAX_S = 0.5


class Mode(enum.Enum):
    """Circuit that answers the calls of this process."""

    UNUSED = "unused"
    """No circuit yet: no call has used the shared one."""
    SHARED = "shared"
    """The shared circuit."""
    FOLLOWING = "following"
    """The local circuit, which begins as the shared one is: Redis can be read, and takes no writes."""
    LOCAL = "local"
    """The local circuit alone."""


LOCAL_MODES = frozenset((Mode.FOLLOWING, Mode.LOCAL))


class SwitchedCircuit(ForkSafe):
    """Base of `Failover`: mode, fast path and local circuit.

    Args:
        view: This process's copy of the shared circuit.
        fallback: State in which a local circuit begins.  See `LocalCircuit`.
        initial: State of a circuit that does not exist yet.

    Attributes:
        mode: Circuit that answers the calls of this process.
        fast_path: Decisions of that circuit that hold for every call.  See `CircuitCore`.
        local: Local circuit of the present or the next run.
        shared: The circuit in Redis.
    """

    shared: SharedCircuit

    def __init__(self, view: View, *, fallback: str, initial: str) -> None:
        self.mode = Mode.UNUSED
        self.fast_path: FastPath = view.fast_path
        self.local = self._next_local = LocalCircuit(fallback, initial)
        self._view = view
        self._local_settings = fallback, initial
        super().__init__()

    @property
    def uses_local(self) -> bool:
        """Whether the local circuit answers calls, so that there may be something to report."""
        # The circuit may run for another storage, which has a fault of its own.
        return self.mode in LOCAL_MODES and self.local.is_active

    def _enter(self, mode: Mode, *, only_from: Mode | None = None) -> None:
        """Change the mode, and the fast path with it.  No other code writes either of them.

        Args:
            mode: New mode.
            only_from: Mode in which alone the change is made.  ``None``: in every mode.
        """
        with self._lock:
            if only_from not in (None, self.mode):
                return
            if mode in LOCAL_MODES:
                self.fast_path, self.mode = self.local.fast_path, mode
                # Reports go to the local circuit, so reads must not come from the view.
                self._view.pause_trust()
            else:
                self.fast_path, self.mode = self._view.fast_path, mode
                self._view.resume_trust()

    def _use_shared(self, *, has_ended: bool) -> None:
        """Use the shared circuit again, if the run of the local one has ended."""
        if has_ended:
            self.local = self._next_local
            self._enter(Mode.SHARED)

    def _share_local(self, server: object, keys: tuple[str, ...]) -> None:
        """Use one local circuit together with all storages of the same shared circuit and the same settings.

        A local circuit that runs is used until its end, because it has something to report.

        Args:
            server: Server of the shared circuit.
            keys: Keys of the shared circuit.
        """
        key: Hashable = (server, keys, *self._local_settings)
        self._next_local = common_local_circuit(key, self._next_local)
        if not self.local.is_active:
            self.local = self._next_local

    def _mode_for(self, fault: Outage | None, outage: Outage | None) -> Mode:
        """Return the mode for requests that the shared circuit does not serve.

        Args:
            fault: Outage of this circuit alone.
            outage: Outage of the server.
        """
        if fault is not None:
            # Whether the circuit can be read was found out when the fault began.
            return Mode.FOLLOWING if self.mode is Mode.FOLLOWING else Mode.LOCAL
        is_readable = outage is not None and outage.kind is ErrorKind.READ_ONLY
        return Mode.FOLLOWING if is_readable else Mode.LOCAL

    def _decide_locally(
        self, intent: Intent, known: Circuit | None, availability: Availability, *, mode: Mode, is_in_doubt: bool
    ) -> Reply:
        """Carry out an intent on the local circuit.

        A claim is refused while there is no outage: other calls of this process may get the shared probe meanwhile.
        That happens after contention, and when a connection was lost just before the server returned.

        Args:
            intent: Wanted change, or `Load`.
            known: The shared circuit as it was seen last.
            availability: Availability of the circuit or the server that keeps callers from Redis.
            mode: `Mode.FOLLOWING` or `Mode.LOCAL`.
            is_in_doubt: Whether Redis may have executed the same intent.
        """
        if self.mode is not mode:
            self._enter(mode)
        local, outage = self.local, availability.outage
        if isinstance(intent, ClaimProbe) and outage is None and known is not None:
            local.fast_path.trusted_until = 0
            reply = Reply(False, known, wall_clock_ms())
        else:
            reply = local.decide_locally(intent, known, can_read=mode is Mode.FOLLOWING, is_in_doubt=is_in_doubt)
            fast_path = local.fast_path
            trust_s = LOCAL_TRUST_MAX_S
            if mode is Mode.FOLLOWING:
                trust_s = min(FOLLOWING_TRUST_MAX_S, self._view.max_staleness)
            until = fast_path.now() + trust_s
            if outage is None or availability.outage is not outage:
                # The outage has ended, or Redis was queried, just now: no call may use this circuit without a request.
                until = 0
            elif not availability.has_retry_thread:
                until = min(until, outage.next_attempt_at)
            fast_path.trusted_until = until
        if self.mode not in LOCAL_MODES or self.fast_path is not local.fast_path:
            # A run has begun, or another thread has ended the outage meanwhile: then this circuit has to return, too.
            self._enter(mode)
        return reply
