"""Probe tokens of this process that no call holds.

Knows: tokens, intents, replies.  Does not know: breakers, Redis.

A server may execute a claim after the claiming caller gave up waiting, and the report of a probe may get no answer.
The record then names a prober that never comes back, and the fleet would wait for the end of the lease.  This process
has the token, so it offers the probe to one of its own callers.  That caller claims it with a new token, in a new
generation: what the server executes late of the former call is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from pybreaker_redis._model.circuit import HALF_OPEN
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    RecordFailure,
    RecordSuccess,
    Reply,
    Trip,
)

#: Tokens that are remembered at most; each outage or recovery leaves a few.
PROBE_TOKENS_MAX = 256

#: Intents after which the call goes on, once they are granted.
_GO_ON = (ClaimProbe, RecordFailure, RecordSuccess)

#: Intents that name the probe of their call.
_WITH_TOKEN = (*_GO_ON, CountProbe, Close, Trip)


class ProbeTokens:
    """Tokens instead of which this process may claim: unanswered claims, and probes that were reported.

    Tokens are random, so one set serves all circuits.  A token in no record does no harm.  Forked children start empty:
    the parent's probes are not theirs.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, None] = {}
        #: Tokens that were offered, also those that were taken since.
        self._ended: dict[str, None] = {}
        self._pid = 0

    def take(self, token: str) -> bool:
        """Take a token for one caller; every other caller that wants it is refused."""
        return self._own().pop(token, self) is None

    def release(self, token: str) -> None:
        """Offer a token to the callers of this process; the oldest tokens are forgotten."""
        for tokens in (self._own(), self._ended):
            tokens[token] = None
            # A copy, which is made at once: other threads take and release tokens meanwhile.
            for oldest in list(tokens)[:-PROBE_TOKENS_MAX]:
                tokens.pop(oldest, None)

    def has_ended(self, token: str) -> bool:
        """Return whether no call holds the token, though a record may still name it while another caller claims."""
        return token in self._own() or token in self._ended

    def track(self, run: Callable[[Intent], Reply], intent: Intent) -> Reply:
        """Carry out an intent, and follow what becomes of the probe that it is about."""
        token = _token_of(intent)
        if not token:
            return self.shown(run(intent))
        try:
            reply = run(intent)
        except BaseException:
            self.release(token)
            raise
        finally:
            if isinstance(intent, ClaimProbe) and intent.lost_token:
                # Without an answer the record may name either token.  One that is in no record does no harm.
                self.release(intent.lost_token)
        if not _goes_on(intent, reply):
            self.release(token)
        return self.shown(reply)

    def shown(self, reply: Reply) -> Reply:
        """Return the reply as this process may use it: a probe that none of its calls holds is free."""
        circuit = reply.circuit
        if circuit.state == HALF_OPEN and circuit.probe_token in self._own():
            return replace(reply, circuit=replace(circuit, probe_until_ms=0))
        return reply

    def _own(self) -> dict[str, None]:
        if self._pid != os.getpid():
            self._tokens, self._ended, self._pid = {}, {}, os.getpid()
        return self._tokens


def _token_of(intent: Intent) -> str:
    return intent.token if isinstance(intent, _WITH_TOKEN) else ""


def _goes_on(intent: Intent, reply: Reply) -> bool:
    """Whether a call holds the probe after the intent: a new claim, or a report that another one follows."""
    if isinstance(intent, CountProbe):
        return reply.accepted and reply.circuit.probe_token == intent.token
    return reply.accepted and isinstance(intent, _GO_ON)


#: The probes of this process.
PROBE_TOKENS = ProbeTokens()
