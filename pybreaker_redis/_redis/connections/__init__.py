"""Connections of this package: pools, deadlines, and spare connections for calls that fail."""
