"""From an image to the tensor a model takes: what a checkpoint must remember so that prediction equals evaluation."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision import transforms

from sret.errors import InputError

_MODES = {1: "L", 3: "RGB"}
MOST_ELONGATED = 100  # longer over shorter side; resized beyond it, a few kilobytes of file fill the memory


@dataclass(frozen=True)
class Encoded:
    """The bytes of an image's file that is not a file by itself, and the name to call it by."""

    name: str
    content: bytes


ImageSource = Path | Encoded | Image.Image


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, centre crop, scale to 0..1; then normalise, for a whole batch on its device.

    Attributes:
        img_size: (height, width) in pixels after the crop.
        mean, std: per channel, on the scale 0..1; their length is the number of channels, 1 (grey) or 3 (RGB).
        crop_pct: share of the resized image that the crop keeps.
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
            raise InputError(f"images have 1 or 3 channels, not {len(self.mean)} means and {len(self.std)} stds")
        if len(self.img_size) != 2 or min(self.img_size) < 1 or not 0 < self.crop_pct <= 1:
            raise InputError(f"images cannot be cropped to {self.img_size} pixels with crop_pct {self.crop_pct}")
        if self.interpolation not in [mode.value for mode in transforms.InterpolationMode]:
            raise InputError(f"interpolation {self.interpolation!r} is unknown; use 'bicubic' or 'bilinear'")

    def load(self, source: ImageSource) -> Image.Image:
        """An image, or the one in a file, with this many channels; transparent parts turn white.

        Raises `InputError` naming a file that is not an image.
        """
        name = _name(source)
        if not isinstance(source, Image.Image):
            source = _read(source)
        if max(source.size) > MOST_ELONGATED * min(source.size):
            raise InputError(f"{name}: {source.width}x{source.height} pixels is too long and thin to be resized")
        mode = _MODES[len(self.mean)]
        if source.mode == "F":
            raise InputError(f"{name}: holds floating-point numbers of unknown range; save it with 8 or 16 bits")
        if source.mode.startswith("I"):  # Pillow would clip 16 bits to white instead of scaling them
            values = np.asarray(source)
            source = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
        if source.mode in ("RGBA", "LA", "PA") or "transparency" in source.info:
            source = source.convert("RGBA")
            source = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source)
        return source.convert(mode)

    def transform(self) -> transforms.Compose:
        """PIL image -> (channels, height, width) float32 in 0..1; not random: `sret.data.augment` is for training."""
        *steps, _ = create_transform(
            (len(self.mean), *self.img_size),
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        ).transforms  # the last one normalises, which is done for whole batches on their device
        return transforms.Compose(steps)

    def normalize(self, images: Tensor) -> Tensor:
        """(..., C, H, W) in 0..1 -> the same with the mean subtracted and divided by the standard deviation.

        The first step of a model, on its device.
        """
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class Normalized(nn.Module):
    """A model of normalised images as one of images in 0..1."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.preprocessing, self.training = model, preprocessing, model.training

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 -> what the model makes of them."""
        return self.model(self.preprocessing.normalize(images))


def header(source: ImageSource) -> tuple[str, tuple[int, int]] | None:
    """(Pillow's mode, (width, height)), without decoding the pixels; None of what is not an image."""
    if isinstance(source, Image.Image):
        return source.mode, source.size
    try:
        with Image.open(_file(source)) as image:
            return image.mode, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _name(source: ImageSource) -> str:
    return "image" if isinstance(source, Image.Image) else source.name if isinstance(source, Encoded) else str(source)


def _file(source: Path | Encoded) -> Path | io.BytesIO:
    return source if isinstance(source, Path) else io.BytesIO(source.content)


def _read(source: Path | Encoded) -> Image.Image:
    name = _name(source)
    try:
        with Image.open(_file(source)) as image:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large an image ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        is_there = isinstance(source, Encoded) or source.is_file()
        reason = "not an image that can be read" if is_there else "a folder" if Path(name).is_dir() else "no such file"
        raise InputError(f"{name}: {reason}") from error
