"""Augments training images with timm: geometry, colours, erasing (per image), mixup and CutMix (per batch).

Sources: RandAugment, arXiv:1909.13719; random erasing, arXiv:1708.04896; mixup, arXiv:1710.09412; CutMix,
arXiv:1905.04899; used as in DeiT (arXiv:2012.12877) and by the SReT authors.
"""

from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from sret.data.config import Augmentation
from sret.data.policy import make_safe
from sret.data.preprocess import Preprocessing
from sret.data.sampler import seeded
from sret.errors import InputError


class Transforms(transforms.Compose):
    """Transforms that run one after the other. Raises `InputError` that names the one that failed."""

    def __call__(self, image: Any) -> Any:
        for step in self.transforms:
            try:
                image = step(image)
            except InputError:
                raise
            except Exception as error:
                raise InputError(f"{type(step).__name__} failed: {error}") from error
        return image


def train_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> Transforms:
    """PIL image -> (channels, height, width) float32 in 0..1; draws from Python's, NumPy's and torch's generators.

    Raises `InputError` for a colour policy on grey images.
    """
    geometry, rest = _steps(augmentation, preprocessing)
    return Transforms([*geometry, *map(make_safe, rest)])


def crop_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> Transforms:
    """PIL image -> (channels, height, width) uint8: the geometry alone; the rest is computed later, on the device."""
    geometry, _ = _steps(augmentation, preprocessing)
    return Transforms([*geometry, transforms.PILToTensor()])


def _steps(augmentation: Augmentation, preprocessing: Preprocessing) -> tuple[list[Any], list[Any]]:
    """The steps of the geometry, and those after it."""
    if augmentation.auto_augment is not None and len(preprocessing.mean) == 1:
        raise InputError(
            f"augmentation.auto_augment {augmentation.auto_augment!r} needs colour images, but these are grey; "
            "set it to null"
        )
    transform = create_transform(
        (len(preprocessing.mean), *preprocessing.img_size),
        is_training=True,
        scale=(augmentation.min_scale, 1.0),
        hflip=0.5 if augmentation.flip else 0.0,
        color_jitter=None,  # type: ignore[arg-type]  # timm takes None too
        auto_augment=augmentation.auto_augment,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )
    crop, *rest = transform.transforms
    # Whole batches are normalised later, on their device; the noise of timm's erasing is that of normalised images.
    rest = [
        PixelErasing(step, preprocessing) if isinstance(step, RandomErasing) else step
        for step in rest
        if not isinstance(step, transforms.Normalize)
    ]
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
    }[augmentation.geometry]
    return geometry, rest


class PixelErasing:
    """timm's random erasing for images in 0..1: the noise has the mean and the standard deviation of the data."""

    def __init__(self, erasing: RandomErasing, preprocessing: Preprocessing) -> None:
        self.erasing = erasing
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) -> (C, H, W)."""
        noise = self.erasing(torch.full_like(image, torch.nan))  # NaN where nothing is erased
        return torch.where(noise.isnan(), image, noise * self.std + self.mean)


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mixes image i of a batch with image B - 1 - i, and their targets in the same proportion.

    Args:
        images: (B, C, H, W), B even.
        targets: (B, K) probabilities, of labels or of a teacher.
        mixup, cutmix: alpha of the Beta distribution of the proportion; 0 is off. If both are above 0, each batch uses
            one of them, chosen at random with equal probability.
        key: seeds the random numbers; with equal keys, all parts of a batch are mixed in the same way.
    """
    size = len(images)
    # timm mixes only labels. With row numbers as labels it returns the matrix that mixes any targets.
    mixer = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=size)
    with seeded(key):
        images, shares = mixer(images, torch.arange(size, device=images.device))
    return images, shares.to(targets.dtype) @ targets
