"""Basics of all packages: clock, threads, forks, signals, log output, validation."""
