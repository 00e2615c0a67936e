"""The rights that the README tells an administrator to grant: enough, and none too many."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis._redis.keys import channel_of, circuit_keys
from pybreaker_redis._replica.connection import PushConnection
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.agreement import Two, health_of
from tests.support.breakers import breaker_on, fails, up
from tests.support.clients import PROTOCOLS
from tests.support.inspect import lines, view_of
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens")

ROOT = Path(__file__).parents[2]

#: Seconds until something counts as lost.
PATIENCE = 5.0
#: The same where that is what is expected.
IMPATIENCE = 0.8

STALENESS = 0.3

#: New names: whoever listened for an earlier user goes on for a while.
_names = (f"user{number}" for number in itertools.count())


def line_of_readme() -> list[str]:
    """The words that follow ``ACL SETUSER``, the name and the password."""
    page = (ROOT / "README.rst").read_text(encoding="utf-8")
    (block,) = re.findall(r"^\.\. begin-rights$.*?^    (ACL .*?)\n\n\.\. end-rights$", page, re.MULTILINE | re.DOTALL)
    first, second, name, on, password, *words = block.split()
    assert (first, second, name, on, password) == ("ACL", "SETUSER", "shop", "on", ">secret")
    assert "\n" not in block, "what is copied is one line"
    return words


RIGHTS = [word for word in line_of_readme() if word[0] in "+~&"]

#: What the README says of users who may not run scripts.
TRANSACTIONS = ["+watch", "+multi", "+exec", "+unwatch"]
SCRIPTS = ["+evalsha", "+eval"]

#: Rights of which older libraries make nothing.
ONLY_RESP3 = ("+client|tracking", "+client|caching")


class Loss(Exception):
    """Something does not work, or a line in the log says so."""


@contextlib.contextmanager
def expected(what: str) -> Iterator[None]:
    """Whatever goes wrong meanwhile is a loss of this."""
    try:
        yield
    except (AssertionError, redis.RedisError, pybreaker.CircuitBreakerError) as error:
        raise Loss(f"{what}: {error}") from error


@contextlib.contextmanager
def limited(server: PrivateServer, words: list[str]) -> Iterator[redis.Redis]:
    """A client of a new user with these rights."""
    name = next(_names)
    with contextlib.closing(server.client()) as operator:
        operator.execute_command("ACL", "SETUSER", name, "on", ">secret", *words)
    with contextlib.closing(server.client(username=name, password="secret")) as client:
        yield client


class Service:
    """Everything that a circuit is for, and a listener, step by step.

    Args:
        client: Of the user.
        operator: Of somebody who may do anything.
        protocol: What the listener speaks.
        patience: Seconds until something counts as lost.
        caplog: Where it would be said that something is missing.
    """

    def __init__(
        self,
        client: redis.Redis,
        operator: redis.Redis,
        protocol: int,
        patience: float,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        # Else a script that somebody else has sent is there already.
        operator.script_flush()
        self.client, self.operator, self.protocol, self.caplog = client, operator, protocol, caplog
        self.patience = patience
        self.namespace = next(_names)
        self.keys = circuit_keys(self.namespace, needs_one_slot=False)
        self.channel = channel_of(self.keys, 0)
        self.breaker = breaker_on(client, self.namespace, fail_max=1, max_staleness=STALENESS, timeout=2.0)
        self.other = breaker_on(operator, self.namespace, fail_max=1, max_staleness=0, timeout=2.0)

    def said(self) -> list[str]:
        """All but that damage was repaired, and that a library without RESP3 cannot be told, whatever its user may."""
        usual = ("(repaired ", *(["does not track keys"] if self.protocol == 2 else []))
        return [line for line in self.caplog.messages if not any(words in line for words in usual)]

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for something, but not once it is clear that it will not come."""

        def is_over() -> bool:
            return bool(self.said()) or bool(condition())

        wait_for(is_over, what, within=self.patience)
        assert not self.said(), self.said()

    def listens(self) -> None:
        """Calls need no round trip."""
        with expected("calls that ask nothing"):

            def is_settled() -> bool:
                self.breaker.call(up)
                view = view_of(self.breaker)
                return bool(view.is_trusted and view.fast_path.quiet_admission)

            self.wait(is_settled, "settled")
        with expected("health"):
            health = health_of(self.breaker)
            assert health.mode == "lua"
            assert health.push == ("tracking" if self.protocol == 3 else "channel")
        with expected("a name in CLIENT LIST"):
            assert lines(self.operator)

    def hears(self) -> None:
        """What others do."""
        with expected("what is published is heard"):
            for verb, state in (("open", "open"), ("close", "closed")):
                getattr(self.other, verb)()
                self.wait(lambda state=state: self.breaker.current_state == state, f"reads {state}")
        with expected("foreign writers are noticed"):
            for state in ("open", "closed"):
                self.operator.set(self.keys[0], state)
                self.wait(lambda state=state: self.breaker.current_state == state, f"reads {state}")

    def is_left_alone(self) -> None:
        """Failures of others are counted, and nobody is told to look at them."""
        with expected("counters are not tracked"):
            tracked = self.operator.info("stats")["tracking_total_keys"]
            assert tracked == (len(self.keys) - 2 if self.protocol == 3 else 0), "all but the two counters"

    def tells(self) -> None:
        """Trip, probe and recovery, and others hear of each."""
        with expected("changes are published"), contextlib.closing(self.operator.pubsub()) as ears:
            ears.subscribe(self.channel)
            self.wait(ears.get_message, "subscribed")
            fails(self.breaker)
            assert self.other.current_state == "open"
            self.wait(ears.get_message, "a message")
        with expected("a probe"):
            self.breaker.reset_timeout = 0
            assert self.breaker.call(lambda: self.other.current_state) == "open"
            assert self.other.current_state == "closed"
        with expected("a success forgets failures"):
            self.other._state_storage.increment_counter()
            self.wait(lambda: view_of(self.breaker).fast_path.quiet_admission is None, "noise")
            self.breaker.call(up)
            assert self.other.fail_counter == 0

    def ceases(self) -> None:
        """Circuits that are gone are listened to no more, and that costs the others nothing."""
        with expected("another circuit comes and goes"):
            also = breaker_on(self.client, next(_names), max_staleness=STALENESS, timeout=2.0)
            also.call(up)
            channel = channel_of(circuit_keys(also._state_storage.health().circuit, needs_one_slot=False), 0)
            subscribed = lambda: dict(self.operator.pubsub_numsub(channel))[channel.encode()]  # noqa: E731
            self.wait(subscribed, "it is listened to")
            del also
            gc.collect()
            self.wait(lambda: not subscribed(), "it is not listened to any more")
            assert health_of(self.breaker).push != "none"

    def mends(self) -> None:
        """Damage."""
        with expected("damage is repaired"):
            self.operator.delete(self.keys[3], self.keys[4])
            self.operator.rpush(self.keys[3], "damage")
            self.operator.set(self.keys[4], "damage")

            def is_mended() -> bool:
                self.breaker.call(up)
                return self.operator.type(self.keys[3]) != b"list" and self.operator.type(self.keys[4]) == b"hash"

            self.wait(is_mended, "mended")


def serve(
    client: redis.Redis, operator: redis.Redis, protocol: int, patience: float, caplog: pytest.LogCaptureFixture
) -> Service:
    """All of it.

    Raises:
        Loss: Something does not work, or is said not to.
    """
    caplog.set_level("INFO", "pybreaker_redis")
    caplog.clear()
    service = Service(client, operator, protocol, patience, caplog)
    steps = (service.listens, service.is_left_alone, service.hears, service.tells, service.ceases, service.mends)
    for step in steps:
        step()
        if said := service.said():
            raise Loss("; ".join(said))
    return service


def test_rights_of_the_readme_are_enough(
    every_server: PrivateServer, protocol: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The line is copied as it stands: full service, and not a word in the log that anything is missing."""
    with (
        limited(every_server, line_of_readme()) as client,
        contextlib.closing(every_server.client()) as operator,
    ):
        operator.execute_command("ACL", "LOG", "RESET")
        service = serve(client, operator, protocol, PATIENCE, caplog)
        health = lambda: health_of(service.breaker)  # noqa: E731
        every_server.pause()
        try:
            service.breaker.call(up)
            wait_for(lambda: service.breaker.call(up) and health().condition == "unreachable", "the outage is noticed")
            fails(service.breaker)
            assert health().is_own
            assert health().state == "open"
        finally:
            every_server.resume()
        wait_for(lambda: service.other.current_state == "open", "what was learned alone is everybody's")
        wait_for(lambda: health().condition == "connected" and not health().is_own, "it goes by the shared circuit")
        # A list of lists or of dictionaries, as the library has it.
        refused = re.findall(r"b'object'[:,] b'([^']+)'", str(operator.execute_command("ACL", "LOG")))
        assert all(what.startswith("client") for what in refused), f"but for what a library says of itself: {refused}"


@pytest.mark.slow
@pytest.mark.parametrize("right", RIGHTS)
def test_none_of_the_rights_is_too_many(
    every_server: PrivateServer, right: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any one of them something is lost, with RESP3 or with RESP2."""
    words = [word for word in line_of_readme() if word != right]
    losses = []
    for protocol in PROTOCOLS:
        if protocol != max(PROTOCOLS):
            monkeypatch.setattr(PushConnection, "_connect_resp3", lambda self, origin: None)
        with (
            limited(every_server, words) as client,
            contextlib.closing(every_server.client()) as operator,
        ):
            try:
                serve(client, operator, protocol, IMPATIENCE, caplog)
            except Loss as loss:
                print(f"RESP{protocol}, without {right}: {loss}")
                # Not itself: with it lives the circuit, which goes on to be asked for.
                losses.append(str(loss))
                break
    if right in ONLY_RESP3 and max(PROTOCOLS) == 2:
        assert not losses
    else:
        assert losses


def test_user_without_scripts_needs_transactions(every_server: PrivateServer, caplog: pytest.LogCaptureFixture) -> None:
    """Those of the README, and without any of them no step of the circuit can be made."""
    page = (ROOT / "README.rst").read_text(encoding="utf-8")
    assert "``" + " ".join(TRANSACTIONS) + "``" in page
    caplog.set_level("INFO", "pybreaker_redis")
    words = [word for word in line_of_readme() if word not in SCRIPTS]
    with contextlib.closing(every_server.client()) as operator:
        for missing in (None, *TRANSACTIONS):
            granted = [*words, *(word for word in TRANSACTIONS if word != missing)]
            namespace = next(_names)
            caplog.clear()
            with limited(every_server, granted) as here, contextlib.closing(every_server.client()) as there:
                two = Two(here, there, namespace, operator)
                if missing is None:
                    two.live()
                    assert sum("runs no scripts" in line for line in caplog.messages) == 1
                    assert [record for record in caplog.records if record.levelname != "INFO"] == [
                        record for record in caplog.records if "runs no scripts" in record.getMessage()
                    ]
                    assert health_of(two.here).mode == "optimistic"
                else:
                    # One that counts something, and one that finds nothing to do.
                    fails(two.here)
                    two.here.call(up)
                    two.here.call(up)
                    assert health_of(two.here).condition == "refused", missing
