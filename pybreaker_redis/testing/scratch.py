"""Where does a private server keep its files, and who removes them if nobody is left to do it?

Knows: directories, file locks.  Does not know: servers, processes.

A directory is in use for as long as somebody holds the lock on a file in it.  The kernel lets go of the lock when the
last process that has the file open is gone, however it ended; so the next one who makes a directory can tell which of
the old ones are in use, without knowing who made them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

#: What the names of all these directories begin with.
DIRECTORY_PREFIX = "pybreaker-"

#: The file that is locked.
LOCK_FILE = "in-use"


class Scratch:
    """A temporary directory of one's own; making one removes those that killed processes have left."""

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*/{LOCK_FILE}"):
            _remove_unless_in_use(left)
        self.path = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
        # Locked before it has its name: nobody finds it without the lock on it.
        nameless = self.path / f"{LOCK_FILE}.new"
        #: To be inherited by processes that use the directory.
        self.lock = nameless.open("wb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        nameless.rename(self.path / LOCK_FILE)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()


def _remove_unless_in_use(file: Path) -> None:
    # Neither what another user has put there nor what somebody else removes meanwhile is any business of ours.
    with contextlib.suppress(OSError):
        if file.parent.lstat().st_uid != os.getuid():
            return
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)
        finally:
            os.close(lock)
