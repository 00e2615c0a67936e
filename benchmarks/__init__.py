"""Benchmarks of guarded calls, compared with other packages.

``python -m pytest benchmarks`` measures and prints the tables of ``docs/numbers.rst``.  Each figure is a ratio from
one run on one machine.  ``--quick`` takes seconds instead of minutes, and checks no bound.  Scripts of their own are
``python -m benchmarks.chart``, ``python -m benchmarks.outage``, ``python -m benchmarks.plot OUT.png`` and
``python -m benchmarks.scenarios``.
"""

import os

# Without this variable the helpers of the tests hide hiredis.  Processes that a benchmark starts inherit the variable.
os.environ.setdefault("PYBREAKER_REDIS_TEST_EXTENSIONS", "1")
