"""Starts processes for tests: each has a time limit, and is killed with everything it started.

An environment variable marks what a test run starts. Sessions and process groups would not do: torchrun gives its
processes a session of their own, and the processes that load images leave their group.
"""

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

MARK = "SRET_TESTS"
os.environ.setdefault(MARK, uuid4().hex)  # pytest-xdist's processes inherit it


@contextmanager
def started(
    command: Sequence[str | Path], *, seconds: float = 240, env: dict[str, str] | None = None, **options: object
) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed with everything it started at the end of this context.

    After `seconds` it is killed earlier, and the test fails.
    """
    mark = f"{os.environ[MARK]}/{uuid4().hex}"
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        kill_marked(mark)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    environment = {**(os.environ if env is None else env), MARK: mark}
    with subprocess.Popen(command, env=environment, start_new_session=True, text=True, **options) as process:
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            kill_marked(mark)
            if is_late.is_set():
                pytest.fail(f"did not end within {seconds} seconds: {command}")


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with `capture_output`, but with the time limit of `started`."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def kill_marked(mark: str) -> None:
    """Kills every other process whose mark begins with `mark`, and those that they start meanwhile."""
    while found := [process for process in psutil.process_iter() if has_mark(process, mark)]:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def has_mark(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error, OSError):
        is_other = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
        return is_other and process.environ().get(MARK, "").startswith(mark)
    return False
