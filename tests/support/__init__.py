"""Shared support of the tests: servers, clients, faults, fleets, clocks, and access to private objects."""
