"""The settings of training augmentation. It imports neither torch nor timm, which take seconds."""

from dataclasses import dataclass
from typing import Literal

from sret.errors import InputError
from sret.ranges import ClosedUnitInterval, NonNegativeFloat, PositiveInt, Share, check_ranges

Geometry = Literal["crop", "pad", "affine", "none"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What chance does to one training image.

    Attributes:
        geometry: "crop", a random resized crop (photos); "pad", a random crop after padding by 1/8 (images as small
            as CIFAR's); "affine", up to 12 degrees, 8 % shift, 0.9 to 1.1 scale (images that fill the frame, such as
            digits); "none", as in evaluation.
        min_scale: smallest share of the image's area that "crop" keeps.
        flip: mirror every second image, by chance.
        auto_augment: a policy in timm's words, such as "rand-m9-mstd0.5-inc1"; colour images only.
        color_jitter: strength of changes in brightness, contrast and saturation; a policy replaces it.
        random_erasing: probability that a rectangle is replaced by noise.
        repeats: copies of an image in one batch, each augmented for itself.
    """

    geometry: Geometry = "crop"
    min_scale: Share = 0.08
    flip: bool = True
    auto_augment: str | None = None
    color_jitter: NonNegativeFloat = 0.0
    random_erasing: ClosedUnitInterval = 0.0
    repeats: PositiveInt = 1

    def __post_init__(self) -> None:
        check_ranges(self, "augmentation.")
        if self.auto_augment is not None:
            from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

            try:
                make = rand_augment_transform if self.auto_augment.startswith("rand") else auto_augment_transform
                make(self.auto_augment, {})
            except (AssertionError, KeyError, ValueError) as error:
                raise InputError(
                    f"augmentation.auto_augment is {self.auto_augment!r}; it must be a policy that timm knows, "
                    "such as 'rand-m9-mstd0.5-inc1'"
                ) from error
