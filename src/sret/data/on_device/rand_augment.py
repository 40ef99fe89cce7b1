"""timm's RandAugment on batches of 8-bit images, with random numbers for each image.

Source: RandAugment, arXiv:1909.13719, as timm implements it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data.auto_augment import RandAugment
from torch import Tensor

from sret.data.on_device.affine import AFFINE, matrices, transformed
from sret.data.on_device.pixels import OPERATIONS
from sret.errors import InputError

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
FACTORS = (-4658895280553007687, -7723592293110705685)  # of splitmix64
NUMBERS = 5  # random numbers of a layer: operation, whether it is applied, sign, two for the magnitude


def hashed(x: Tensor) -> Tensor:
    """int64 -> int64: the mixing function of splitmix64."""
    x = x + GOLDEN
    for shift, factor in ((30, FACTORS[0]), (27, FACTORS[1])):
        x = (x ^ ((x >> shift) & (1 << (64 - shift)) - 1)) * factor
    return x ^ ((x >> 31) & (1 << 33) - 1)


def uniform(keys: Tensor, first: int, count: int) -> Tensor:
    """(B, count) float64 in [0, 1): random numbers `first` to `first + count - 1` of each key."""
    places = torch.arange(first, first + count, device=keys.device)
    return (hashed(hashed(keys[:, None]) + places) >> 11 & (1 << 53) - 1).double() * 2.0**-53


class RandomOperations:
    """timm's RandAugment for batches. Raises `InputError` for a policy of another kind.

    Args:
        policy: its name, for the error.
        steps: transforms, one of which is timm's RandAugment.
    """

    def __init__(self, policy: str, steps: Sequence[Any]) -> None:
        found = [step for step in steps if isinstance(step, RandAugment) and step.choice_weights is None]
        names = [op.name for op in found[0].ops] if found else []
        if not names or not set(names) <= {*AFFINE, *OPERATIONS}:
            raise InputError(
                f"augmentation.auto_augment {policy!r} is not computed on the device; use a policy such as "
                "rand-m9-mstd0.5-inc1, or set augmentation.on_device to false"
            )
        self.names, self.num_layers, self.op = names, found[0].num_layers, found[0].ops[0]

    def __call__(self, images: Tensor, keys: Tensor, first: int) -> Tensor:
        """(B, 3, H, W) uint8 -> the same, with the random numbers of each key from number `first` on."""
        for layer in range(self.num_layers):
            choice, apply, sign, *two = uniform(keys, first + NUMBERS * layer, NUMBERS).unbind(1)
            chosen = (choice * len(self.names)).long()
            chosen[apply > self.op.prob] = -1
            levels, signs = self.levels(*two), torch.where(sign > 0.5, -1.0, 1.0).double()
            affine: list[tuple[Tensor, Tensor]] = []
            for i, name in enumerate(self.names):
                rows = (chosen == i).nonzero().flatten()
                if not len(rows):
                    continue
                arguments = argument(name, levels[rows], signs[rows])
                if name in AFFINE:
                    affine.append((rows, matrices(name, arguments, (images.shape[-2], images.shape[-1]))))
                    continue
                places, values = (x.to(images.device, non_blocking=True) for x in (rows, arguments))
                images = images.index_copy(0, places, OPERATIONS[name](images[places], values))
            if affine:
                rows, transforms = (torch.cat(parts) for parts in zip(*affine, strict=True))
                places = rows.to(images.device, non_blocking=True)
                fill = torch.tensor(self.op.kwargs["fillcolor"], dtype=torch.uint8, device=images.device)
                changed = transformed(images[places], transforms.to(images.device, non_blocking=True), fill)
                images = images.index_copy(0, places, changed)
        return images

    def levels(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) float64: magnitudes with timm's noise, from two uniform numbers."""
        level, std = float(self.op.magnitude), self.op.magnitude_std
        levels = torch.full_like(a, level)
        if std == math.inf:
            levels = a * level
        elif std > 0:
            levels = level + std * (-2 * (1 - a).log()).sqrt() * (2 * math.pi * b).cos()
        return levels.clamp(0, self.op.magnitude_max or 10.0)


def argument(name: str, level: Tensor, sign: Tensor) -> Tensor:
    """(B,) float64: the parameter of an operation at a level of 0 to 10, as timm computes it."""
    share = level / 10
    match name:
        case "Rotate":
            return sign * (share * 30)
        case "ShearX" | "ShearY":
            return sign * (share * 0.3)
        case "TranslateXRel" | "TranslateYRel":
            return sign * (share * 0.45)
        case "Posterize":
            return (share * 4).trunc()
        case "PosterizeIncreasing":
            return 4 - (share * 4).trunc()
        case "Solarize":
            return (share * 256).trunc().clamp(max=256)
        case "SolarizeIncreasing":
            return 256 - (share * 256).trunc().clamp(max=256)
        case "SolarizeAdd":
            return (share * 110).trunc().clamp(max=128)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return share * 1.8 + 0.1
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return (1 + sign * (share * 0.9)).clamp(min=0.1)
    return level
