"""Lines of logs that tests look for.

A test that counts lines names its subjects, because threads of earlier tests may still log.  A subject is a server, a
site, a proxy, a cluster, or a text that the line contains, as the name of a circuit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.cluster import Nodes
from tests.support.faults import Site
from tests.support.proxy import Proxy

#: Parts of lines that a healthy host never prints.
ALARMS = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "Segmentation fault")

#: Password that stands in no line.
SECRET = "hunter2-hunter2"

#: Subject of log lines.
Subject = str | PrivateServer | Site | Proxy | Nodes


def texts_of(subject: Subject) -> Iterator[str]:
    """Yield the texts by which log lines name a subject."""
    if isinstance(subject, str):
        yield subject
    elif isinstance(subject, Proxy):
        yield f":{subject.port}/"
    elif isinstance(subject, Site):
        yield from texts_of(subject.proxy)
        yield from texts_of(subject.server)
    elif isinstance(subject, Nodes):
        for node in subject.all:
            yield from texts_of(node)
    else:
        yield subject.unix_socket
        if subject.port:
            yield f":{subject.port}/"


def records_of(
    caplog: pytest.LogCaptureFixture, *subjects: Subject, level: int = logging.NOTSET
) -> list[logging.LogRecord]:
    """Return the records of this package about any of some subjects, from a level on."""
    texts = [text for subject in subjects for text in texts_of(subject)]
    return [
        record
        for record in caplog.records
        if record.name.startswith("pybreaker_redis")
        and record.levelno >= level
        and any(text in record.getMessage() for text in texts)
    ]


def messages_of(caplog: pytest.LogCaptureFixture, *subjects: Subject, level: int = logging.NOTSET) -> list[str]:
    """Return the lines of this package about any of some subjects, from a level on."""
    return [record.getMessage() for record in records_of(caplog, *subjects, level=level)]


def whole_log(caplog: pytest.LogCaptureFixture) -> str:
    """Return the whole log, for tests that a text is absent."""
    return caplog.text


def lines_of(caplog: pytest.LogCaptureFixture, *subjects: Subject) -> list[str]:
    """Return the log lines about outages of some servers, and of single circuits.

    Two kinds of lines are left out: those about features that libraries without RESP3 lack, and those about circuits
    that a server has lost.  A call can notice such a loss before the server's return is logged, or after that.

    Args:
        caplog: Log of the test.
        subjects: Servers of the test.  Lines about other servers are left out, because a storage of an earlier test may
            notice only now that its server has gone.
    """
    texts = [text for subject in subjects for text in texts_of(subject)]
    lines = []
    for record in caplog.records:
        extra, line = getattr(record, "pybreaker_redis", {}), record.getMessage()
        is_of_subject = "server" not in extra or any(text in extra["server"] for text in texts)
        if "Redis" in line and "has lost the circuit" not in line and extra.get("event") != "lack" and is_of_subject:
            lines.append(line)
    return lines
