"""Rights: the rights that ``docs/reference/rights.rst`` lists are sufficient, and none of them can be left out."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis._redis.keys import channel_of, circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.agreement import CircuitPair
from tests.support.breakers import breaker_on, fails, up
from tests.support.clients import PROTOCOLS
from tests.support.inspect import disable_resp3, listener_connections, storage_of, view_of
from tests.support.logs import messages_of
from tests.support.outages import health_of
from tests.support.rights import PAGE, rights_of_page
from tests.support.wait import wait_for
from tests.support.ways import is_breaker

pytestmark = pytest.mark.usefixtures("no_listeners")

#: Seconds until a missing effect counts as a loss.
LOSS_AFTER_S = 5.0
#: The same limit where a loss is expected, seconds.
EXPECTED_LOSS_AFTER_S = 0.8

STALENESS_S = 0.3

#: New names, because listeners of earlier users run on for a while.
_names = (f"user{number}" for number in itertools.count())


RIGHTS = [word for word in rights_of_page() if word[0] in "+~&"]

#: Rights that the page lists for users without scripts.
TRANSACTIONS = ["+watch", "+multi", "+exec", "+unwatch"]
SCRIPTS = ["+evalsha", "+eval"]

#: Rights that the page lists as the least, beside the keys, and scripts or transactions.
LEAST = ["+time", "+mget", "+exists", "+hmget", "+set", "+del", "+hset"]

#: Rights that the page adds for pybreaker's storage.
OF_STOCK = ["+get", "+setnx", "+incrby", "+watch", "+multi", "+exec", "+unwatch"]

#: Rights that older libraries do not use.
ONLY_RESP3 = ("+client|tracking", "+client|caching")


class FeatureLoss(Exception):
    """A feature does not work, or a log line reports it missing."""


@contextlib.contextmanager
def expected(what: str) -> Iterator[None]:
    """Report any error in the block as the loss of this feature."""
    try:
        yield
    except (AssertionError, redis.RedisError, pybreaker.CircuitBreakerError) as error:
        raise FeatureLoss(f"{what}: {error}") from error


@contextlib.contextmanager
def limited(server: PrivateServer, words: list[str]) -> Iterator[redis.Redis]:
    """Yield a client of a new user with these rights."""
    name = next(_names)
    with contextlib.closing(server.client()) as operator:
        operator.execute_command("ACL", "SETUSER", name, "on", ">secret", *words)
    with contextlib.closing(server.client(username=name, password="secret")) as client:
        yield client


class Service:
    """Every feature of a circuit and a listener, as a sequence of steps.

    Args:
        client: Client of the user under test.
        operator: Client with all rights.
        protocol: Protocol of the listener.
        patience: Seconds until a missing effect counts as a loss.
        caplog: Log in which missing features are reported.
    """

    def __init__(
        self,
        client: redis.Redis,
        operator: redis.Redis,
        protocol: int,
        patience: float,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        # Otherwise, a script that another client has sent would be loaded already.
        operator.script_flush()
        self.client, self.operator, self.protocol, self.caplog = client, operator, protocol, caplog
        self.patience = patience
        self.namespace = next(_names)
        self.keys = circuit_keys(self.namespace, needs_one_slot=False)
        self.channel = channel_of(self.keys, 0)
        self.breaker = breaker_on(client, self.namespace, fail_max=1, max_staleness=STALENESS_S, timeout=2.0)
        self.other = breaker_on(operator, self.namespace, fail_max=1, max_staleness=0, timeout=2.0)

    def missing_features(self) -> list[str]:
        """Return the log lines except those about repairs and about a library without RESP3."""
        expected_parts = ("(repaired ", *(["does not track keys"] if self.protocol == 2 else []))
        lines = messages_of(self.caplog, health_of(self.breaker).server, self.namespace)
        return [line for line in lines if not any(words in line for words in expected_parts)]

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition, and fail as soon as a log line reports a missing feature."""

        def is_over() -> bool:
            return bool(self.missing_features()) or bool(condition())

        wait_for(is_over, what, within=self.patience)
        assert not self.missing_features(), self.missing_features()

    def check_calls(self) -> None:
        """Assert that calls need no round trip."""
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
            assert listener_connections(self.operator)

    def check_pushes(self) -> None:
        """Assert that changes by other processes arrive."""
        with expected("what is published is heard"):
            for verb, state in (("open", "open"), ("close", "closed")):
                getattr(self.other, verb)()
                self.wait(lambda state=state: self.breaker.current_state == state, f"reads {state}")
        with expected("foreign writers are noticed"):
            for state in ("open", "closed"):
                self.operator.set(self.keys[0], state)
                self.wait(lambda state=state: self.breaker.current_state == state, f"reads {state}")

    def check_tracking(self) -> None:
        """Assert that counters above zero are not tracked, so that failures of other processes notify no process."""
        with expected("counters are not tracked"):
            storage_of(self.other).increment_counter()

            def is_read() -> bool:
                return self.breaker.current_state == "closed" and view_of(self.breaker).cached.fail_counter == 1

            self.wait(is_read, "the counter")
            tracked = self.operator.info("stats")["tracking_total_keys"]
            assert tracked == (len(self.keys) - 2 if self.protocol == 3 else 0), "all but the two counters"
            self.breaker.call(up)

    def check_publishing(self) -> None:
        """Assert that trip, probe and recovery are published."""
        with expected("changes are published"), contextlib.closing(self.operator.pubsub()) as subscriber:
            subscriber.subscribe(self.channel)
            self.wait(subscriber.get_message, "subscribed")
            fails(self.breaker)
            assert self.other.current_state == "open"
            self.wait(subscriber.get_message, "a message")
        with expected("a probe"):
            self.breaker.reset_timeout = 0
            assert self.breaker.call(lambda: self.other.current_state) == ("half-open" if is_breaker else "open")
            assert self.other.current_state == "closed"
        with expected("a success forgets failures"):
            storage_of(self.other).increment_counter()
            self.wait(lambda: view_of(self.breaker).fast_path.quiet_admission is None, "noise")
            self.breaker.call(up)
            assert self.other.fail_counter == 0

    def check_unsubscribing(self) -> None:
        """Assert that removed circuits are unsubscribed, without an effect on other circuits."""
        with expected("another circuit comes and goes"):
            other_breaker = breaker_on(self.client, next(_names), max_staleness=STALENESS_S, timeout=2.0)
            other_breaker.call(up)
            channel = channel_of(circuit_keys(storage_of(other_breaker).health().circuit, needs_one_slot=False), 0)
            subscribed = lambda: dict(self.operator.pubsub_numsub(channel))[channel.encode()]  # noqa: E731
            self.wait(subscribed, "the subscription")
            del other_breaker
            gc.collect()
            self.wait(lambda: not subscribed(), "the end of the subscription")
            assert health_of(self.breaker).push != "none"

    def check_repairs(self) -> None:
        """Assert that damage is repaired."""
        with expected("damage is repaired"):
            self.operator.delete(self.keys[3], self.keys[4])
            self.operator.rpush(self.keys[3], "damage")
            self.operator.set(self.keys[4], "damage")

            def is_repaired() -> bool:
                self.breaker.call(up)
                return self.operator.type(self.keys[3]) != b"list" and self.operator.type(self.keys[4]) == b"hash"

            self.wait(is_repaired, "mended")


def run_service(
    client: redis.Redis, operator: redis.Redis, protocol: int, patience: float, caplog: pytest.LogCaptureFixture
) -> Service:
    """Run all steps.

    Raises:
        FeatureLoss: A feature does not work, or a log line reports it missing.
    """
    caplog.set_level("INFO", "pybreaker_redis")
    caplog.clear()
    service = Service(client, operator, protocol, patience, caplog)
    steps = (
        service.check_calls,
        service.check_tracking,
        service.check_pushes,
        service.check_publishing,
        service.check_unsubscribing,
        service.check_repairs,
    )
    for step in steps:
        step()
        if missing_features := service.missing_features():
            raise FeatureLoss("; ".join(missing_features))
    return service


def test_rights_of_the_page_are_sufficient(
    every_server: PrivateServer, protocol: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With the page's line as it stands, every feature works, and no log line reports a missing one."""
    with (
        limited(every_server, rights_of_page()) as client,
        contextlib.closing(every_server.client()) as operator,
    ):
        operator.execute_command("ACL", "LOG", "RESET")
        service = run_service(client, operator, protocol, LOSS_AFTER_S, caplog)
        health = lambda: health_of(service.breaker)  # noqa: E731
        every_server.pause()
        try:
            service.breaker.call(up)
            wait_for(lambda: service.breaker.call(up) and health().condition == "unreachable", "the outage")
            fails(service.breaker)
            assert health().is_own
            assert health().state == "open"
        finally:
            every_server.resume()
        wait_for(lambda: service.other.current_state == "open", "the report of the local trip")
        wait_for(lambda: health().condition == "connected" and not health().is_own, "use of the shared circuit")
        # The reply is a list of lists or of dictionaries, depending on the library.
        refused = re.findall(r"b'object'[:,] b'([^']+)'", str(operator.execute_command("ACL", "LOG")))
        assert all(what.startswith("client") for what in refused), (
            f"only CLIENT commands of a library may be refused: {refused}"
        )


def test_rights_without_script_lose_the_preloading_only(
    every_server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The shorter line of the page keeps every other feature, and one log line reports the missing one."""
    words = rights_of_page("rights-without-script")
    assert set(rights_of_page()) - set(words) == {"+script|exists", "+script|load"}
    caplog.set_level("INFO", "pybreaker_redis")
    with limited(every_server, words) as client, contextlib.closing(every_server.client()) as operator:
        two = CircuitPair(client, operator, next(_names), operator)
        two.run_lifecycle()
        health = health_of(two.here)
        assert (health.mode, health.condition) == ("lua", "connected")
        # A library without RESP3 is reported, too.
        lines = [line for line in messages_of(caplog, every_server) if "does not track keys" not in line]
        assert [line for line in lines if "does not permit SCRIPT" in line] == lines
        assert len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("right", RIGHTS)
def test_each_right_of_the_page_is_necessary(
    every_server: PrivateServer, right: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any one of the rights, a feature is lost with RESP3 or with RESP2."""
    words = [word for word in rights_of_page() if word != right]
    losses = []
    for protocol in PROTOCOLS:
        if protocol != max(PROTOCOLS):
            disable_resp3(monkeypatch)
        with (
            limited(every_server, words) as client,
            contextlib.closing(every_server.client()) as operator,
        ):
            try:
                run_service(client, operator, protocol, EXPECTED_LOSS_AFTER_S, caplog)
            except FeatureLoss as loss:
                print(f"RESP{protocol}, without {right}: {loss}")
                # A reference to the error would keep the circuit alive, and the circuit would be polled.
                losses.append(str(loss))
                break
    if right in ONLY_RESP3 and max(PROTOCOLS) == 2:
        assert not losses
    else:
        assert losses


def test_user_without_scripts_needs_transactions(every_server: PrivateServer, caplog: pytest.LogCaptureFixture) -> None:
    """The page lists the rights for transactions. Without any of them, no step of the circuit works."""
    page = PAGE.read_text(encoding="utf-8")
    assert "``" + " ".join(TRANSACTIONS) + "``" in page
    caplog.set_level("INFO", "pybreaker_redis")
    words = [word for word in rights_of_page() if word not in SCRIPTS]
    with contextlib.closing(every_server.client()) as operator:
        for missing in (None, *TRANSACTIONS):
            granted = [*words, *(word for word in TRANSACTIONS if word != missing)]
            namespace = next(_names)
            caplog.clear()
            with limited(every_server, granted) as here, contextlib.closing(every_server.client()) as there:
                two = CircuitPair(here, there, namespace, operator)
                if missing is None:
                    two.run_lifecycle()
                    lines = messages_of(caplog, every_server, namespace)
                    assert sum("runs no scripts" in line for line in lines) == 1
                    assert messages_of(caplog, every_server, namespace, level=logging.WARNING) == [
                        line for line in lines if "runs no scripts" in line
                    ]
                    assert health_of(two.here).mode == "optimistic"
                else:
                    # One call counts a failure, and one has nothing to write.
                    fails(two.here)
                    two.here.call(up)
                    two.here.call(up)
                    assert health_of(two.here).condition == "refused", missing


@pytest.mark.parametrize("way", [SCRIPTS, TRANSACTIONS], ids=["scripts", "transactions"])
def test_least_rights_share_circuits(every_server: PrivateServer, way: list[str]) -> None:
    """The keys, seven commands, and scripts or transactions share circuits. Without one of them, circuits are local."""
    page = PAGE.read_text(encoding="utf-8")
    assert "``" + " ".join(LEAST) + "``" in page
    (pattern,) = (word for word in RIGHTS if word.startswith("~"))
    with contextlib.closing(every_server.client()) as operator:
        for missing in (None, pattern, *LEAST):
            granted = ["resetchannels", *(word for word in (pattern, *LEAST, *way) if word != missing)]
            with limited(every_server, granted) as here, limited(every_server, granted) as there:
                two = CircuitPair(here, there, next(_names), operator)
                if missing is None:
                    two.run_lifecycle()
                    assert health_of(two.here).mode == ("lua" if way is SCRIPTS else "optimistic")
                else:
                    # Only the repair of a value of another type deletes a key.
                    operator.rpush(f"{two.namespace}:pybreaker:opened_at", "damage")
                    # Only a transition is certain to write the hash.
                    fails(two.here, 2)
                    assert health_of(two.here).condition == "refused", missing


class TestRightsOfBothStorages:
    """The page's line for a fleet in which some workers have pybreaker's own storage."""

    def test_line_adds_the_rights_of_stock(self) -> None:
        """The line begins as the line for this package alone."""
        assert rights_of_page("rights-of-both") == [*rights_of_page(), *OF_STOCK]
        assert "``" + " ".join(OF_STOCK) + "``" in PAGE.read_text(encoding="utf-8")

    def test_line_is_sufficient_for_both(self, every_server: PrivateServer) -> None:
        """Workers with either storage share a circuit through all of its states, and the server refuses nothing."""
        namespace = next(_names)
        with (
            limited(every_server, rights_of_page("rights-of-both")) as client,
            contextlib.closing(every_server.client()) as operator,
        ):
            operator.execute_command("ACL", "LOG", "RESET")
            assert errors_of_stock(client, namespace) == []
            breaker = breaker_on(client, namespace, max_staleness=0, timeout=2.0)
            assert breaker.current_state == "open"
            breaker.close()
            theirs = pybreaker.CircuitRedisStorage("closed", client, namespace)
            assert theirs.state == "closed"
            refused = re.findall(r"b'object'[:,] b'([^']+)'", str(operator.execute_command("ACL", "LOG")))
            assert all(what.startswith("client") for what in refused), refused

    @pytest.mark.parametrize("right", [right for right in (*OF_STOCK, "+set") if right != "+unwatch"])
    def test_stock_needs_each_right(self, every_server: PrivateServer, right: str) -> None:
        """Without one of them, pybreaker's storage logs or raises an error. UNWATCH is sent after an error only."""
        words = [word for word in rights_of_page("rights-of-both") if word != right]
        with limited(every_server, words) as client:
            assert errors_of_stock(client, next(_names))


def errors_of_stock(client: redis.Redis, namespace: str) -> list[str]:
    """Take a circuit of pybreaker's storage through all states until it is open, and return the errors."""
    errors: list[str] = []
    try:
        storage = pybreaker.CircuitRedisStorage("closed", client, namespace)
        # The storage logs errors of Redis, and raises only those of its constructor.
        storage.logger = SimpleNamespace(exception=errors.append)  # type: ignore[assignment]
        breaker = pybreaker.CircuitBreaker(fail_max=2, reset_timeout=0, success_threshold=2, state_storage=storage)
        fails(breaker, 2)
        breaker.call(up)
        breaker.call(up)
        breaker.open()
    except (redis.RedisError, pybreaker.CircuitBreakerError) as error:
        errors.append(repr(error))
    return errors
