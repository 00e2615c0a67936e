"""Tests of the project itself: architecture, README, distribution."""
