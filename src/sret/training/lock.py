"""Locks a folder while a command writes to it: a second run in the same folder is refused.

If the file system has no locks, a second run is detected by the digest of the state (`run_dir.save_run`).
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from accelerate import PartialState

from sret.errors import InputError
from sret.files import TEMPORARY
from sret.training.distributed import raise_together

LOCK = ".lock"
# Seconds. The loading processes of a killed run hold its lock until they notice, which they check every 5 s.
ORPHANS_END = 10
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within this context no other process can lock `out`. Every process of a run enters it; the first one locks.

    The folder is made if it is missing, and removed again if nothing was written to it.

    Raises `InputError` in every process if another run holds the lock, or the folder cannot be written to.
    """
    error = None
    with ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                stack.enter_context(_locked(out))
            except InputError as caught:
                error = str(caught)
        raise_together(error)
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    path = out / LOCK
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = _acquire(path)
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise InputError(
                f"{out}: cannot be written to ({error.strerror or error}); choose another --out"
            ) from error
        try:
            for leftover in out.glob(f".*{TEMPORARY}"):  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
            yield
        finally:
            path.unlink(missing_ok=True)  # before its release: afterwards it may be another run's
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: loading processes inherit the file
            os.close(file)
    finally:
        with suppress(OSError):  # not empty
            for folder in new:
                folder.rmdir()


def _acquire(path: Path) -> int:
    """Locks a file and returns its descriptor. Raises `InputError` if another run holds the lock."""
    until = None
    while (file := _try_to_lock(path)) is None:
        until = until or time.monotonic() + (0 if _is_running(path) else ORPHANS_END)
        if time.monotonic() >= until:
            raise InputError(f"{path.parent} is in use by {_holder(path)}; wait for it, or choose another --out")
        time.sleep(0.1)
    return file


def _try_to_lock(path: Path) -> int | None:
    """The descriptor of the file, locked if its file system has locks; None if another process holds the lock."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
    except OSError as error:
        if error.errno in NO_LOCKS:
            return file
        os.close(file)
        if error.errno in HELD:
            return None
        raise
    os.close(file)  # its holder has removed it meanwhile
    return _try_to_lock(path)


def _holder(path: Path) -> str:
    """The process that the lock file names."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text() or "another process"
    return "another process"


def _is_running(path: Path) -> bool:
    """Whether the process that the lock file names may still run; on other machines that is unknown."""
    words = _holder(path).split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return True
    try:
        return psutil.Process(int(words[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
