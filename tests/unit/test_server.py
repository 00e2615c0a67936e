"""Servers of this process, without a connection: members and failures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count

import pytest
import redis

from pybreaker_redis._servers.member import Member, MemberFailure, ReturnProgress
from pybreaker_redis._servers.server import Server
from pybreaker_redis._servers.table import server_for
from tests.support.inspect import replace_retry_thread
from tests.support.logs import lines_of

#: Ports on which no server listens, so that each test has a server of its own.
_PORTS = count(1)


class FakeMember:
    """Member that records whether its server was lost."""

    def __init__(self) -> None:
        self.is_lost = False

    def on_server_lost(self) -> None:
        """Note the loss."""
        self.is_lost = True

    def verify_server(self) -> None:
        """Do nothing."""

    def move_if_relocated(self) -> bool:
        """Return that the circuit has not moved."""
        return False

    def on_server_returned(self, members: Sequence[Member], attempt: ReturnProgress) -> MemberFailure | None:
        """Return no failure."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Return a server without a retry thread."""
    server = server_for(redis.Redis(host="127.0.0.1", port=next(_PORTS)))
    replace_retry_thread(monkeypatch, server, runs=True)
    return server


def add(server: Server) -> FakeMember:
    """Add a member to a server."""
    member = FakeMember()
    server.add_member(member, circuit="payments", timeout_s=1.0, max_staleness_s=1.0)
    return member


def test_repr_shows_condition_and_members(server: Server) -> None:
    """A debugger shows what matters in an outage."""
    member = add(server)
    assert repr(server) == f"<Server {server} available, 1 members>"
    server.report_failure(redis.ConnectionError("refused"), member, time.monotonic())
    assert repr(server) == f"<Server {server} unreachable, 1 members>"


def test_failure_that_a_removed_member_met_is_an_outage(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The circuit has moved while its query was under way, and the other circuits of the server are informed."""
    moved, other = add(server), add(server)
    server.remove_member(moved)
    server.report_failure(redis.ConnectionError("refused"), moved, time.monotonic())
    assert server.is_unreachable
    assert other.is_lost
    (line,) = lines_of(caplog, f"{server}")
    assert "(moved)" in line
