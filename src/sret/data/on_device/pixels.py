"""RandAugment's operations on the values of pixels, on batches of 8-bit images with a parameter for each.

Pillow's arithmetic is repeated, its truncations included, so that the values are those of timm's operations.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d


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
