"""The return of many circuits to a server that answers again, in batches.

Knows: which circuits can be read together, how long that may take.  Does not know: who asks again, what is in a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from pybreaker_redis import _said
from pybreaker_redis._clock import moment, monotonic
from pybreaker_redis._deadline import deadline
from pybreaker_redis._guard import Meaning, is_rejected, meaning_of
from pybreaker_redis._intents import Load
from pybreaker_redis._optimistic import Question, read
from pybreaker_redis._secrets import described
from pybreaker_redis._tenant import Tenant

#: Circuits that are read in one round trip.
BATCH = 200

#: Circuits with something to report that are brought back before callers are let in; further ones do not hold these up.
BROUGHT_BACK_FIRST = 50


def rejoin(tenants: Sequence[Tenant], patience: float, outcomes: Counter[str]) -> None:
    """Have the circuits of one server rejoin that have learned nothing, and whose record is well; and some others.

    Args:
        tenants: All that live there.
        patience: Seconds to wait for the first answer, if that is more than the circuits' own timeout.
        outcomes: What comes of the others is counted here.

    Raises:
        Exception: The server does not answer, or takes no writes; whatever the client raises then.
    """
    asked = [tenant for tenant in tenants if tenant.is_alone] or tenants[:1]
    read = set(_read_again(asked, patience))
    # A server that takes no writes is followed: the views hold what was read.
    for tenant in asked:
        with deadline(tenant.timeout), _said.unless(Meaning.AWAY, Meaning.READ_ONLY):
            tenant.check_writable()
            break
    for tenant in tenants:
        if tenant in read or not tenant.is_alone:
            tenant.rejoins_at_once()
    alone = [tenant for tenant in tenants if tenant.is_alone]
    if ended_by := bring_back(alone[:BROUGHT_BACK_FIRST], outcomes):
        raise ended_by[0]


def bring_back(tenants: Iterable[Tenant], outcomes: Counter[str]) -> tuple[Exception, Tenant, float] | None:
    """Have circuits rejoin one by one that are still alone: those that have something to report, or to repair.

    Callers that were under way when the server returned may have begun a local circuit since.

    Args:
        tenants: Some that live there.
        outcomes: What comes of them is counted here.

    Returns:
        What ended it: the error that the server does not answer, or takes no writes, the circuit that met it, and when
        that circuit began to ask.
    """
    for tenant in tenants:
        if tenant.is_alone:
            began = monotonic()
            try:
                with deadline(tenant.timeout):
                    tenant.load()
                    outcomes[tenant.rejoin() or ""] += 1
            except Exception as error:  # noqa: BLE001
                if meaning_of(error) in (Meaning.AWAY, Meaning.READ_ONLY):
                    return error, tenant, began
                # The next caller logs what is wrong with this one.
                _said.detail("not brought back: %s", described(error))
    return None


def _read_again(tenants: Sequence[Tenant], patience: float) -> list[Tenant]:
    """Read circuits of one server together.

    Args:
        tenants: Their tenants.
        patience: Seconds to wait for the first answer, if that is more than the circuits' own timeout.

    Returns:
        Those whose record needs no repair; their views hold it.  The others have to be loaded one by one.

    Raises:
        Exception: The server does not answer; whatever the client raises then.
    """
    found: list[Tenant] = []
    for batch in _batches(tenants):
        timeouts = [tenant.timeout for tenant, _ in batch]
        timeout = None if None in timeouts else max(patience, *(seconds or 0 for seconds in timeouts))
        with deadline(timeout):
            try:
                found += _read(batch)
            except Exception as error:
                if not is_rejected(error):
                    raise
                # A single load looks for other credentials, and raises if there are none.
                batch[0][0].shared.execute(Load())
                found += _read(batch)
        # The others are read on the same connection.
        patience = 0
    return found


def _batches(tenants: Sequence[Tenant]) -> Iterator[list[tuple[Tenant, Question]]]:
    together: dict[int, list[tuple[Tenant, Question]]] = {}
    for tenant in tenants:
        with _said.unless(Meaning.AWAY):
            question = tenant.shared.question
            pool = getattr(question.client, "connection_pool", question.client)
            together.setdefault(id(pool), []).append((tenant, question))
    for group in together.values():
        for first in range(0, len(group), BATCH):
            yield group[first : first + BATCH]


def _read(batch: list[tuple[Tenant, Question]]) -> list[Tenant]:
    tickets = [tenant.shared.ticket() for tenant, _ in batch]
    before = moment()
    with _said.unless(Meaning.AWAY):
        answers = read([question for _, question in batch])
        after = moment()
        for answer in answers:
            if isinstance(answer.error, Exception) and meaning_of(answer.error) is Meaning.AWAY:
                raise answer.error
        found = []
        for (tenant, _), ticket, answer in zip(batch, tickets, answers, strict=True):
            if answer.reply is not None:
                tenant.shared.was_read(ticket, answer.reply, before, after)
                found.append(tenant)
        return found
    return []
