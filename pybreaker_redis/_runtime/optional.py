"""Imports of optional libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def require_extra(library: str, *, extra: str = "") -> Iterator[None]:
    """Name the extra that installs a library, if the library that the block imports is missing.

    Args:
        library: Module of the library.
        extra: Extra of this package (empty: the extra has the name of the module).

    Raises:
        ImportError: The library is missing.  An error inside the library is raised unchanged.
    """
    try:
        yield
    except ImportError as error:
        if error.name != library:
            raise
        msg = f"{library} is missing: install it, or the extra {extra or library!r} of pybreaker_redis"
        raise ImportError(msg, name=library) from error
