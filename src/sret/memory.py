"""Refuses what does not fit in the machine's memory, before the system would stop the process without a message."""

import os

from sret.errors import InputError
from sret.files import format_bytes


def total_memory() -> int:
    """Bytes of memory of this machine; more than any machine has where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1 << 62


def check_memory(what: str, needed: int, advice: str) -> None:
    """Raises `InputError` if something needs more bytes than the machine has."""
    if needed > (total := total_memory()):
        text = f"{what} would need {format_bytes(needed)}, but this machine has {format_bytes(total)} of memory"
        raise InputError(f"{text}; {advice}")
