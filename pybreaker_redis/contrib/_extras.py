"""What is said if the framework of an integration is not there?

Knows: the names of extras.  Does not know: what they bring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import a framework, or tell how to install it.

    Args:
        extra: Of this package; the framework's module is called like it.

    Raises:
        ImportError: The framework is missing.  What goes wrong inside of it is raised as it is.
    """
    try:
        yield
    except ImportError as error:
        if error.name != extra:
            raise
        msg = f"pybreaker_redis.contrib.{extra} needs {extra}, which is missing: pip install 'pybreaker_redis[{extra}]'"
        raise ImportError(msg, name=extra) from error
