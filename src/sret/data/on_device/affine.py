"""RandAugment's operations on the places of pixels, on batches of 8-bit images with a parameter for each.

Pillow's arithmetic is repeated, its truncations included, so that the values are those of timm's operations.
"""

import torch
from torch import Tensor

AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


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
