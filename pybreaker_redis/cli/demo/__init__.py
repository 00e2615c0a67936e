"""Demo with real worker processes, a dependency that dies, and one shared circuit.

====================  ========================================================
``play``              the whole run: server, stage, acts, summary, exit code
``scenario``          the acts, and the promise that each of them checks
``stage``             the processes and all events that they reported
``worker``            a process that guards its calls with a circuit breaker
``dependency``        a process that serves these calls, or fails them
``events``            the events that the processes report, as lines of JSON
``interruption``      Ctrl-C and SIGTERM
``show``, ``live``    the terminal output: plain lines, or a live table
====================  ========================================================

The private server comes from `pybreaker_redis.testing.servers`.
"""
