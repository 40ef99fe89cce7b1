"""The commands, a module each: `add_arguments` describes what one takes, `run` does it and returns the exit code.

Only the module of the command that was asked for is imported, and torch only once it runs, because it takes seconds.
"""

from typing import Any

ImageSize = int | tuple[int, int] | None  # as an option takes it


def both_sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of an `ImageSize`."""
    return (size, size) if isinstance(size, int) else size
