"""Tests of the package, without the optional parts of client libraries.

redis-py and valkey-py read faster with hiredis and libvalkey, and fakeredis runs scripts with lupa.  The tests run
without these.  Some of tests/servers/test_clients.py run with them, too, in a process with `VARIABLE`.
"""

import os
import sys
from typing import Any

#: Environment variable that leaves the optional parts visible if it is ``1``.
VARIABLE = "PYBREAKER_REDIS_TEST_EXTENSIONS"

EXTENSIONS = ("hiredis", "libvalkey", "lupa")

if os.environ.get(VARIABLE) != "1":
    modules: dict[str, Any] = sys.modules
    for name in EXTENSIONS:
        # An import fails, as if the module were not installed.
        modules.setdefault(name, None)

# Only where another breaker is chosen: the tests of the wheel run without the package and its dependencies.
if os.environ.get("PYBREAKER_REDIS_WAY"):
    from tests.support.ways import use_chosen_breaker

    use_chosen_breaker()
