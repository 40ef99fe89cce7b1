"""Settings of training augmentation. Imports neither torch nor timm, which take seconds."""

from dataclasses import dataclass
from typing import Literal

from sret.data.policy import check_policy
from sret.ranges import ClosedUnitInterval, Share, check_fields

Geometry = Literal["crop", "pad", "affine", "none"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of training images.

    Attributes:
        geometry: "crop", a random resized crop (photos); "pad", a random crop after padding by 1/8 (small images, such
            as CIFAR's); "affine", rotation up to 12 degrees, shift up to 8 %, scale 0.9 to 1.1 (images that fill the
            frame, such as digits); "none", resize and centre crop, as in evaluation.
        min_scale: smallest part of the image's area that "crop" keeps.
        flip: flip an image horizontally with probability 0.5.
        auto_augment: a policy in timm's notation, such as "rand-m9-mstd0.5-inc1"; colour images only.
        random_erasing: probability that a rectangle of the image is replaced by noise.
        on_device: compute flip, RandAugment and erasing on the device in batches, with other random numbers. Images of
            a small data set with the geometry "pad" or "none" live on the device and are cropped there; the processes
            that load other images crop them.
    """

    geometry: Geometry = "crop"
    min_scale: Share = 0.08
    flip: bool = True
    auto_augment: str | None = None
    random_erasing: ClosedUnitInterval = 0.0
    on_device: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "augmentation.")
        if self.auto_augment is not None:
            check_policy(self.auto_augment, "augmentation.auto_augment")
