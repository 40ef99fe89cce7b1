"""The settings of distillation. It imports no torch, which takes seconds."""

from dataclasses import dataclass
from pathlib import Path

from sret.ranges import PositiveFloat, check_ranges


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher whose answers are the targets, in place of the labels.

    Attributes:
        teacher: a weights file of `sret`, or the name of a pretrained model of timm.
        teacher_weights: a file to take instead of timm's pretrained weights.
        temperature: both answers' logits are divided by it.
    """

    teacher: str
    teacher_weights: Path | None = None
    temperature: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, "distillation.")
