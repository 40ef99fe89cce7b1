"""The commands, one module each: `add_arguments` adds its options, `run` runs it and returns the exit code.

Only the module of the requested command is imported, and torch only when it runs, because torch takes seconds.
"""

from typing import Any, Literal

from sret.ranges import ClosedUnitInterval, PositiveInt

ImageSize = int | tuple[int, int] | None  # pixels, or (height, width)
Passes = PositiveInt | tuple[PositiveInt, ...] | None
Exit = ClosedUnitInterval | Literal["auto"] | None

WEIGHTS = "a weights file, a published name such as sret_t.dist_in1k, or hf-hub:owner/name"
CHECKPOINT = "a weights file, a published name such as sret_t.dist_in1k, hf-hub:owner/name, or an exported file"
IMAGES = "image files, folders, or patterns such as 'photos/**/*.jpg'"
NUM_WORKERS = "processes that load images"
MAX_CORRUPT = "number of unreadable images that may be skipped"
PASSES_SHOWN = "N|[N,...]"
PASSES = (
    "run the first passes of every recursion: a number, or one for each stage, such as [2,2,1]; by default all. A "
    "larger number than the model has repeats the blocks more often, with smaller steps"
)
EXIT_SHOWN = "auto|X"
EXIT = "early exit: auto for the threshold that calibrate-exit stored, or a number X from 0 to 1; by default none"
IMG_SIZE = "pixels, or [height,width]; by default the model's"


def both_sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of an `ImageSize`; None if it is None."""
    return (size, size) if isinstance(size, int) else size
