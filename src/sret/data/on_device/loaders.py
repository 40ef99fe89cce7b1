"""Augments training images on the device in batches; small data sets also live there, as 8-bit values.

Every image has random numbers of its own, a hash of (seed, epoch, image, use), so that a batch does not depend on how
it is divided, and a run resumes exactly. They choose the parameters on the CPU, so that nothing waits for the device.
The operations are those of timm's RandAugment on Pillow images, value by value (tests/test_device_data.py).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from sret.data.augment import PixelErasing, train_transform
from sret.data.config import Augmentation
from sret.data.dataset import Samples
from sret.data.loading import TrainDataset
from sret.data.on_device.rand_augment import RandomOperations, hashed, uniform
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches, SampleIndex

MAX_BYTES = 4 * 2**30
CROP, FLIP, ERASE, POLICY = 0, 2, 3, 64  # the first random number of each part
ATTEMPTS = 10  # of random erasing to find a rectangle that fits; each has four random numbers


def fit_on_device(samples: Samples, preprocessing: Preprocessing, augmentation: Augmentation) -> bool:
    """Whether the images can live on the device: they are small, and their crops do not need the original images."""
    is_small = len(samples) * math.prod(preprocessing.img_size) * len(preprocessing.mean) <= MAX_BYTES
    return augmentation.geometry in ("pad", "none") and is_small


class DeviceLoader:
    """Iterates over the batches of an epoch as a DataLoader of a `TrainDataset` does, with images on the device.

    Raises `InputError` for an image that cannot be read, and as `BatchAugmentation`.
    """

    def __init__(
        self,
        samples: Samples,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batches: EpochBatches,
        device: torch.device,
    ) -> None:
        self.batches = batches
        self.augment = BatchAugmentation(augmentation, preprocessing, has_crops=False)
        self.images = load_images(samples, preprocessing, device)
        self.labels = torch.as_tensor(np.asarray(samples.labels), dtype=torch.long).to(device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for batch in self.batches:
            rows = torch.tensor([sample.image for sample in batch]).to(self.images.device, non_blocking=True)
            yield self.augment(self.images[rows], keys_of(self.batches.seed, batch)), self.labels[rows], []


class CropLoader:
    """Iterates over the batches of an epoch; `loader` loads and crops the images, the device does the rest.

    Raises `InputError` as `BatchAugmentation`.

    Args:
        loader: of a `TrainDataset` whose augmentation is computed on the device, in the order of `batches`.
    """

    def __init__(
        self, loader: DataLoader[Any], augmentation: Augmentation, batches: EpochBatches, device: torch.device
    ) -> None:
        assert isinstance(loader.dataset, TrainDataset)
        self.loader, self.batches, self.device = loader, batches, device
        self.augment = BatchAugmentation(augmentation, loader.dataset.preprocessing, has_crops=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for batch, (images, labels, errors) in zip(self.batches, self.loader, strict=True):
            images = images.to(self.device, non_blocking=True)
            yield self.augment(images, keys_of(self.batches.seed, batch)), labels, errors


def load_images(samples: Samples, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """(N, C, H, W) uint8: all images, resized and cropped to the centre."""
    height, width = preprocessing.img_size
    shape = (len(samples), height, width, len(preprocessing.mean))
    resize, crop = preprocessing.transform().transforms[:2]
    pixels = np.empty(shape, np.uint8)
    for i in range(len(samples)):
        pixels[i] = np.asarray(crop(resize(preprocessing.load(samples.images[i])))).reshape(shape[1:])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)


def keys_of(seed: int, batch: Sequence[SampleIndex]) -> Tensor:
    """(B,) int64: a key for the random numbers of each image."""
    key = torch.full((len(batch),), seed)
    for part in zip(*((sample.epoch, sample.image, sample.use) for sample in batch), strict=True):
        key = hashed(key) + torch.tensor(part)
    return hashed(key)


class BatchAugmentation:
    """(B, C, H, W) uint8 and the images' keys, on the CPU -> float32 in 0..1: crop, flip, policy, erasing.

    Raises `InputError` for a policy that is not computed on the device.

    Args:
        has_crops: whether the images are crops already.
    """

    def __init__(self, augmentation: Augmentation, preprocessing: Preprocessing, has_crops: bool) -> None:
        steps = train_transform(augmentation, preprocessing).transforms
        self.is_flipped = augmentation.flip
        self.border = 1 / 8 if augmentation.geometry == "pad" and not has_crops else 0.0  # share of the side
        self.policy = None
        if augmentation.auto_augment is not None:
            self.policy = RandomOperations(augmentation.auto_augment, steps)
        erasing = [step for step in steps if isinstance(step, PixelErasing)]
        self.erasing = erasing[0] if erasing else None

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        if self.border or self.is_flipped:
            images = self.crop_and_flip(images, uniform(keys, CROP, 3))
        if self.policy is not None:
            images = self.policy(images, keys, POLICY)
        floats = images.float() / 255
        return floats if self.erasing is None else self.erase(floats, keys, self.erasing)

    def crop_and_flip(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Random crops of images with a black border, as torchvision's RandomCrop, and random flips."""
        (H, W), device = images.shape[-2:], images.device
        top, left, flip = numbers.to(device, non_blocking=True).unbind(1)
        if self.is_flipped:
            images = torch.where((flip < 0.5)[:, None, None, None], images.flip(3), images)
        if not self.border:
            return images
        border = int(H * self.border), int(W * self.border)
        rows = torch.arange(H, device=device) + (top * (2 * border[0] + 1)).long()[:, None]  # (B, H)
        columns = torch.arange(W, device=device) + (left * (2 * border[1] + 1)).long()[:, None]  # (B, W)
        images = pad(images, (border[1], border[1], border[0], border[0]))
        places = (rows[:, :, None] * images.shape[-1] + columns[:, None, :]).flatten(1)
        return images.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1)).unflatten(2, (H, W))

    def erase(self, images: Tensor, keys: Tensor, erasing: PixelErasing) -> Tensor:
        """Noise with the mean and the deviation of the data, in a random rectangle of some images."""
        rectangles = rectangles_of(erasing.erasing, keys, (images.shape[-2], images.shape[-1]))
        chosen = (rectangles[:, 2] > 0).nonzero().flatten()
        if not len(chosen):
            return images
        device, (C, H, W) = images.device, images.shape[1:]
        top, left, height, width = rectangles[chosen].to(device, non_blocking=True)[:, :, None].unbind(1)  # each (E, 1)
        row, column = torch.arange(H, device=device), torch.arange(W, device=device)
        in_rows, in_columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # (E, 1, H, W)
        noise = normal(keys[chosen].to(device, non_blocking=True), C * H * W).view(-1, C, H, W).float()
        mean, std = (value.to(device, non_blocking=True) for value in (erasing.mean, erasing.std))
        places = chosen.to(device, non_blocking=True)
        images[places] = torch.where(inside, noise * std + mean, images[places])
        return images


def rectangles_of(erasing: RandomErasing, keys: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 4) int64: top, left, height and width of the rectangle to erase; height 0 for none. As timm draws them."""
    H, W = size
    numbers = uniform(keys, ERASE, 1 + 4 * ATTEMPTS)
    areas, aspects, tops, lefts = numbers[:, 1:].unflatten(1, (ATTEMPTS, 4)).unbind(2)  # each (B, attempts)
    area = (erasing.min_area + areas * (erasing.max_area - erasing.min_area)) * H * W
    low, high = erasing.log_aspect_ratio
    aspect = (low + aspects * (high - low)).exp()
    height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (height < H) & (width < W)
    first = fits.int().argmax(1)[:, None]
    height, width, tops, lefts = (values.gather(1, first)[:, 0] for values in (height, width, tops, lefts))
    is_erased = (numbers[:, 0] <= erasing.probability) & fits.any(1)
    rectangle = torch.stack([(tops * (H - height + 1)).long(), (lefts * (W - width + 1)).long(), height, width], 1)
    return torch.where(is_erased[:, None], rectangle, 0)


def normal(keys: Tensor, count: int) -> Tensor:
    """(B, count) float64 standard normal numbers on the device of the keys, by Box and Muller."""
    a, b = uniform(keys, 1 << 20, 2 * count).unflatten(1, (count, 2)).unbind(2)
    return (-2 * (1 - a).log()).sqrt() * (2 * math.pi * b).cos()
