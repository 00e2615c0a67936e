"""What does pybreaker mean by this get or set?

Knows: the call sequences of pybreaker 1.4, what each thread did last.  Does not know: where the circuit lives.

An unmodified `CircuitBreaker` never says "I failed" or "I want to probe"; it reads and writes properties.  The order in
which one thread does that tells what it means:

=====================================================  =====================  =====================================
just before, same thread                               operation              meaning
=====================================================  =====================  =====================================
`state` read twice, the first answer was news          `reset_*counter`       noticed what others did: nothing
`opened_at` set                                        `reset_success_…`      the trip
`state` read as open, then `opened_at`                 `reset_success_…`      half-opening: claim the probe
`reset_success_counter`                                `reset_counter`        closing
an exception in flight                                 `increment_counter`    a failure of the call last admitted
the guarded function                                   `reset_counter`        a success of the call last admitted
a counted probe                                        `increment_success_…`  a success that counts for the threshold
a trip, claim or close                                 `state` set            the echo of what is already done
anything else                                                                 by hand: literally that
=====================================================  =====================  =====================================

Trip, claim and close are committed before pybreaker runs its listeners: it builds the new state object, and so tells
them, before it assigns `storage.state`.
"""

from __future__ import annotations

import os
import secrets
import sys
from datetime import datetime

from pybreaker import CircuitBreakerError, CircuitBreakerStorage

from pybreaker_redis._caller import Caller, Just
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import (
    CLOSED,
    HALF_OPEN,
    MAX_LEASE_MS,
    OPEN,
    STATES,
    Circuit,
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    ResetProbes,
    SetOpenedAt,
    SetState,
    Trip,
)
from pybreaker_redis._clock import from_ms, to_ms
from pybreaker_redis._telling import state_compared_by_a_listener


class IntentStorage(CircuitBreakerStorage):
    """pybreaker's storage interface over atomic intents.

    One storage serves one circuit and is made for one `CircuitBreaker` in a process; any number of threads may use it.
    """

    def __init__(self, name: str, probe_lease: float) -> None:
        super().__init__(name)
        self._lease_ms = lease_ms(probe_lease)
        self._caller = Caller()
        #: The state that the breaker has built its state object from, as far as can be told from here.
        self._built: str | None = None

    def _execute(self, intent: Intent) -> Reply:
        """Carry out an intent where the circuit lives.  All times are by the local clock."""
        raise NotImplementedError

    def _set_opened_at(self, at_ms: float) -> Intent:
        return SetOpenedAt(at_ms)

    # The interface ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``, the last only for the thread that is to probe."""
        caller, just = self._begin()
        reply = self._ask(caller, Load())
        value = self._state_for(caller, reply)
        if caller.echo and (compared := state_compared_by_a_listener()):
            return compared
        if self._built is None:
            self._built = value
        again = caller.news and just in (Just.READ_STATE, Just.READ_STATE_AGAIN)
        caller.just = Just.READ_STATE_AGAIN if again else Just.READ_STATE
        caller.read, caller.news = value, value != self._built
        if value != OPEN:
            token = caller.token if value == HALF_OPEN else ""
            caller.admit(reply.circuit.generation, token, probing=value == HALF_OPEN)
        return value

    @state.setter
    def state(self, state: str) -> None:
        caller, _ = self._begin()
        check_state("state", state)
        if caller.echo == state:
            caller.echo = ""
            self._built = state
            return
        circuit = self._ask(caller, SetState(state)).circuit
        caller.admit(circuit.generation, "", probing=state == HALF_OPEN)
        if state == HALF_OPEN:
            # Either pybreaker's `half_open()`, which has already built its state object, or nearly the same by hand.
            caller.half_opened = circuit.generation
            self._built = state

    def increment_counter(self) -> None:
        """Count a failure: of the call in hand if its exception is in flight, else by hand."""
        caller, _ = self._begin(writes=True)
        failure = sys.exc_info()[1]
        if failure is None:
            self._ask(caller, RecordFailure(None, ""))
            return
        generation, token = caller.generation, caller.token
        if generation is None:
            # A generator that finishes on another thread: count it as of now, unless the circuit has opened since.
            generation = self._ask(caller, Load()).circuit.generation
        reply = self._ask(caller, RecordFailure(generation, token))
        caller.failure, caller.refused, caller.fresh = id(failure), not reply.accepted, False
        caller.tripping = generation, token
        caller.count = reply.circuit.fail_counter if reply.accepted else 0

    def reset_counter(self) -> None:
        """Forget the failures: noticing, closing, a success, or by hand."""
        caller, just = self._begin(writes=True, may_close=True)
        if just is Just.READ_STATE_AGAIN:
            self._built = caller.read
        elif just is Just.HOLDS_RESET:
            self._close(caller, Close(caller.generation, caller.token))
        elif just is Just.RESET_SUCCESSES:
            self._close(caller, Close(None, ""))
        else:
            self._ask(caller, RecordSuccess(caller.generation, caller.token))

    def increment_success_counter(self) -> None:
        """Count a success while half-open: of the probe in hand, or by hand."""
        caller, _ = self._begin(writes=True)
        if not caller.probing:
            self._ask(caller, CountProbe(None, "", self._lease_ms))
            return
        reply = self._ask(caller, CountProbe(caller.generation, caller.token, self._lease_ms))
        caller.fresh = False
        caller.count = reply.circuit.success_counter if reply.accepted else 0
        caller.just = Just.COUNTED_PROBE

    def reset_success_counter(self) -> None:
        """Forget the successes: noticing, tripping, claiming the probe, closing, or by hand.

        Raises:
            pybreaker.CircuitBreakerError: This was the way into half-open, and somebody else has the probe.
        """
        caller, just = self._begin(writes=True)
        if just is Just.READ_STATE_AGAIN:
            self._built = caller.read
        elif just is Just.SET_OPENED_AT:
            self._ask(caller, Trip(*caller.tripping))
            caller.echo = OPEN
        elif just is Just.READ_OPENED_AT and caller.read == OPEN:
            self._claim_probe(caller)
        elif just is Just.READ_COUNT:
            # Only `close()` does this straight after a counted probe; its next step says so and saves a round trip.
            caller.just = Just.HOLDS_RESET
        else:
            self._ask(caller, ResetProbes())
            caller.just = Just.RESET_SUCCESSES

    @property
    def counter(self) -> int:
        """Consecutive failures; to the one who is reporting a failure, the count that this failure made."""
        caller, _ = self._begin()
        if caller.failure and caller.failure == id(sys.exc_info()[1]):
            return caller.count
        return self._ask(caller, Load()).circuit.fail_counter

    @property
    def success_counter(self) -> int:
        """Consecutive successes while half-open; to the one who is reporting one, the count that it made."""
        caller, just = self._begin()
        if just is Just.COUNTED_PROBE:
            caller.just = Just.READ_COUNT
            return caller.count
        return self._ask(caller, Load()).circuit.success_counter

    @property
    def opened_at(self) -> datetime | None:
        """When the circuit opened last, aware, by the local clock; ``None`` if the gate stands open to a probe.

        While somebody else probes: the end of their lease.
        """
        caller, _ = self._begin()
        reply = self._ask(caller, Load())
        caller.just, caller.opened_generation = Just.READ_OPENED_AT, reply.circuit.generation
        at_ms = reply.circuit.opened_at_ms
        if reply.circuit.state == HALF_OPEN and self._state_for(caller, reply) == OPEN:
            at_ms = None if reply.circuit.probe_is_free(reply.now_ms) else reply.circuit.probe_until_ms
        return None if at_ms is None else from_ms(at_ms)

    @opened_at.setter
    def opened_at(self, at: datetime) -> None:
        caller, _ = self._begin(writes=True)
        failure = sys.exc_info()[1]
        if failure is not None and caller.failure == id(failure):
            if caller.refused:
                # The failure came too late to count, so nothing trips; the caller gets their own exception.
                raise failure
        else:
            if not isinstance(at, datetime):
                msg = f"opened_at must be a datetime, not {at!r}"
                raise TypeError(msg)
            self._ask(caller, self._set_opened_at(to_ms(at)))
            caller.tripping = None, ""
        caller.just = Just.SET_OPENED_AT

    # Behind it ----------------------------------------------------------------------------------------------------

    def _begin(self, *, writes: bool = False, may_close: bool = False) -> tuple[Caller, Just]:
        caller = self._caller
        just, caller.just = caller.just, Just.NOTHING
        if just is Just.HOLDS_RESET and not may_close:
            self._ask(caller, ResetProbes())
        if writes:
            # A listener that raised has kept the echo from coming; it must not swallow a later assignment.
            caller.echo = ""
        return caller, just

    def _ask(self, caller: Caller, intent: Intent) -> Reply:
        reply = self._execute(intent)
        if reply.event == "created" and reply.circuit.state == HALF_OPEN:
            # Whoever asked for a half-open circuit is its first prober, until somebody else claims.
            caller.half_opened = reply.circuit.generation
        return reply

    def _state_for(self, caller: Caller, reply: Reply) -> str:
        circuit = reply.circuit
        if circuit.state != HALF_OPEN:
            return circuit.state
        return HALF_OPEN if self._may_probe(caller, circuit, reply.now_ms) else OPEN

    def _may_probe(self, caller: Caller, circuit: Circuit, now_ms: float) -> bool:
        if not circuit.probe_token:
            return caller.half_opened == circuit.generation
        if circuit.probe_token != caller.token or caller.pid != os.getpid():
            return False
        return caller.fresh or now_ms < circuit.probe_until_ms

    def _claim_probe(self, caller: Caller) -> None:
        token = secrets.token_hex(8)
        reply = self._ask(caller, ClaimProbe(caller.opened_generation, token, self._lease_ms))
        if not reply.accepted:
            msg = "Another caller is testing the dependency, circuit breaker still open"
            raise CircuitBreakerError(msg)
        caller.admit(reply.circuit.generation, token, probing=True)
        caller.pid, caller.fresh, caller.echo = os.getpid(), True, HALF_OPEN

    def _close(self, caller: Caller, intent: Close) -> None:
        self._ask(caller, intent)
        caller.echo = CLOSED


def check_state(argument: str, state: str) -> None:
    """Refuse a state that pybreaker does not know, naming the argument."""
    if state not in STATES:
        msg = f"{argument} must be one of {', '.join(map(repr, STATES))}, not {state!r}"
        raise ValueError(msg)


def lease_ms(probe_lease: float) -> int:
    """Validate a lease in seconds; whole milliseconds."""
    if isinstance(probe_lease, bool) or not isinstance(probe_lease, (int, float)):
        msg = f"probe_lease must be a number of seconds, not {probe_lease!r}"
        raise TypeError(msg)
    if not 0.001 <= probe_lease <= MAX_LEASE_MS / 1000:
        msg = f"probe_lease must lie between 0.001 and {MAX_LEASE_MS // 1000} seconds, not {probe_lease!r}"
        raise ValueError(msg)
    return round(probe_lease * 1000)
