"""The commands, one module each: `add_arguments` adds its options, `run` runs it and returns the exit code.

Only the module of the requested command is imported, and torch only when it runs, because torch takes seconds.
"""

from typing import Any

ImageSize = int | tuple[int, int] | None  # pixels, or (height, width)

CHECKPOINT = "a weights file, a published name such as sret_t.dist_in1k, or a file of sret export"


def both_sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of an `ImageSize`; None if it is None."""
    return (size, size) if isinstance(size, int) else size
