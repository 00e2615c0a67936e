"""The demo: real worker processes, a dependency that dies, one shared circuit.

====================  ========================================================
``play``              sets the stage, runs the acts, gives the exit code
``scenario``          the acts, and what each of them promises
``stage``             the processes, and everything they have reported
``worker``            a process that guards its calls with a circuit breaker
``dependency``        a process that serves those calls, or fails them
``events``            what these processes report, and how
``show``, ``live``    the terminal: plain lines, or a live table
``server``            a private Redis or Valkey server
``binaries``          which ones there are
``scratch``           where it keeps its files
====================  ========================================================
"""
