"""Subscribers that log and count what circuits do."""
