"""Which of the optional parts of client libraries do the tests see?

Knows: names of modules.  Does not know: what is tested.

redis-py and valkey-py read faster with hiredis and libvalkey, and fakeredis runs scripts with lupa.  Tests are run
without; some of tests/servers/test_clients.py are run with them, too, in a process that `VARIABLE` is set for.
"""

import os
import sys
from typing import Any

#: Leaves the optional parts visible if it is ``1``.
VARIABLE = "PYBREAKER_REDIS_TEST_EXTENSIONS"

EXTENSIONS = ("hiredis", "libvalkey", "lupa")

if os.environ.get(VARIABLE) != "1":
    modules: dict[str, Any] = sys.modules
    for name in EXTENSIONS:
        # To import it fails, as if it were not installed.
        modules.setdefault(name, None)
