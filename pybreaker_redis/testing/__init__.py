"""Tools for tests of guarded code; nothing here needs Redis."""
