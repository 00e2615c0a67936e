"""Reads and returns of many circuits at once: after an outage of their server, and for commands of operators.

Circuits on one connection pool are read in one round trip.  After an outage the circuits that have nothing to report
return at once, and the others one by one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

from pybreaker_redis import _log
from pybreaker_redis._circuits.budget import operator_timeout_s, operator_wait
from pybreaker_redis._circuits.shared import SharedCircuit
from pybreaker_redis._engines.reader import ReadRequest, read_circuits
from pybreaker_redis._model.intents import Intent, Load, Reply
from pybreaker_redis._redis.classify import ErrorKind, error_kind, is_authentication_error, suppress_except
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._runtime.clock import instant, monotonic
from pybreaker_redis._runtime.interruption import find_interruption
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import describe_error, mask_error
from pybreaker_redis._servers.member import Member, MemberFailure, ReturnProgress

#: Most circuits that are read in one round trip.
READ_BATCH_CIRCUITS = 200

#: Most circuits with something to report that return before callers are let in.  The others follow after that.
RETURN_FIRST_CIRCUITS_MAX = 50


class ReturningCircuit(Member, Protocol):
    """Member of a server, with what its return takes.

    Attributes:
        timeout: Seconds that the circuit waits for an answer.  ``None``: as long as the client does.
        shared: The shared circuit.
    """

    timeout: float | None
    shared: SharedCircuit

    @property
    def uses_local(self) -> bool:
        """Whether calls use the local circuit, so that there may be failures to report."""
        ...

    def locate_read_request(self) -> ReadRequest:
        """Locate the circuit, and return the request that reads it together with others."""
        ...

    def run_shared(self, intent: Intent) -> Reply:
        """Carry out an intent on the shared circuit.  An error of the client passes unchanged."""
        ...

    def load(self) -> None:
        """Query the shared circuit, and repair its record."""

    def resume_if_unchanged(self) -> None:
        """Use the shared circuit again if the local one has nothing to report.  No command is sent."""

    def verify_writable(self) -> None:
        """Write to the server without changing the circuit."""

    def bring_back(self) -> str | None:
        """Report the local circuit to the shared one, and use the shared one again.

        Returns:
            Result for the log, empty if there is none.  ``None`` if another thread reports the circuit.
        """


def return_members(members: Sequence[Member], attempt: ReturnProgress) -> MemberFailure | None:
    """Have all circuits of a server return to it.  See `Member.on_server_returned`.

    Args:
        members: Circuits that are stored on the server.  All members of a server are circuits of this package.
        attempt: The attempt that the server makes.

    Returns:
        The failure that ended the return after callers were let in.
    """
    bring_back_first(cast("Sequence[ReturningCircuit]", members), attempt.answer_wait_s, attempt.outcomes)
    attempt.let_callers_in()
    return bring_back_rest(attempt)


def bring_back_rest(attempt: ReturnProgress) -> MemberFailure | None:
    """Have the remaining circuits return, and those that were added since the attempt began."""
    return bring_back_each(cast("Sequence[ReturningCircuit]", attempt.current_members()), attempt.outcomes)


def bring_back_first(members: Sequence[ReturningCircuit], answer_wait_s: float, outcomes: Counter[str]) -> None:
    """Have circuits of one server return before callers are let in.

    These are all circuits that have nothing to report and an intact record, and `RETURN_FIRST_CIRCUITS_MAX` others.
    An error of the client passes unchanged if the server does not answer or takes no writes.

    Args:
        members: Circuits that are stored on the server.
        answer_wait_s: Seconds to wait for the first answer, if that is more than the timeout of a circuit.
        outcomes: Number of circuits for each result, incremented here.
    """
    queried = [member for member in members if member.uses_local] or members[:1]
    # In the order in which they were read, and found without a search.
    intact = dict.fromkeys(_read_again(queried, answer_wait_s))
    # A server that takes no writes ends the attempt, but the views hold what was read.  The repair of another record is
    # a write in any case, and the check would write a part of that record.
    for member in intact:
        with deadline(member.timeout), suppress_except(ErrorKind.UNREACHABLE, ErrorKind.READ_ONLY):
            member.verify_writable()
            break
    for member in members:
        if member in intact or not member.uses_local:
            member.resume_if_unchanged()
    local = [member for member in members if member.uses_local]
    if failure := bring_back_each(local[:RETURN_FIRST_CIRCUITS_MAX], outcomes):
        raise failure.error


def bring_back_each(members: Iterable[ReturningCircuit], outcomes: Counter[str]) -> MemberFailure | None:
    """Have circuits return one by one that have something to report or to repair.

    Callers that were under way when the server returned may have begun a local circuit since.

    Args:
        members: Circuits that are stored on the server.
        outcomes: Number of circuits for each result, incremented here.

    Returns:
        The failure of the server that ended the return, ``None`` if there was none.
    """
    for member in members:
        if member.uses_local:
            began_at = monotonic()
            try:
                with deadline(member.timeout):
                    member.load()
                    outcomes[member.bring_back() or ""] += 1
            except Exception as error:  # noqa: BLE001
                if error_kind(error) in (ErrorKind.UNREACHABLE, ErrorKind.READ_ONLY):
                    return MemberFailure(error, member, began_at)
                # The next caller logs the fault of this circuit.
                emit(_log.detail("circuit not reconciled (%s)", describe_error(error)))
    return None


def _read_again(members: Sequence[ReturningCircuit], answer_wait_s: float) -> list[ReturningCircuit]:
    """Read circuits of one server together.  An error of the client passes unchanged if the server does not answer.

    Args:
        members: The circuits.
        answer_wait_s: Seconds to wait for the first answer, if that is more than the timeout of a circuit.

    Returns:
        Circuits with a record that needs no repair: their views hold the record.  The others are loaded one by one.
    """
    found: list[ReturningCircuit] = []
    for batch in _batches(members):
        timeouts = [member.timeout for member, _ in batch]
        timeout = None if None in timeouts else max(answer_wait_s, *(seconds or 0 for seconds in timeouts))
        with deadline(timeout):
            try:
                found += _read(batch)
            except Exception as error:
                if not is_authentication_error(error):
                    raise
                # A single load looks for other credentials, and raises if there are none.
                batch[0][0].run_shared(Load())
                found += _read(batch)
        # The next batches are read on the same connection.
        answer_wait_s = 0
    return found


def _batches(members: Sequence[ReturningCircuit]) -> Iterator[list[tuple[ReturningCircuit, ReadRequest]]]:
    together: dict[int, list[tuple[ReturningCircuit, ReadRequest]]] = {}
    for member in members:
        with suppress_except(ErrorKind.UNREACHABLE):
            request = member.locate_read_request()
            pool = getattr(request.client, "connection_pool", request.client)
            together.setdefault(id(pool), []).append((member, request))
    for group in together.values():
        for first in range(0, len(group), READ_BATCH_CIRCUITS):
            yield group[first : first + READ_BATCH_CIRCUITS]


def _read(batch: list[tuple[ReturningCircuit, ReadRequest]]) -> list[ReturningCircuit]:
    tickets = [member.shared.begin_bulk_read() for member, _ in batch]
    before = instant()
    with suppress_except(ErrorKind.UNREACHABLE):
        answers = read_circuits([request for _, request in batch])
        after = instant()
        for answer in answers:
            if isinstance(answer.error, Exception) and error_kind(answer.error) is ErrorKind.UNREACHABLE:
                raise answer.error
        found = []
        for (member, _), ticket, answer in zip(batch, tickets, answers, strict=True):
            if answer.reply is not None and answer.is_intact:
                member.shared.accept_bulk_read(ticket, answer.reply, before, after)
                found.append(member)
        return found
    return []


def read_all_circuits(requests: Sequence[ReadRequest]) -> list[Reply]:
    """Read circuits of one server in one round trip, and change nothing.  An error of the client passes unchanged.

    Args:
        requests: Requests of the circuits, at least one.
    """
    replies = []
    for found in read_circuits(requests):
        if found.reply is None:
            raise cast("Exception", found.error)
        replies.append(found.reply)
    return replies


class OperatedCircuit(Protocol):
    """Circuit in Redis, as commands of operators need it.

    Attributes:
        shared: The circuit in Redis.
        timeout: Seconds a guarded call may wait for Redis.  ``None``: no limit.
    """

    shared: SharedCircuit
    timeout: float | None

    @property
    def name(self) -> str:
        """Name of the circuit."""
        ...

    @property
    def server_name(self) -> str:
        """Address of the server.  Empty while the circuit was not used."""
        ...

    def locate_read_request(self) -> ReadRequest:
        """Locate the circuit, and return the request that reads it together with others."""
        ...

    def run_shared(self, intent: Intent) -> Reply:
        """Carry out an intent on the shared circuit.  An error of the client passes unchanged."""
        ...


def read_for_operator(circuits: Sequence[OperatedCircuit]) -> list[Reply]:
    """Read circuits, all circuits on one server or node at once.  Nothing is created, repaired or cached.

    Args:
        circuits: The circuits.

    Returns:
        For each circuit, in the same order, a reply with times by the local clock.

    Raises:
        StorageUnavailableError: There was no usable reply.
    """
    if not circuits:
        return []
    names, first = tuple(circuit.name for circuit in circuits), circuits[0]
    with operator_wait(names, lambda: first.server_name, operator_timeout_s(first.timeout)):
        return _read_all(circuits)


def _read_all(circuits: Sequence[OperatedCircuit]) -> list[Reply]:
    together: dict[int, list[tuple[OperatedCircuit, ReadRequest]]] = {}
    for circuit in circuits:
        request = circuit.locate_read_request()
        pool = getattr(request.client, "connection_pool", request.client)
        together.setdefault(id(pool), []).append((circuit, request))
    replies: dict[OperatedCircuit, Reply] = {}
    for group in together.values():
        replies.update(_read_group(group))
    return [replies[circuit] for circuit in circuits]


def _read_group(group: list[tuple[OperatedCircuit, ReadRequest]]) -> dict[OperatedCircuit, Reply]:
    before, handled = instant(), sys.exc_info()[1]
    try:
        replies = read_all_circuits([request for _, request in group])
    except Exception as error:
        mask_error(error)
        may_move = error_kind(error) in (ErrorKind.UNUSABLE, ErrorKind.MIGRATING) or is_authentication_error(error)
        if not may_move or find_interruption(error, handled):
            raise
        # The circuits have moved, the server turned out to be a cluster, or the credentials were changed.  A request
        # for one circuit finds that out.
        return {circuit: circuit.run_shared(Load()) for circuit, _ in group}
    after = instant()
    return {
        circuit: circuit.shared.to_local_reply(reply, before, after)
        for (circuit, _), reply in zip(group, replies, strict=True)
    }
