"""State that a forked child must not inherit.

A lock that another thread holds during the fork stays held in the child, because that thread does not exist there.  A
thread that keeps data fresh does not exist there either.  So each class with a lock or with such data derives from
`ForkSafe`.

uWSGI forks without Python's hooks.  Code that depends on the process therefore calls `renew` first, which does nothing
where there was no fork.  So does the first call of each process that leaves the fast path (`CallContexts.current`).

Two things carry the id of their process instead.  Locks and thread-local storage that gevent replaces only after the
fork are made at first use in each process.  A claim on a state object names the process that claimed, because state
objects belong to `pybreaker`.
"""

from __future__ import annotations

import os
import threading
import weakref

#: Process for which the objects were made or renewed.  Only `renew` changes the value.
process_id = os.getpid()


class ForkSafe:
    """Base of objects that are renewed in a forked child.

    A subclass calls this constructor last, or as soon as the subclass needs the lock.  A fork by another thread must
    not renew an object that is only half made.
    """

    _lock: threading.RLock

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _instances[id(self)] = self

    def _reset_in_child(self) -> None:
        """Drop the state of the parent process, without waiting.  The lock is new already."""

    def _renew_in_child(self) -> None:
        self._lock = threading.RLock()
        self._reset_in_child()


#: All living objects.  A weak dictionary, and no weak set: `valuerefs` copies the references in one step.
_instances: weakref.WeakValueDictionary[int, ForkSafe] = weakref.WeakValueDictionary()

#: Lock of `renew` in each process.  Several threads may notice the same fork at the same time.
_renewal_locks: dict[int, threading.RLock] = {}


def renew() -> None:
    """Renew all living objects, once in each process, after a fork."""
    global process_id  # noqa: PLW0603
    pid = os.getpid()
    if process_id == pid:
        return
    with _renewal_locks.setdefault(pid, threading.RLock()):
        if process_id == pid:
            return
        living = [instance for reference in _instances.valuerefs() if (instance := reference()) is not None]
        for instance in living:
            instance._renew_in_child()  # noqa: SLF001
        process_id = pid


os.register_at_fork(after_in_child=renew)
