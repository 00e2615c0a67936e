"""Lines of logs that tests look for."""

from __future__ import annotations

import pytest

from tests.support.faults import Site

#: Parts of lines that a healthy host never prints.
ALARMS = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "Segmentation fault")


def lines_of(caplog: pytest.LogCaptureFixture, site: Site | None = None) -> list[str]:
    """Return the log lines about outages.

    Two kinds of lines are left out: those about features that libraries without RESP3 lack, and those about circuits
    that a server has lost.  A call can notice such a loss before the server's return is logged, or after that.

    Args:
        caplog: Log of the test.
        site: Server of the test.  Lines about other servers are left out, because a storage of an earlier test may
            notice only now that its server has gone.
    """
    lines = []
    for record in caplog.records:
        extra, line = getattr(record, "pybreaker_redis", {}), record.getMessage()
        is_of_site = site is None or "server" not in extra or f":{site.proxy.port}/" in extra["server"]
        if "Redis" in line and "has lost it" not in line and extra.get("event") != "lack" and is_of_site:
            lines.append(line)
    return lines
