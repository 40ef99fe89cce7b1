"""Chance in training images: geometry, colours, erasing (per image), mixup and CutMix (per batch), all timm's.

Sources: RandAugment, arXiv:1909.13719; random erasing, arXiv:1708.04896; mixup, arXiv:1710.09412; CutMix,
arXiv:1905.04899; as DeiT (arXiv:2012.12877) and so the SReT authors use them.
"""

import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from sret.data.config import Augmentation
from sret.data.preprocess import Preprocessing
from sret.data.sampler import seeded
from sret.errors import InputError


def train_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> transforms.Compose:
    """PIL image -> (channels, height, width) float32 in 0..1; draws from Python's, NumPy's and torch's generators.

    Raises `InputError` for a colour policy on grey images.
    """
    if augmentation.auto_augment is not None and len(preprocessing.mean) == 1:
        raise InputError(
            f"augmentation.auto_augment {augmentation.auto_augment!r} needs colour images, and these are grey: "
            "set it to null"
        )
    transform = create_transform(
        (len(preprocessing.mean), *preprocessing.img_size),
        is_training=True,
        scale=(augmentation.min_scale, 1.0),
        hflip=0.5 if augmentation.flip else 0.0,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )
    crop, *rest = transform.transforms
    # Normalisation is done for whole batches on their device; what timm erases is normalised noise.
    rest = [
        PixelNoise(step, preprocessing) if isinstance(step, RandomErasing) else step
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
    return transforms.Compose([*geometry, *rest])


class PixelNoise:
    """timm's random erasing for an image in 0..1: its noise has the mean and the standard deviation of the data."""

    def __init__(self, erasing: RandomErasing, preprocessing: Preprocessing) -> None:
        self.erasing = erasing
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) -> (C, H, W)."""
        noise = self.erasing(torch.full_like(image, torch.nan))  # NaN where nothing is erased
        return torch.where(noise.isnan(), image, noise * self.std + self.mean)


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mixes each image of a batch with its mirror (i with B - 1 - i), and their targets in the same shares.

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
