"""Augmentation of batches on the device: timm's operations value by value, and runs that resume exactly."""

import json
from dataclasses import replace
from pathlib import Path

import loading
import numpy as np
import pytest
import torch
from PIL import Image
from test_train import RECIPE, weights
from timm.data import auto_augment
from torch.utils.data import DataLoader

from sret import InputError
from sret.data.config import Augmentation
from sret.data.dataset import Samples
from sret.data.loading import TrainDataset
from sret.data.on_device import loaders
from sret.data.on_device.affine import AFFINE, matrices, transformed
from sret.data.on_device.loaders import (
    BatchAugmentation,
    CropLoader,
    DeviceLoader,
    fit_on_device,
    keys_of,
    rectangles_of,
)
from sret.data.on_device.pixels import OPERATIONS
from sret.data.on_device.rand_augment import argument, hashed, uniform
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches, SampleIndex, part_of
from sret.training.config import RuntimeConfig
from sret.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_report")

FILL = (125, 122, 114)
PREPROCESSING = Preprocessing(img_size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
FULL = Augmentation(geometry="pad", auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, on_device=True)
ON_DEVICE = replace(RECIPE, augmentation=Augmentation(geometry="pad", random_erasing=0.5, on_device=True))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(B, 32, 32, 3): noise, smooth images, few and single values."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (3, 32, 32, 3), np.uint8)
    small = generator.integers(0, 256, (4, 6, 6, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((32, 32), Image.BICUBIC)) for image in small]
    flat = [np.full((32, 32, 3), value, np.uint8) for value in (0, 9, 255)]
    return np.stack([*noise, *smooth, *flat, noise[0] // 64 * 64])


def batch_of(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", [*OPERATIONS, *AFFINE])
def test_an_operation_has_the_values_of_timm(name, pixels, monkeypatch):
    images = batch_of(pixels)
    for level in (0.0, 2.7, 9.13, 10.0):
        for sign in (1.0, -1.0):
            values = argument(name, torch.tensor([level], dtype=torch.double), torch.tensor([sign], dtype=torch.double))
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            level_to_argument = auto_augment.LEVEL_TO_ARG[name]
            arguments = level_to_argument(level, {}) if level_to_argument else ()
            assert arguments in ((), (values.item(),))
            values = values.expand(len(images))
            if name in AFFINE:
                found = transformed(images, matrices(name, values, (32, 32)), torch.tensor(FILL, dtype=torch.uint8))
            else:
                found = OPERATIONS[name](images, values)
            for image, result in zip(pixels, found.permute(0, 2, 3, 1).numpy(), strict=True):
                if name.startswith("Posterize") and arguments[0] < 1:  # Pillow refuses to keep no bits
                    expected = np.zeros_like(image)
                else:
                    source = Image.fromarray(image)
                    options = {"fillcolor": FILL, "resample": Image.BICUBIC}
                    expected = np.asarray(auto_augment.NAME_TO_OP[name](source, *arguments, **options))
                np.testing.assert_array_equal(result, expected)


def test_random_numbers_are_uniform_and_unrelated():
    numbers = uniform(hashed(torch.arange(2000)), 0, 20)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.002
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(uniform(torch.tensor([5]), 3, 2), uniform(torch.tensor([5]), 0, 9)[:, 3:5])


def test_an_image_has_the_same_augmentation_in_every_batch(pixels):
    batch = [SampleIndex(image, 4, use) for image, use in zip(range(10), [0, 1] * 5, strict=True)]
    augment, images = BatchAugmentation(FULL, PREPROCESSING, has_crops=False), batch_of(pixels)[:10]
    whole = augment(images, keys_of(7, batch))
    for part in range(2):
        samples = part_of(batch, part, 2)
        rows = [sample.image for sample in samples]
        torch.testing.assert_close(augment(images[rows], keys_of(7, samples)), whole[rows], atol=0, rtol=0)
    others = [keys_of(8, batch), keys_of(7, [sample._replace(epoch=5) for sample in batch])]
    assert all(not torch.equal(augment(images, keys), whole) for keys in others)


def test_crops_and_flips_are_those_of_the_padded_image(pixels):
    augment = BatchAugmentation(Augmentation(geometry="pad", on_device=True), PREPROCESSING, has_crops=False)
    image = batch_of(pixels)[:1]
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = [padded[0, :, top : top + 32, left : left + 32] / 255 for top in range(9) for left in range(9)]
    windows += [window.flip(2) for window in windows]
    for crop in augment(image.expand(200, -1, -1, -1), hashed(torch.arange(200))).unique(dim=0)[:20]:
        assert sum(torch.equal(crop, window) for window in windows) == 1


def test_erased_rectangles_have_timms_areas_and_noise_the_data_s_statistics(pixels):
    erasing = Augmentation(geometry="none", flip=False, random_erasing=0.25, on_device=True)
    augment = BatchAugmentation(erasing, PREPROCESSING, has_crops=False)
    keys = hashed(torch.arange(4000))
    _, _, height, width = rectangles_of(augment.erasing.erasing, keys, (32, 32)).unbind(1)
    erased = height > 0
    assert abs(erased.double().mean() - 0.25) < 0.02
    areas = (height * width)[erased] / 1024
    assert areas.min() > 0.01
    assert areas.max() < 0.36
    black = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    noise = augment(black, keys)
    inside = noise != 0
    assert torch.equal(inside[:, 0].flatten(1).sum(1), (height * width))
    for channel in range(3):
        values = noise[:, channel][inside[:, channel]]
        assert values.mean().item() == pytest.approx(PREPROCESSING.mean[channel], abs=0.01)
        assert values.std().item() == pytest.approx(PREPROCESSING.std[channel], abs=0.01)


def test_operations_without_a_device_version_are_refused():
    for policy in ("augmix-m3-w3", "rand-m9-tweights", "v0"):
        with pytest.raises(InputError, match="is not computed on the device"):
            BatchAugmentation(replace(FULL, auto_augment=policy), PREPROCESSING, has_crops=False)


# Photos are loaded and cropped by processes; the small images of this recipe live on the device.
@pytest.mark.parametrize(("geometry", "loader"), [("pad", DeviceLoader), ("crop", CropLoader)])
def test_a_run_resumes_to_the_same_bits_with_any_number_of_parts(geometry, loader, tmp_path: Path, monkeypatch):
    made = []
    monkeypatch.setattr(loader, "__iter__", lambda self, inner=loader.__iter__: made.append(self) or inner(self))
    recipe = replace(ON_DEVICE, mixup=0.2, cutmix=1.0, augmentation=replace(ON_DEVICE.augmentation, geometry=geometry))
    train(recipe, tmp_path / "whole", max_steps=6)
    train(recipe, tmp_path / "run", max_steps=3, runtime=RuntimeConfig(num_workers=2))
    train(recipe, tmp_path / "run", resume="auto", max_steps=6)
    assert made
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "run").items())
    frozen = replace(recipe, freeze=("stem",), model=replace(recipe.model, drop_rate=0.0, drop_path_rate=0.0))
    results = []
    for parts in (1, 2):
        train(
            replace(frozen, optimizer="sgd"),
            tmp_path / str(parts),
            max_steps=2,
            runtime=RuntimeConfig(grad_accum_steps=parts),
        )
        results.append(weights(tmp_path / str(parts)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_only_small_data_sets_live_on_the_device(monkeypatch):
    samples = Samples([Path("a.jpg")] * 10, [0] * 10)
    assert fit_on_device(samples, PREPROCESSING, FULL)
    assert not fit_on_device(samples, PREPROCESSING, replace(FULL, geometry="crop"))
    monkeypatch.setattr(loaders, "MAX_BYTES", 10 * 32 * 32 * 3 - 1)
    assert not fit_on_device(samples, PREPROCESSING, FULL)


def test_an_image_that_cannot_be_read_is_replaced_in_crops_for_the_device(tmp_path: Path):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"damaged")
    samples = Samples([tmp_path / "a.png", tmp_path / "b.png"], [3, 4])
    batches = EpochBatches(2, 2, seed=0)
    for max_corrupt, labels in ((0, {3, 0}), (1, {3})):
        dataset = TrainDataset(samples, PREPROCESSING, replace(FULL, geometry="crop"), max_corrupt=max_corrupt)
        loader = CropLoader(
            DataLoader(dataset, batch_sampler=batches), replace(FULL, geometry="crop"), batches, torch.device("cpu")
        )
        ((images, found, errors),) = loader
        assert images.shape == (2, 3, 32, 32)
        assert images.dtype == torch.float32
        assert set(found.tolist()) == labels
        assert sum(map(bool, errors)) == 1


def test_the_benchmark_of_loading_runs(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "SYNTHETIC", 4)
    arguments = ["loading.py", "--num_workers", "0", "--batch_size", "4", "--rounds", "1", "--seconds", "0.01"]
    monkeypatch.setattr("sys.argv", arguments)
    loading.main()
    rates = json.loads(capsys.readouterr().out)["images_per_second"]
    assert min(rates.values()) > 0
