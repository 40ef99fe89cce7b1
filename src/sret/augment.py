"""Chance in training pictures: geometry, colours, erasing (per picture), mixup and CutMix (per batch), all timm's.

Sources: RandAugment, arXiv:1909.13719; random erasing, arXiv:1708.04896; mixup, arXiv:1710.09412; CutMix,
arXiv:1905.04899; as DeiT (arXiv:2012.12877) and so the SReT authors use them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.data import Mixup, create_transform
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision import transforms

from sret.errors import InputError
from sret.preprocess import Preprocessing
from sret.sampling import seeded

Geometry = Literal["crop", "pad", "affine", "none"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What chance does to one training picture.

    Attributes:
        geometry: "crop", a random resized crop (photos); "pad", a random crop after padding by 1/8 (pictures as small
            as CIFAR's); "affine", up to 12 degrees, 8 % shift, 0.9 to 1.1 scale (pictures that fill the frame, such as
            digits); "none", as in evaluation.
        min_scale: smallest share of the picture's area that "crop" keeps.
        flip: mirror every second picture, by chance.
        auto_augment: a policy in timm's words, such as "rand-m9-mstd0.5-inc1"; colour pictures only.
        color_jitter: strength of changes in brightness, contrast and saturation; a policy replaces it.
        random_erasing: probability that a rectangle is replaced by noise.
        repeats: copies of a picture in one batch, each augmented for itself.
    """

    geometry: Geometry = "crop"
    min_scale: float = 0.08
    flip: bool = True
    auto_augment: str | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise InputError(f"augmentation.min_scale is {self.min_scale}; it must be above 0 and at most 1")
        if not 0 <= self.random_erasing <= 1:
            raise InputError(f"augmentation.random_erasing is {self.random_erasing}; it is a probability, 0 to 1")
        if self.color_jitter < 0:
            raise InputError(f"augmentation.color_jitter is {self.color_jitter}; it must not be negative")
        if self.repeats < 1:
            raise InputError(f"augmentation.repeats is {self.repeats}; it must be at least 1")
        if self.auto_augment is not None:
            try:
                make = rand_augment_transform if self.auto_augment.startswith("rand") else auto_augment_transform
                make(self.auto_augment, {})
            except (AssertionError, KeyError, ValueError) as error:
                raise InputError(
                    f"augmentation.auto_augment is {self.auto_augment!r}; it must be a policy that timm knows, "
                    "such as 'rand-m9-mstd0.5-inc1'"
                ) from error

    def transform(self, preprocessing: Preprocessing) -> transforms.Compose:
        """PIL image -> (channels, height, width) float32; draws from Python's, NumPy's and torch's generators.

        Raises `InputError` for a colour policy on grey pictures.
        """
        if self.auto_augment is not None and len(preprocessing.mean) == 1:
            raise InputError(
                f"augmentation.auto_augment {self.auto_augment!r} needs colour pictures; these are grey: set it to null"
            )
        transform = create_transform(
            (len(preprocessing.mean), *preprocessing.img_size),
            is_training=True,
            scale=(self.min_scale, 1.0),
            hflip=0.5 if self.flip else 0.0,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            re_prob=self.random_erasing,
            re_mode="pixel",
        )
        crop, *rest = transform.transforms
        resize_and_centre = preprocessing.transform().transforms[:2]
        height, width = preprocessing.img_size
        geometry = {
            "crop": [crop],
            "pad": [*resize_and_centre, transforms.RandomCrop((height, width), padding=(width // 8, height // 8))],
            "affine": [
                *resize_and_centre,
                transforms.RandomAffine(
                    degrees=12,
                    translate=(0.08, 0.08),
                    scale=(0.9, 1.1),
                    interpolation=transforms.InterpolationMode.BILINEAR,
                ),
            ],
            "none": resize_and_centre,
        }[self.geometry]
        return transforms.Compose([*geometry, *rest])


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mixes each picture of a batch with its mirror (i with B - 1 - i), and their targets in the same shares.

    Args:
        images: (B, C, H, W), B even; targets: (B, K) probabilities, of labels or of a teacher.
        mixup, cutmix: alpha of the Beta distribution that the share is drawn from; 0 leaves that kind out. Where both
            are above 0, every second batch takes the other, by chance.
        key: what the chance is a function of: equal keys mix all parts of a batch alike.
    """
    size = len(images)
    # timm mixes labels; given the numbers of the rows as labels, what comes back is the matrix that mixes any targets.
    mixer = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=size)
    with seeded(key):
        images, shares = mixer(images, torch.arange(size, device=images.device))
    return images, shares.to(targets.dtype) @ targets
