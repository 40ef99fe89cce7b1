"""Locks a folder while a command writes to it: a second run in the same folder is refused.

If the file system has no locks, a second run is detected by the digest of the state (`run_dir.save_run`).
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from accelerate import PartialState
from filelock import FileLock, Timeout

from sret.errors import InputError
from sret.files import TEMPORARY
from sret.training.distributed import raise_together

LOCK = ".lock"
# Seconds. The loading processes of a killed run hold its lock until they notice, which they check every 5 s.
ORPHANS_END = 10


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
    lock = FileLock(path)
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            _acquire(lock, out)
        except OSError as error:
            raise InputError(
                f"{out}: cannot be written to ({error.strerror or error}); choose another --out"
            ) from error
        try:
            yield
        finally:
            if lock.is_locked:
                path.unlink(missing_ok=True)  # before its release: afterwards it may be another run's
                lock.release()
    finally:
        with suppress(OSError):  # not empty
            for folder in new:
                folder.rmdir()


def _acquire(lock: FileLock, out: Path) -> None:
    path = out / LOCK
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if _is_running(path):
                raise
            lock.acquire(timeout=ORPHANS_END)
    except Timeout:
        raise InputError(f"{out} is in use by {_holder(path)}; wait for it, or choose another --out") from None
    except NotImplementedError:  # a file system without locks
        return
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    for leftover in out.glob(f".*{TEMPORARY}"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)


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
