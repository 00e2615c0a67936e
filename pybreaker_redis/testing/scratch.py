"""Temporary directories of private servers, removed even after their owner was killed.

A directory is in use for as long as a process holds the lock on a file in it.  The kernel releases the lock when the
last process with the open file ends, also after SIGKILL.  The next process that creates a directory removes each
directory with a free lock, independent of the process that created it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ("Scratch",)

#: Prefix of the directories' names.
DIRECTORY_PREFIX = "pybreaker-"

#: Name of the locked file in a directory.
LOCK_FILE = "in-use"


class Scratch:
    """Temporary directory of one process.  The constructor also removes directories of killed processes.

    Attributes:
        path: Path of the directory.
        lock: Open file with the lock, for processes that use the directory and inherit the file.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*/{LOCK_FILE}"):
            _remove_unless_in_use(left)
        self.path = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
        # Locked under another name first, so that no process finds an unlocked LOCK_FILE.
        unnamed = self.path / f"{LOCK_FILE}.new"
        self.lock = unnamed.open("wb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / LOCK_FILE)

    def remove(self) -> None:
        """Remove the directory with its content."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()


def _remove_unless_in_use(file: Path) -> None:
    # Another process may remove the directory meanwhile.  Directories of other users are left alone.
    with contextlib.suppress(OSError):
        if file.parent.lstat().st_uid != os.getuid():
            return
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)
        finally:
            os.close(lock)
