"""What has to be made anew in a forked child?

Knows: live objects, forks.  Does not know: what they are.

A lock that another thread holds while the process forks is held for ever in the child, and so is a belief that nobody
there keeps fresh.  uWSGI forks without telling Python: there, whoever starts threads compares the process id as well.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """Something that a child cannot use as it inherits it."""

    def after_fork(self) -> None:
        """Begin anew, without waiting for anybody or anything: only the forking thread is left."""


_alive: weakref.WeakSet[Inherited] = weakref.WeakSet()


def renew_in_children(item: Inherited) -> None:
    """Have `item.after_fork()` called in every forked child, as long as the item lives."""
    _alive.add(item)


def _renew() -> None:
    for item in list(_alive):
        item.after_fork()


os.register_at_fork(after_in_child=_renew)
