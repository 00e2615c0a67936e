"""What is said if something is missing that an extra brings?

Knows: names of modules, libraries and extras.  Does not know: what they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def require_extra(library: str, *, extra: str = "") -> Iterator[None]:
    """Import a library, or tell how to install it.

    Args:
        library: Its module.
        extra: Of this package; if not given, it is called like the library.

    Raises:
        ImportError: The library is missing.  What goes wrong inside of it is raised as it is.
    """
    try:
        yield
    except ImportError as error:
        if error.name != library:
            raise
        msg = f"{library} is missing: pip install 'pybreaker_redis[{extra or library}]'"
        raise ImportError(msg, name=library) from error
