"""Handles SIGINT and SIGTERM: a loop stops after the current step and saves; other commands remove temporary files."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Within this context SIGINT and SIGTERM only set a flag; a second Ctrl-C interrupts at once.

    Has no effect outside the main thread, where Python allows no signal handlers.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def is_made(self) -> bool:
        """Whether this process received a signal."""
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._handle) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def as_numbers(self) -> list[float]:
        """(interrupted, terminated) as 0 or 1, to be summed over the processes."""
        return [float(self.signal == signal.SIGINT), float(self.signal == signal.SIGTERM)]

    @staticmethod
    def from_numbers(interrupts: float, terminations: float) -> signal.Signals | None:
        """The signal for all processes, if one of them got one."""
        return signal.SIGTERM if terminations else signal.SIGINT if interrupts else None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within this context SIGTERM raises SystemExit(143), so that temporary files are removed, as after Ctrl-C.

    A process that was forked meanwhile ends at once: what is temporary belongs to its parent. Has no effect outside the
    main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_signal(number: signal.Signals) -> None:
    """Raises what the signal would have raised: KeyboardInterrupt, or SystemExit(143) for SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def leave_process_group(_: int) -> None:
    """For processes that load images: Ctrl-C and `kill -- -GROUP` must reach only the process that trains."""
    os.setpgid(0, 0)
