"""Half-open probes of this process: tokens that a call holds, and tokens that no call holds.

A server may execute a claim after the claiming caller gave up waiting, and the report of a probe may get no reply.  The
record then names a prober that never reports, and the fleet would wait for the end of the lease.  This process has the
token, so it offers the probe to one of its own callers.  That caller claims the probe with a new token, in a new
generation.  The server then refuses whatever it executes late for the former call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace

from pybreaker_redis._model.circuit import HALF_OPEN
from pybreaker_redis._model.intents import (
    ClaimProbe,
    CountProbe,
    Intent,
    RecordFailure,
    RecordSuccess,
    Reply,
)
from pybreaker_redis._runtime.fork import ForkSafe, renew

#: Most offered tokens that are kept.  Each outage or recovery leaves a few.
PROBE_TOKENS_MAX = 256

#: Most claims of one circuit that are kept.  A record names one of them at most.
CLAIMS_PER_CIRCUIT_MAX = 64

#: Most claims that a context keeps: the depth of nested calls that probe.
CLAIMS_PER_CONTEXT_MAX = 8

#: Tokens that the running context claimed last: tasks share a thread, and each task has its context.
#: One variable serves all circuits, because a variable is never freed.
_CLAIMED: ContextVar[tuple[str, ...]] = ContextVar("probes claimed", default=())

#: Intents after which the call goes on, once they are granted.
_GO_ON = (ClaimProbe, RecordSuccess)


class ProbeTokens(ForkSafe):
    """Tokens of the probes of this process: claimed ones, and ones that may be claimed instead.

    Tokens are random, so one set serves all circuits.  A token in no record does no harm.  Forked children start empty:
    the parent's probes are not theirs.
    """

    def __init__(self) -> None:
        self._offered: dict[str, None] = {}
        #: Tokens that were offered, also those that were taken since.
        self._ended: dict[str, None] = {}
        super().__init__()

    def _reset_in_child(self) -> None:
        self._offered, self._ended = {}, {}

    def take(self, token: str) -> bool:
        """Take an offered token for one caller.  Every other caller that claims the token is refused."""
        return self._offered.pop(token, self) is None

    def release(self, token: str) -> None:
        """Offer a token to the callers of this process, in place of the oldest if there are too many."""
        for tokens in (self._offered, self._ended):
            tokens[token] = None
            # The list is a copy, made in one step: other threads take and release tokens meanwhile.
            for oldest in list(tokens)[:-PROBE_TOKENS_MAX]:
                tokens.pop(oldest, None)

    def has_ended(self, token: str) -> bool:
        """Whether no call holds the token, though a record may still name the token while another caller claims."""
        return token in self._ended or token in self._offered

    def track(self, run: Callable[[Intent], Reply], intent: Intent, token: str) -> Reply:
        """Carry out an intent that names a probe, and offer the probe's token once no call holds the probe.

        Args:
            run: Function that carries out the intent.
            intent: Wanted change.
            token: Token of the probe that the intent names.
        """
        try:
            reply = run(intent)
        except BaseException:
            self.release(token)
            raise
        finally:
            if isinstance(intent, ClaimProbe) and intent.lost_token:
                # Without a reply the record may name either token.
                self.release(intent.lost_token)
        if not _goes_on(intent, reply):
            self.release(token)
        return reply

    def mask_free_probe(self, reply: Reply) -> Reply:
        """Return a reply as this process may use it: a probe that none of its calls holds is free."""
        circuit = reply.circuit
        if circuit.state == HALF_OPEN and circuit.probe_token in self._offered:
            return replace(reply, circuit=replace(circuit, probe_until_ms=0))
        return reply


def _goes_on(intent: Intent, reply: Reply) -> bool:
    """Whether a call holds the probe after the intent: a new claim, or a report that another one follows."""
    if isinstance(intent, (CountProbe, RecordFailure)):
        return reply.accepted and reply.circuit.probe_token == intent.token
    return reply.accepted and isinstance(intent, _GO_ON)


#: The probes of this process.
PROBE_TOKENS = ProbeTokens()


class HeldProbes(ForkSafe):
    """Claims of one circuit's probe by threads of this process.  A forked child starts without any."""

    def __init__(self) -> None:
        #: Thread of each claim, the newest last.
        self._claims: dict[str, int] = {}
        super().__init__()

    def _reset_in_child(self) -> None:
        self._claims = {}

    def claim(self, token: str) -> None:
        """Note that the running thread and context hold a granted probe, instead of the thread that held the probe."""
        # Looked up at each call: gevent replaces the function, in gunicorn's workers after the application was loaded.
        self._claims[token] = threading.get_ident()
        for oldest in list(self._claims)[:-CLAIMS_PER_CIRCUIT_MAX]:
            self._claims.pop(oldest, None)
        _CLAIMED.set((*_CLAIMED.get()[1 - CLAIMS_PER_CONTEXT_MAX :], token))

    def is_held_here(self, token: str) -> bool:
        """Whether the running thread claimed the probe in the running context, and the probe has not ended."""
        return token in self.held_here()

    def held_here(self) -> frozenset[str]:
        """Return the probes that the running thread claimed in the running context, and that have not ended."""
        # An operator's question may come before the first call of a process.
        renew()
        thread = threading.get_ident()
        return frozenset(
            token for token in _CLAIMED.get() if self._claims.get(token) == thread and not PROBE_TOKENS.has_ended(token)
        )
