"""URLs: the clients that they describe, and the URLs that are refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.endpoint import command_wait_limit
from pybreaker_redis._redis.url import URL_SCHEMES, URL_TIMEOUT_S, client_source_from_url, mask_url
from tests.support.inspect import clients_by_url
from tests.support.selection import examples
from tests.support.urls import options_of


@pytest.mark.parametrize("url", ["redis://there", "rediss://there", "unix:///there", "redis+sentinel://there/shop"])
def test_client_waits_for_a_second_and_tries_once(url: str) -> None:
    """Even `timeout=None`, which uses this client unchanged, does not block a call for long."""
    assert command_wait_limit(client_source_from_url(url)()) == URL_TIMEOUT_S == 1
    if not url.startswith("unix"):
        assert options_of(url)["socket_connect_timeout"] == URL_TIMEOUT_S


def test_query_overrides_the_rest_of_the_url() -> None:
    """The query may contain any option of redis-py."""
    options = options_of(
        "redis://user:pass@there:1/2?socket_timeout=0.3&socket_connect_timeout=2&db=5&health_check_interval=9"
        "&decode_responses=no&encoding=latin-1&socket_keepalive=true&client_name=me"
    )
    expected = {
        "host": "there",
        "port": 1,
        "db": 5,
        "username": "user",
        "password": "pass",
        "socket_timeout": 0.3,
        "socket_connect_timeout": 2.0,
        "health_check_interval": 9,
        "decode_responses": False,
        "encoding": "latin-1",
        "socket_keepalive": True,
        "client_name": "me",
    }
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "host", "port", "db"),
    [
        ("redis://", "localhost", 6379, 0),
        ("redis://there", "there", 6379, 0),
        ("REDIS://there/", "there", 6379, 0),
        ("redis://:7/3", "localhost", 7, 3),
        ("redis://[::1]:7", "::1", 7, 0),
        ("valkeys://there:7", "there", 7, 0),
    ],
)
def test_missing_part_has_its_default(url: str, host: str, port: int, db: int) -> None:
    """Host, port and database have the usual defaults."""
    options = options_of(url)
    assert (options["host"], options["port"], options["db"]) == (host, port, db)


def test_circuits_of_one_url_share_a_client_as_long_as_one_of_them_lives() -> None:
    """Otherwise, each circuit would follow its own Sentinels and nodes."""
    url = "redis+sentinel://nobody/shared"
    first = client_source_from_url(url)()
    assert client_source_from_url(url)() is first
    assert client_source_from_url(f"{url}/1")() is not first
    del first
    gc.collect()
    assert url not in clients_by_url()


def test_storage_of_a_url_takes_all_other_arguments() -> None:
    """All arguments of the class are accepted by keyword."""
    storage = CircuitRedisStorage.from_url("redis://nobody", "open", "shop", max_staleness=3, cluster_mode=True, ttl=60)
    assert storage.health().circuit == "shop"
    assert storage.health().state == "open"
    with pytest.raises(ValueError, match="max_staleness must"):
        CircuitRedisStorage.from_url("redis://nobody", max_staleness=-1)
    with pytest.raises(TypeError, match="ajar"):
        CircuitRedisStorage.from_url("redis://nobody", ajar=True)


def test_subclass_creates_its_own_instances() -> None:
    """The class method of a subclass creates an instance of the subclass."""

    class Own(CircuitRedisStorage):
        pass

    assert type(Own.from_url("redis://nobody")) is Own


MISTAKES = {
    "http://there": "must begin with one of unix://, redis://.*valkeys\\+cluster://, not 'http://there'",
    "there:6379": "must begin with one of",
    "": "must begin with one of",
    "redis:there": "must begin with one of",
    "redis+sentinels://there/shop": "must begin with one of",
    "redis://there:port": "must name hosts as host:port",
    "redis://there:0": "ports from 1 to 65535",
    "redis://there:65536": "ports from 1 to 65535",
    "redis://::1": "must name hosts as host:port or \\[address\\]:port",
    "redis://one,two": "must name one host",
    "redis://there/shop": "number of a database",
    "redis://there/0/1": "number of a database",
    "redis://there/-1": "number of a database",
    "redis://there#0": "must have every # and, behind a question mark, every @ quoted, as %23 and %40",
    "redis://there?client_name=me@home": "must have every #",
    "unix://": "path of a socket",
    "unix://there/socket": "path of a socket",
    "redis+sentinel://there": "must name the service",
    "redis+sentinel://there/": "must name the service",
    "redis+sentinel:///shop": "must name at least one host",
    "redis+sentinel://one,,two/shop": "must name at least one host",
    "redis+sentinel://one/shop/nine": "number of a database",
    "redis+cluster://": "must name at least one host",
    "redis+cluster://one/1": "must not name a database",
    "redis+cluster://one?db=1": "must not name a database",
    "redis://there?socket_timeout=long": "usable value of socket_timeout, not 'long'",
    "redis://there?socket_timeout=0": "usable value of socket_timeout, not '0'",
    "redis://there?socket_timeout=nan": "usable value of socket_timeout, not 'nan'",
    "redis://there?socket_connect_timeout=inf": "usable value of socket_connect_timeout",
    "redis://there?db=-1": "usable value of db",
    "redis://there?db=": "usable value of db",
    "redis://there?decode_responses=perhaps": "usable value of decode_responses",
    "redis://there?nonsense=1": "must have a query that this version of redis-py takes .*nonsense",
    "redis://there?host=elsewhere": "must have its host before the question mark",
    "redis+cluster://there?port=7": "must have its port before the question mark",
    "unix:///there?path=/elsewhere": "must have its path before the question mark",
    "unix:///there?nonsense=1": "must have a query that this version of redis-py takes .*nonsense",
    "redis+sentinel://there/shop?nonsense=1": "must have a query that this version of redis-py takes .*nonsense",
    "rediss://there?ssl_cert_reqs=perhaps": "must have a query that this version of redis-py takes",
}


@pytest.mark.parametrize("url", MISTAKES)
def test_invalid_url_is_refused_at_once(url: str) -> None:
    """The error contains the given URL and what is accepted."""
    with pytest.raises(ValueError, match=f"^url .*(?:{MISTAKES[url]})") as caught:
        CircuitRedisStorage.from_url(url)
    assert repr(mask_url(url)) in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", [None, b"redis://:secret@there", 6379, redis.Redis()])
def test_url_of_another_type_is_refused_at_once(url: Any) -> None:
    """The error does not contain the value."""
    with pytest.raises(TypeError, match=f"url must be a str, not of type {type(url).__name__}") as caught:
        CircuitRedisStorage.from_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@there",
        "redis://:secret@there:port",
        "redis://user:se/cret@there",
        "redis://user:sec#ret@there",
        "redis://user:sec?ret@there",
        "user:secret@there",
        "redis:user:secret@there",
        "redis+sentinel://there?sentinel_password=secret&password=secret",
        "redis://there?password=secret&db=x",
        "rediss://there?ssl_password=secret&db=x",
    ],
)
def test_no_secret_is_printed(url: str) -> None:
    """Errors are logged, so they must not contain a badly quoted secret."""
    with pytest.raises(ValueError, match=r"\*\*\*") as caught:
        CircuitRedisStorage.from_url(url)
    assert not any(part in str(caught.value) for part in ("secret", "cret", "ret@", "se/", "user"))


secrets = st.text(st.characters(codec="utf-8"), min_size=1).map(lambda text: f"s3cr3t{text}s3cr3t")


@settings(deadline=None, max_examples=examples(100))
@given(
    scheme=st.sampled_from(URL_SCHEMES) | st.just("http"),
    secret=secrets,
    rest=st.text(st.sampled_from("ab:/@,?#=&[]0"), max_size=12),
)
def test_any_url_is_accepted_or_refused_without_its_secret(scheme: str, secret: str, rest: str) -> None:
    """No other errors than the promised ones are raised, and no error contains the secret."""
    url = f"{scheme}://user:{secret}@{rest}"
    assert "s3cr3t" not in mask_url(url)
    try:
        client_source_from_url(url)
    except ModuleNotFoundError as error:
        message = str(error)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert "s3cr3t" not in message
