"""No password is printed, kept or raised, whatever a client library's errors say."""

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
from pybreaker_redis._redis.pool import Credentials
from pybreaker_redis._runtime import redaction
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import SECRET_MASK, SECRETS_MAX, mask_error, mask_text, register_secret
from pybreaker_redis._servers.availability import Availability
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.servers import free_port
from tests.support.breakers import up
from tests.support.servers import ONCE

SECRET = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from other tests."""
    monkeypatch.setattr(redaction, "_patterns_of_secrets", {})
    return


@pytest.mark.parametrize(
    ("said", "printed"),
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
def test_text_is_printed_without_what_looks_like_a_secret(said: str, printed: str) -> None:
    """Servers and libraries print what they were given; all else stays as it is."""
    assert mask_text(said) == printed


@pytest.mark.parametrize(
    ("secret", "said", "printed"),
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
def test_secret_that_was_used_is_masked_wherever_it_stands(secret: Any, said: str, printed: str) -> None:
    """As it is, quoted for a URL, or as Python prints it; a short one only where it is a word."""
    register_secret(secret)
    register_secret(secret)
    assert mask_text(said) == printed


def test_secrets_that_are_replaced_often_are_forgotten() -> None:
    """Tokens of a quarter of an hour are no memory leak."""
    for number in range(SECRETS_MAX + 50):
        register_secret(f"token-number-{number}")
    assert len(redaction._patterns_of_secrets) == SECRETS_MAX
    assert mask_text("token-number-149 token-number-0") == "*** token-number-0"


def test_error_of_a_client_library_is_masked_and_no_other() -> None:
    """An application's own error may be the one that a caller waits for."""
    ours, theirs = redis.ConnectionError("password=hidden", 7), ValueError("password=hidden")
    for error in (ours, theirs):
        mask_error(error)
    assert ours.args == ("password=***", 7)
    assert theirs.args == ("password=hidden",)
    plain = redis.ConnectionError("Error 111")
    mask_error(plain)
    assert plain.args == ("Error 111",)


def test_guard_keeps_no_secret() -> None:
    """What it keeps is logged, and shown by health endpoints."""
    guard = Availability(1.0, has_retry_thread=True)
    outage = guard.note_failure(redis.ConnectionError("no master in ConnectionPool(password=hidden,db=0)"))
    assert outage is not None
    assert "hidden" not in guard.last_error + outage.error


def test_lines_have_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """What is missing, why nothing is heard, and what only those read who look for a cause."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    emit(_log.feature_missing("there", feature=MissingFeature.TRACKING.value, error="no RESP3: password=hidden"))
    emit(_log.push_refused("there", error="password=hidden"))
    emit(_log.detail("%s: attempt %d failed (%s)", "there", 2, redis.ConnectionError("password=hidden")))
    assert len(caplog.messages) == 3
    assert "hidden" not in caplog.text
    assert "hidden" not in str([getattr(record, "pybreaker_redis", "") for record in caplog.records])


def test_password_of_a_sentinel_appears_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """redis-py 6 and 7 print all words of a Sentinel's pool if it does not know the master."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    words = {"password": SECRET, **ONCE}
    manager = redis.sentinel.Sentinel([("127.0.0.1", free_port())], sentinel_kwargs=words, password="another-" + SECRET)
    storage = CircuitRedisStorage("closed", manager.master_for("shop"), namespace="hidden")
    assert pybreaker.CircuitBreaker(state_storage=storage).call(up) == "answer"
    assert storage.health().condition == "unreachable"
    registry = BreakerRegistry(manager.master_for("shop"))
    registry.configure("hidden")
    raised = []
    for command in (registry.status, lambda: registry.set_state("hidden", "open")):
        with pytest.raises(redis.RedisError) as caught:
            command()
        raised.append(f"{caught.value} {caught.value!r}")
    for text in (storage.health().last_error, str(storage.health()), caplog.text, *raised):
        assert SECRET not in text


def test_words_of_a_client_and_of_its_sentinels_are_remembered() -> None:
    """With `timeout=None` no connections of this package's own are made."""
    manager = redis.sentinel.Sentinel(
        [("there", 1)], sentinel_kwargs={"password": "of-sentinels"}, password="of-master"
    )
    server_for(manager.master_for("shop"))
    server_for(redis.Redis(password=b"of-bytes"))
    assert mask_text("of-sentinels, of-master, of-bytes") == "***, ***, ***"


def test_last_values_of_a_credential_provider_are_remembered() -> None:
    """Each connection asks for them."""

    class Provider:
        region = "eu"

        def get_credentials(self) -> tuple[str, ...]:
            return "shop", SECRET

    now = Credentials({"credential_provider": Provider()}).read_credentials()
    assert now["credential_provider"].get_credentials() == ("shop", SECRET)
    assert now["credential_provider"].region == "eu"
    assert mask_text(f"shop {SECRET}") == "shop ***"
