"""Benchmarks of guarded calls, compared with other packages.

``python -m pytest benchmarks`` measures and prints the tables of ``docs/numbers.rst``.  Each figure is a ratio from
one run on one machine.  ``--quick`` takes seconds instead of minutes.  ``python -m benchmarks.plot OUT.png`` draws
the waits of callers through an outage.
"""
