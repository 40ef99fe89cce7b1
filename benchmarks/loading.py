"""Measures how many photos a second are loaded and augmented, with the augmentation in the loading processes or not.

    python benchmarks/loading.py --num_workers 16
    python benchmarks/loading.py PHOTOS --num_workers 16

Without a folder of photos, it writes JPEG files of 500x375 pixels, as ImageNet's are on average. The augmentation is
that of the ImageNet recipes: random resized crop to 224 pixels, flip, RandAugment, erasing. `augmentation.on_device`
leaves all but the crop to the device. The ways alternate. Crops and the device are measured alone too, since on a
machine without a GPU they share the cores.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sret.bench.timing import alternate, ratio
from sret.data.config import Augmentation
from sret.data.dataset import Samples
from sret.data.image_files import find_image_files
from sret.data.loading import TrainDataset
from sret.data.on_device.loaders import CropLoader, keys_of
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches, SampleIndex
from sret.data.workers import worker_options
from sret.version import device_name, versions

RECIPE = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
PREPROCESSING = Preprocessing(img_size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SYNTHETIC = 256  # photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="?", help="a folder of JPEG files; by default they are made")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of a turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = find_image_files(options.photos or write_photos(Path(folder)))
        print(json.dumps(measure(paths, options)))


def write_photos(folder: Path) -> Path:
    """JPEG files with smooth shapes and some noise, of about 100 kB each."""
    generator = np.random.default_rng(0)
    for i in range(SYNTHETIC):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + generator.normal(0, 12, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder


def measure(paths: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Photos per second of each way, medians of the rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # An epoch is long, because processes load nothing in advance for the next one.
    copies = -(-20 * max(1, options.num_workers) * options.batch_size // len(paths))
    samples = Samples(paths * copies, [0] * (len(paths) * copies))
    batches = EpochBatches(len(samples), options.batch_size, seed=0)
    on_device = replace(RECIPE, on_device=True)

    def loader(augmentation: Augmentation) -> DataLoader[Any]:
        loading = {**worker_options(options.num_workers), "persistent_workers": options.num_workers > 0}
        dataset = TrainDataset(samples, PREPROCESSING, augmentation)
        return DataLoader(dataset, batch_sampler=batches, pin_memory=device.type == "cuda", **loading)

    both = CropLoader(loader(on_device), on_device, batches, device)
    streams = {
        "in_workers": endless(loader(RECIPE), device),
        "crops_alone": endless(loader(on_device), device),
        "crops_then_device": endless(both, device),
    }
    for name, stream in streams.items():
        images = next(stream)
        assert images.shape == (options.batch_size, 3, 224, 224), name
        assert images.dtype == (torch.uint8 if name == "crops_alone" else torch.float32), name
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(options.rounds):
        for name, stream in streams.items():
            rates[name].append(rate(stream, options))
    images = torch.randint(0, 256, (options.batch_size, 3, 224, 224), dtype=torch.uint8).to(device)
    keys = keys_of(0, [SampleIndex(i, 0) for i in range(options.batch_size)])
    seconds = alternate({"device": lambda: both.augment(images, keys)}, rounds=5)["device"]
    return {
        "benchmark": "loading",
        **versions(),
        "device": device_name(device.type),
        "num_workers": options.num_workers,
        "photos": len(paths),
        "kilobytes": round(sum(path.stat().st_size for path in paths) / len(paths) / 1e3),
        "images_per_second": {
            **{name: median(values) for name, values in rates.items()},
            "device_alone": options.batch_size / median(seconds),
        },
        "ratios_to_in_workers": {name: ratio(values, rates["in_workers"]) for name, values in rates.items()},
    }


def endless(loader: Any, device: torch.device) -> Iterator[torch.Tensor]:
    """Images on the device, of one epoch after the other."""
    while True:
        for images, *_ in loader:
            yield images.to(device, non_blocking=True)


def rate(stream: Iterator[Any], options: argparse.Namespace) -> float:
    """Images per second in at least `--seconds`, after the batches that were loaded in advance."""
    for _ in range(2 * options.num_workers + 1):
        next(stream)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < options.seconds:
        next(stream)
        count += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count * options.batch_size / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
