"""Replies of Redis that were changed on their way to the client."""

from __future__ import annotations

import contextlib
import logging

import pytest
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._model.circuit import CLOSED
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.faults import site_of
from tests.support.inspect import storage_of
from tests.support.logs import messages_of

#: Changes that a proxy makes to the replies of scripts and of single commands.
TAMPERED = {
    "state": {b"$6\r\nclosed": b"$6\r\najar!!"},
    "count": {b"closed\r\n:0": b"closed\r\n:-7"},
    "text for a count": {b"closed\r\n:0": b"closed\r\n$1\r\n0"},
    "length": {b"*13\r\n:1": b"*12\r\n:1"},
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_changed_reply_does_not_reach_the_call(
    killable_server: PrivateServer, caplog: pytest.LogCaptureFixture, tampered: str
) -> None:
    """After a changed reply the local circuit works: calls pass, failures count, and it opens, with one log line."""
    caplog.set_level(logging.WARNING)
    with site_of(killable_server) as site, contextlib.closing(site.client()) as client:
        breaker = CircuitBreaker(fail_max=2, state_storage=CircuitRedisStorage(CLOSED, client, "answers"))
        site.proxy.replaced = TAMPERED[tampered]
        assert breaker.call(lambda: "answer") == "answer"
        for raised in (ZeroDivisionError, CircuitBreakerError):
            with pytest.raises(raised):
                breaker.call(lambda: 1 / 0)
        with pytest.raises(CircuitBreakerError):
            breaker.call(lambda: "answer")
        assert storage_of(breaker).health().is_own
        lines = messages_of(caplog, site, "circuit 'answers'")
        assert [line for line in lines if "UnusableReply" in line] == lines[:1]
