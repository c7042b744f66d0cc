"""Temporary directories that outlive nobody: a killed process can't remove its own, so the next one does.

The owner holds a lock on a file in its directory; the kernel lets go of it when the process ends, however it ends. A
directory of this user that bears the file and whose lock is free is an orphan. Works across containers that share a
file system, where process ids say nothing.
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

OWNER = ".owner"


def hold(path: str) -> int:
    """Make a file and lock it until the process ends, or the file descriptor that is returned is closed.

    The file gets its name only once it is locked: nobody may take it for an orphan's in between.
    """
    nameless = path + ".new"
    lock = os.open(nameless, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(nameless, path)
    return lock


class OwnedDirectory:
    """A new private directory, this process's until remove() or the end of the process."""

    def __init__(self, prefix: str, parent: str) -> None:
        self.path = tempfile.mkdtemp(prefix=prefix, dir=parent)  # 0700
        self._lock: int | None = hold(os.path.join(self.path, OWNER))

    def remove(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def sweep(prefix: str, parent: str) -> list[str]:
    """Remove the orphans among the directories `parent/prefix*`; returns their paths. Anything else is left alone."""
    return [str(path) for path in sorted(Path(parent).glob(f"{prefix}*")) if _sweep_one(path)]


def _sweep_one(path: Path) -> bool:
    try:
        if not _is_ours(path.lstat()):
            return False
        lock = os.open(path / OWNER, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # not made by OwnedDirectory, or gone meanwhile
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink == 0:
            return False  # another sweep was faster
        shutil.rmtree(path, ignore_errors=True)
        logger.info("%s of a process that was killed is removed", path)
        return True
    except OSError:
        return False  # its owner lives
    finally:
        os.close(lock)


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody else can have put anything there."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
