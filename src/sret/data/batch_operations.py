"""The operations of timm's RandAugment on batches of 8-bit images, with parameters for each image.

Pillow's arithmetic is repeated, its truncations included, so that the values are those of timm's operations.
Source: RandAugment, arXiv:1909.13719, as timm implements it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torch.nn.functional import conv2d

from sret.errors import InputError

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
FACTORS = (-4658895280553007687, -7723592293110705685)  # of splitmix64
NUMBERS = 5  # random numbers of a layer: operation, whether it is applied, sign, two for the magnitude
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


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


# values of pixels ----------------------------------------------------------------------------------------------------


def looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Replaces each value v of (B, C, H, W) uint8 by `table[b, c, v]`, or `table[b, 0, v]` for all channels."""
    B, C, H, W = images.shape
    table = table.clamp(0, 255).to(torch.uint8).expand(B, C, 256)
    return table.gather(2, images.flatten(2).long()).view(B, C, H, W)


def every_value(images: Tensor) -> Tensor:
    """(1, 1, 256): all values that a pixel can have."""
    return torch.arange(256, device=images.device).view(1, 1, 256)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """255 - v."""
    return 255 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the values that are not below the threshold."""
    values = every_value(images)
    return looked_up(images, torch.where(values < threshold.view(-1, 1, 1), values, 255 - values))


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """Adds to the values below 128."""
    values = every_value(images)
    return looked_up(images, torch.where(values < 128, values + added.view(-1, 1, 1), values))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits; none at all makes an image black."""
    unit = 2 ** (8 - bits).clamp(0, 8).long().view(-1, 1, 1)
    return looked_up(images, every_value(images) // unit * unit)


def histogram(images: Tensor) -> Tensor:
    """(B, C, 256) int64."""
    values = images.flatten(2).long()
    return torch.zeros(*images.shape[:2], 256, dtype=torch.long, device=images.device).scatter_add_(
        2, values, torch.ones_like(values)
    )


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretches the values of each channel to 0..255."""
    low, high = (f(images.flatten(2), dim=2).double()[..., None] for f in (torch.amin, torch.amax))
    values = every_value(images).double()
    scale = torch.full_like(low, 255) / (high - low)  # a number over a tensor would be rounded twice
    return looked_up(images, torch.where(high > low, (values * scale + -low * scale).trunc(), values))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Makes the histogram of each channel uniform."""
    counts = histogram(images)
    last = counts.gather(2, images.flatten(2).long().amax(2, keepdim=True))  # of the highest value
    step = (counts.sum(2, keepdim=True) - last) // 255
    before = counts.cumsum(2) - counts
    table = (before + step // 2) // step.clamp(min=1)
    return looked_up(images, torch.where(step > 0, table, every_value(images)))


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend: degenerate + factor (image - degenerate), in float32, truncated."""
    a, b = degenerate.float(), images.float()
    mixed = a + factor.float().view(-1, 1, 1, 1) * (b - a)
    return mixed.clamp(0, 255).to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """(B, 1, H, W) uint8: Pillow's conversion to grey."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Saturation."""
    return blend(luminance(images).expand_as(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Contrast around the mean luminance."""
    mean = (luminance(images).double().mean((1, 2, 3)) + 0.5).trunc()
    return blend(mean.view(-1, 1, 1, 1).expand_as(images), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Brightness; 0 is black."""
    return blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Sharpness; 0 is smoothed by a 3x3 filter, except at the edges."""
    B, C, H, W = images.shape
    weight = torch.ones(1, 1, 3, 3, dtype=torch.double, device=images.device)
    weight[..., 1, 1] = 5
    sums = conv2d(images.reshape(B * C, 1, H, W).double(), weight).view(B, C, H - 2, W - 2)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = ((2 * sums + 13) / 26).floor().to(torch.uint8)  # rounded; never half-way
    return blend(smooth, images, factor)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "Solarize": solarize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "ColorIncreasing": color,
    "Contrast": contrast,
    "ContrastIncreasing": contrast,
    "Brightness": brightness,
    "BrightnessIncreasing": brightness,
    "Sharpness": sharpness,
    "SharpnessIncreasing": sharpness,
}


# places of pixels ----------------------------------------------------------------------------------------------------


def matrices(name: str, values: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 2, 3) float64: where each pixel of the output comes from, as Pillow's `transform` takes it."""
    height, width = size
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    match name:
        case "ShearX":
            rows = (one, values, zero, zero, one, zero)
        case "ShearY":
            rows = (one, zero, zero, values, one, zero)
        case "TranslateXRel":
            rows = (one, zero, values * width, zero, one, zero)
        case "TranslateYRel":
            rows = (one, zero, zero, zero, one, values * height)
        case _:
            angle = -torch.deg2rad(values % 360)
            cos, sin = (torch.round(f(angle), decimals=15) for f in (torch.cos, torch.sin))
            x, y = width / 2, height / 2
            rows = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    return torch.stack(rows, 1).view(-1, 2, 3)


def transformed(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Moves pixels by Pillow's bicubic interpolation; pixels from outside get the colour `fill`, (C,)."""
    B, C, H, W = images.shape
    y, x = (torch.arange(n, device=images.device, dtype=torch.double) + 0.5 for n in (H, W))
    a = matrix.view(B, 6, 1, 1).unbind(1)
    from_x = a[0] * x + a[1] * y[:, None] + a[2]  # (B, H, W)
    from_y = a[3] * x + a[4] * y[:, None] + a[5]
    is_inside = (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    from_x, from_y = from_x - 0.5, from_y - 0.5
    left, top = from_x.floor(), from_y.floor()
    dx, dy = (from_x - left)[:, None], (from_y - top)[:, None]
    pixels = images.flatten(2)

    def row(offset: int) -> Tensor:
        line = (top.long() + offset).clamp(0, H - 1) * W

        def pixel(k: int) -> Tensor:
            places = (line + (left.long() + k).clamp(0, W - 1)).view(B, 1, -1).expand(-1, C, -1)
            return pixels.gather(2, places).view(B, C, H, W).double()

        return cubic(pixel(-1), pixel(0), pixel(1), pixel(2), dx)

    value = cubic(row(-1), row(0), row(1), row(2), dy).clamp(0, 255).to(torch.uint8)
    return torch.where(is_inside[:, None], value, fill.view(1, C, 1, 1))


def cubic(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, d: Tensor) -> Tensor:
    """Pillow's cubic between v2 (d = 0) and v3 (d = 1)."""
    p2, p3, p4 = v3 - v1, 2 * (v1 - v2) + v3 - v4, -v1 + v2 - v3 + v4
    return v2 + d * (p2 + d * (p3 + d * p4))
