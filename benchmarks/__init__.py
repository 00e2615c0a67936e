"""What circuits cost, side by side: ``python -m pytest benchmarks`` measures and prints the tables of the README.

Each figure compares what was measured in one run on one machine; ``--quick`` takes seconds where the full run takes
minutes.  ``python -m benchmarks.plot OUT.png`` draws what a caller sees through an outage.
"""
