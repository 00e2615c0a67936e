"""Tests of frameworks, instruments and the command line."""
