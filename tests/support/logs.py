"""What tests look for in logs."""

from __future__ import annotations

import pytest

from tests.support.faults import Site

#: What no host prints when all is well.
ALARMS = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "Segmentation fault")


def lines_of(caplog: pytest.LogCaptureFixture, site: Site | None = None) -> list[str]:
    """The log lines about outages.

    Left out are those about what libraries without RESP3 lack, and those about circuits that a server has lost: a call
    can find that out before the server's return is logged, or after it.

    Args:
        caplog: The log of the test.
        site: The server of the test.  Lines about other servers are left out: a storage of an earlier test may notice
            only now that its server has gone.
    """
    lines = []
    for record in caplog.records:
        said, line = getattr(record, "pybreaker_redis", {}), record.getMessage()
        is_of_site = site is None or "server" not in said or f":{site.proxy.port}/" in said["server"]
        if "Redis" in line and "has lost the circuit" not in line and said.get("event") != "lack" and is_of_site:
            lines.append(line)
    return lines
