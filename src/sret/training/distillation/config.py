"""Settings of distillation. Does not import torch, which takes seconds."""

from dataclasses import dataclass
from pathlib import Path

from sret.ranges import PositiveFloat, check_fields


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher whose predictions replace the labels as targets.

    Attributes:
        teacher: a weights file or published name of sret, or the name of a pretrained timm model.
        teacher_weights: a file to use instead of timm's pretrained weights, for machines without internet access.
        temperature: the logits of student and teacher are divided by it.
    """

    teacher: str
    teacher_weights: Path | None = None
    temperature: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "distillation.")
