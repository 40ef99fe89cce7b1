"""Preprocesses images for a model; a checkpoint stores how, so that prediction equals evaluation."""

import importlib
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor, nn
from torchvision import transforms

from sret.data.image_files import decoding_hint, image_suffixes
from sret.errors import InputError

_MODES = {1: "L", 3: "RGB"}
MIN_CROP_PCT = 0.1  # with less, an image is resized to many times the size of the crop
MAX_SCALE = 1000.0  # of means, of standard deviations and of their inverse
MAX_ASPECT_RATIO = 100  # longer / shorter side; resized, a longer image of a few kilobytes could fill the memory
MAX_PIXELS = 100_000_000  # of a decoded image, which takes 3 to 12 bytes each; $SRET_MAX_PIXELS is another limit


@dataclass(frozen=True)
class Encoded:
    """An encoded image that is not a file of its own, such as one in a tar file, and its name in messages."""

    name: str
    content: bytes


ImageSource = Path | Encoded | Image.Image


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, centre crop, scale to 0..1; then normalise, for a whole batch on its device.

    Attributes:
        img_size: (height, width) in pixels after the crop.
        mean, std: per channel, on the scale 0..1; their length is the number of channels, 1 (grey) or 3 (RGB).
        crop_pct: share of the resized image that the centre crop keeps.
        exif_orientation: rotate images as their EXIF orientation says.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        for name in ("img_size", "mean", "std"):
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)}; it must be finite numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(1 / MAX_SCALE <= value <= MAX_SCALE for value in self.std):
            raise InputError(f"std is {self.std}; images in 0..1 are divided by it; it must be 0.001 to 1000")
        if not all(abs(value) <= MAX_SCALE for value in self.mean):
            raise InputError(f"mean is {self.mean}; it is subtracted from images in 0..1; it must be -1000 to 1000")
        if len(self.mean) not in _MODES or len(self.mean) != len(self.std):
            raise InputError(f"images have 1 or 3 channels, not {len(self.mean)} means and {len(self.std)} stds")
        is_size = len(self.img_size) == 2 and all(isinstance(side, int) and side >= 1 for side in self.img_size)
        is_share = isinstance(self.crop_pct, int | float) and MIN_CROP_PCT <= self.crop_pct <= 1
        if not (is_size and is_share):
            raise InputError(f"images cannot be cropped to {self.img_size} pixels with crop_pct {self.crop_pct}")
        if self.interpolation not in [mode.value for mode in transforms.InterpolationMode]:
            raise InputError(f"interpolation {self.interpolation!r} is unknown; use 'bicubic' or 'bilinear'")

    def load(self, source: ImageSource) -> Image.Image:
        """Reads an image and converts it to this number of channels; transparent parts become white.

        Raises `InputError` naming a file that is not an image.
        """
        with _naming(source):
            image = source if isinstance(source, Image.Image) else _read(source, self.exif_orientation)
            return self._convert(image, name_of(source))

    def _convert(self, source: Image.Image, name: str) -> Image.Image:
        if max(source.size) > MAX_ASPECT_RATIO * min(source.size):
            raise InputError(f"{name}: {source.width}x{source.height} pixels is too narrow to be resized")
        mode = _MODES[len(self.mean)]
        if source.mode == "F":
            raise InputError(f"{name}: has floating-point numbers of unknown range; save it with 8 or 16 bits")
        if source.mode.startswith("I"):
            source = _eight_bits(source, name)
        if source.mode in ("RGBA", "LA", "PA") or "transparency" in source.info:
            source = source.convert("RGBA")
            source = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source)
        return source.convert(mode)

    def transform(self) -> transforms.Compose:
        """PIL image -> (channels, height, width) float32 in 0..1; not random: `sret.data.augment` is for training."""
        transform = create_transform(
            (len(self.mean), *self.img_size),
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )
        # Without the last step, which normalises: whole batches are normalised on their device.
        return transforms.Compose(transform.transforms[:-1])

    def normalize(self, images: Tensor) -> Tensor:
        """(..., C, H, W) in 0..1 -> the same with the mean subtracted and divided by the standard deviation.

        The first step of a model, on its device.
        """
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class Normalized(nn.Module):
    """A model for images in 0..1: normalises them, then calls the model."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.preprocessing, self.training = model, preprocessing, model.training

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 -> the outputs of the model."""
        return self.model(self.preprocessing.normalize(images))


def header(source: ImageSource) -> tuple[str, tuple[int, int]] | None:
    """(Pillow's mode, (width, height)), without decoding the pixels; None if it is not an image."""
    if isinstance(source, Image.Image):
        return source.mode, source.size
    try:
        with Image.open(_file(source), formats=_formats()) as image:
            return image.mode, image.size
    except Exception:  # decoders raise errors of any class
        return None


def name_of(source: ImageSource) -> str:
    """The name of an image in messages: its path, its place in a data set, or "image"."""
    return "image" if isinstance(source, Image.Image) else source.name if isinstance(source, Encoded) else str(source)


def _file(source: Path | Encoded) -> Path | io.BytesIO:
    return source if isinstance(source, Path) else io.BytesIO(source.content)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """A 16-bit grey image on the scale 0..65535, whatever its own maximum, which Pillow would clip to white."""
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535 or image.format not in ("PNG", "PPM")):
        raise InputError(f"{name}: has 32-bit integers of unknown range; save it with 8 or 16 bits")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _max_pixels() -> int:
    text = os.environ.get("SRET_MAX_PIXELS", "")
    return int(text) if text.isdecimal() else MAX_PIXELS


def _read(source: Path | Encoded, exif_orientation: bool) -> Image.Image:
    name, limit = name_of(source), _max_pixels()
    if isinstance(source, Path) and source.exists() and not source.is_file():  # reading a pipe would block
        raise InputError(f"{name}: {'a folder' if source.is_dir() else 'not a regular file'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked here
        image = Image.open(_file(source), formats=_formats())
    with image:
        width, height = image.size
        while image.width * image.height > limit:  # JPEG can be decoded at a half, a quarter or an eighth
            before = image.size
            image.draft(None, (image.width // 2, image.height // 2))
            if image.size == before:
                raise InputError(
                    f"{name}: {width}x{height} pixels are more than {limit:,}; resize it, or set SRET_MAX_PIXELS"
                )
        image.load()
        if exif_orientation:
            ImageOps.exif_transpose(image, in_place=True)
        return image


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    """Within this context any error becomes an `InputError` that names the image."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name_of(source)}: the image is too large ({error}); resize it") from error
    except Exception as error:  # decoders raise errors of any class
        is_there = not isinstance(source, Path) or source.is_file()
        hint = decoding_hint(source.suffix.lower()) if isinstance(source, Path) else ""
        reason = f"not an image that can be read{hint and f' ({hint})'}" if is_there else "no such file"
        raise InputError(f"{name_of(source)}: {reason}") from error


@cache
def _formats() -> list[str]:
    """Pillow's names of the formats of `image_suffixes`. Pillow would also start other programs, for EPS."""
    register_heif()
    names = Image.registered_extensions()
    return sorted({names[suffix] for suffix in image_suffixes() if suffix in names})


@cache
def register_heif() -> None:
    """Lets Pillow decode HEIC photos where pillow-heif is installed (the extra `heif`)."""
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
