"""Listeners and collectors that log and count what circuits do."""
