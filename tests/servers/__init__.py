"""Tests against one real server."""
