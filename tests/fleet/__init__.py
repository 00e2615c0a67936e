"""Tests with fleets of processes."""
