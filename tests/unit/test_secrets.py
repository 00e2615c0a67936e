"""Secrets: no password is logged, stored or raised, whatever the errors of client libraries contain."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis
import redis.sentinel

from pybreaker_redis import CircuitRedisStorage, _log
from pybreaker_redis._redis.classify import MissingFeature
from pybreaker_redis._redis.connections.pool import Credentials
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import SECRET_MASK, SECRETS_MAX, mask_error, mask_text, register_secret
from pybreaker_redis._servers.availability import Availability
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.errors import StorageUnavailableError
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.servers import free_port
from tests.support.breakers import up
from tests.support.inspect import count_secrets, replace_secrets
from tests.support.logs import SECRET
from tests.support.servers import ONCE


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drop secrets that other tests registered."""
    replace_secrets(monkeypatch)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("Error 111 connecting to localhost:6379", "Error 111 connecting to localhost:6379"),
        ("redis://shop:p/w?d@there:1/0 is away", "redis://***@there:1/0 is away"),
        ("host=there,password=hidden,db=0", "host=there,password=***,db=0"),
        ("{'ssl_password': 'hid den', 'db': 0}", "{'ssl_password': ***, 'db': 0}"),
        ("<Connection(password=hidden)>", "<Connection(password=***)>"),
        ("?sentinel_password=hidden&db=1", "?sentinel_password=***&db=1"),
        ("Command # 1 (AUTH shop hidden) of pipeline", "Command # 1 (AUTH ***) of pipeline"),
        ("ERR unknown command 'AUTH', with args beginning with: 'hidden' ", f"ERR unknown command 'AUTH', with args beginning with: {SECRET_MASK}"),  # noqa: E501
        ("ERR AUTH <password> called without any password configured", "ERR AUTH <password> called without any password configured"),  # noqa: E501
        ("WRONGPASS invalid username-password pair or user is disabled.", "WRONGPASS invalid username-password pair or user is disabled."),  # noqa: E501
        ("circuit 'payments': payments:pybreaker:circuit@0", "circuit 'payments': payments:pybreaker:circuit@0"),
    ],
)  # fmt: skip
def test_text_is_masked_where_it_looks_like_a_secret(text: str, printed: str) -> None:
    """Servers and libraries include their input in errors. All other text stays unchanged."""
    assert mask_text(text) == printed


@pytest.mark.parametrize(
    ("secret", "text", "printed"),
    [
        (SECRET, f"is{SECRET}it", "is***it"),
        (SECRET.encode(), f"({SECRET})", "(***)"),
        ("p@ss/word", "p%40ss%2Fword and p@ss/word", "*** and ***"),
        ("it's", "it's", "***"),
        ("long\nsecret", r"'long\nsecret'", "'***'"),
        ("ab", "ab cab abc a-ab.", "*** cab abc a-***."),
        (None, "None", "None"),
        ("", "text", "text"),
        (7, "7", "7"),
    ],
)
def test_registered_secret_is_masked_wherever_it_stands(secret: Any, text: str, printed: str) -> None:
    """A secret is masked as it is, quoted for a URL, and as Python prints it. A short one is masked only as a word."""
    register_secret(secret)
    register_secret(secret)
    assert mask_text(text) == printed


def test_oldest_secrets_are_dropped_beyond_the_limit() -> None:
    """Tokens that change every quarter of an hour do not leak memory."""
    for number in range(SECRETS_MAX + 50):
        register_secret(f"token-number-{number}")
    assert count_secrets() == SECRETS_MAX
    assert mask_text("token-number-149 token-number-0") == "*** token-number-0"


def test_error_of_a_client_library_is_masked_and_no_other() -> None:
    """An application's own error may be the one that a caller expects."""
    ours, theirs = redis.ConnectionError("password=hidden", 7), ValueError("password=hidden")
    for error in (ours, theirs):
        mask_error(error)
    assert ours.args == ("password=***", 7)
    assert theirs.args == ("password=hidden",)
    plain = redis.ConnectionError("Error 111")
    mask_error(plain)
    assert plain.args == ("Error 111",)


def test_availability_stores_no_secret() -> None:
    """The stored error is logged and shown by health endpoints."""
    availability = Availability(1.0, has_retry_thread=True)
    outage = availability.note_failure(redis.ConnectionError("no master in ConnectionPool(password=hidden,db=0)"))
    assert outage is not None
    assert "hidden" not in availability.last_error + outage.error


def test_log_lines_have_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings about missing features, about missing push, and debug lines are masked."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    emit(_log.feature_missing("there", feature=MissingFeature.TRACKING.value, error="no RESP3: password=hidden"))
    emit(_log.push_refused("there", error="password=hidden"))
    emit(_log.detail("%s: attempt %d failed (%s)", "there", 2, redis.ConnectionError("password=hidden")))
    assert len(caplog.messages) == 3
    assert "hidden" not in caplog.text
    assert "hidden" not in str([getattr(record, "pybreaker_redis", "") for record in caplog.records])


def test_name_of_a_circuit_is_logged_unmasked_even_if_it_looks_like_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    """An operator finds the circuit of the line.  The error is masked."""
    emit(_log.circuit_refused("password:reset", error="NOAUTH password=hidden", pause_s=1.0, more_losses=0))
    assert "circuit 'password:reset': " in caplog.text
    assert "hidden" not in caplog.text


def test_password_of_a_sentinel_appears_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Releases 6 and 7 of redis-py print all arguments of a Sentinel's pool if it cannot find the master."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    arguments = {"password": SECRET, **ONCE}
    manager = redis.sentinel.Sentinel(
        [("127.0.0.1", free_port())], sentinel_kwargs=arguments, password="another-" + SECRET
    )
    storage = CircuitRedisStorage("closed", manager.master_for("shop"), namespace="hidden")
    assert pybreaker.CircuitBreaker(state_storage=storage).call(up) == "answer"
    assert storage.health().condition == "unreachable"
    registry = BreakerRegistry(manager.master_for("shop"))
    registry.configure("hidden")
    raised = []
    for command in (registry.status, lambda: registry.set_state("hidden", "open")):
        with pytest.raises(StorageUnavailableError) as caught:
            command()
        raised.append(f"{caught.value} {caught.value!r} {caught.value.cause} {caught.value.cause!r}")
    for text in (storage.health().last_error, str(storage.health()), caplog.text, *raised):
        assert SECRET not in text


def test_secrets_of_a_client_and_of_its_sentinels_are_registered() -> None:
    """With `timeout=None`, this package creates no connections, but still registers the secrets."""
    manager = redis.sentinel.Sentinel(
        [("there", 1)], sentinel_kwargs={"password": "of-sentinels"}, password="of-master"
    )
    server_for(manager.master_for("shop"))
    server_for(redis.Redis(password=b"of-bytes"))
    assert mask_text("of-sentinels, of-master, of-bytes") == "***, ***, ***"


def test_values_of_a_credential_provider_are_registered() -> None:
    """Each connection requests the credentials."""

    class Provider:
        region = "eu"

        def get_credentials(self) -> tuple[str, ...]:
            return "shop", SECRET

    now = Credentials({"credential_provider": Provider()}).read_credentials()
    assert now["credential_provider"].get_credentials() == ("shop", SECRET)
    assert now["credential_provider"].region == "eu"
    assert mask_text(f"shop {SECRET}") == "shop ***"
