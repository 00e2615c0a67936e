"""Circuits of this process: shared, local, reconciled, operated in bulk."""
