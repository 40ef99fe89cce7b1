"""From a picture to the tensor a model takes: what a checkpoint must remember so that prediction equals evaluation."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from sret.errors import InputError

_MODES = {1: "L", 3: "RGB"}
MOST_ELONGATED = 100  # longer over shorter side; resized beyond it, a few kilobytes of file fill the memory


@dataclass(frozen=True)
class Encoded:
    """The bytes of a picture's file that is not a file by itself, and the name to call it by."""

    name: str
    content: bytes


Picture = Path | Encoded | Image.Image


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, centre crop, scale to 0..1, normalise.

    Attributes:
        img_size: (height, width) in pixels after the crop.
        mean, std: per channel, on the scale 0..1; their length is the number of channels, 1 (grey) or 3 (RGB).
        crop_pct: share of the resized picture that the crop keeps.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("img_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.mean) not in _MODES or len(self.mean) != len(self.std):
            raise InputError(f"pictures have 1 or 3 channels, not {len(self.mean)} means and {len(self.std)} stds")
        if len(self.img_size) != 2 or min(self.img_size) < 1 or not 0 < self.crop_pct <= 1:
            raise InputError(f"pictures cannot be cropped to {self.img_size} pixels with crop_pct {self.crop_pct}")
        if self.interpolation not in [mode.value for mode in transforms.InterpolationMode]:
            raise InputError(f"interpolation {self.interpolation!r} is unknown; use 'bicubic' or 'bilinear'")

    def load(self, picture: Picture) -> Image.Image:
        """A picture, or the one in a file, with this many channels; transparent parts turn white.

        Raises `InputError` naming a file that is no picture.
        """
        name = _name(picture)
        if not isinstance(picture, Image.Image):
            picture = _read(picture)
        if max(picture.size) > MOST_ELONGATED * min(picture.size):
            raise InputError(f"{name}: {picture.width}x{picture.height} pixels is too long and thin to be resized")
        mode = _MODES[len(self.mean)]
        if picture.mode == "F":
            raise InputError(f"{name}: holds floating-point numbers of unknown range; save it with 8 or 16 bits")
        if picture.mode.startswith("I"):  # Pillow would clip 16 bits to white instead of scaling them
            values = np.asarray(picture)
            picture = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert(mode)

    def transform(self) -> transforms.Compose:
        """PIL image -> (channels, height, width) float32, without chance; `sret.augment` is for training."""
        return create_transform(
            (len(self.mean), *self.img_size),
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )

    def pixels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as the model takes it -> the same in 0..1, for showing."""
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)


def header(picture: Picture) -> tuple[str, tuple[int, int]] | None:
    """(Pillow's mode, (width, height)), without decoding the pixels; None of what is no picture."""
    if isinstance(picture, Image.Image):
        return picture.mode, picture.size
    try:
        with Image.open(_file(picture)) as image:
            return image.mode, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _name(picture: Picture) -> str:
    return (
        "picture"
        if isinstance(picture, Image.Image)
        else picture.name
        if isinstance(picture, Encoded)
        else str(picture)
    )


def _file(picture: Path | Encoded) -> Path | io.BytesIO:
    return picture if isinstance(picture, Path) else io.BytesIO(picture.content)


def _read(picture: Path | Encoded) -> Image.Image:
    name = _name(picture)
    try:
        with Image.open(_file(picture)) as image:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large a picture ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        is_there = isinstance(picture, Encoded) or picture.is_file()
        reason = "not a picture that can be read" if is_there else "a folder" if Path(name).is_dir() else "no such file"
        raise InputError(f"{name}: {reason}") from error
