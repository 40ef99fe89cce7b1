"""Augmentation by its properties; mixing against its formula."""

import numpy as np
import pytest
import torch
from PIL import Image

from sret import InputError
from sret.data.augment import mix, train_transform
from sret.data.config import Augmentation
from sret.data.preprocess import Preprocessing

GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))
RGB = Preprocessing(img_size=(32, 24), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


def distinct(augmentation: Augmentation, image: Image.Image, draws: int = 12) -> int:
    """How many different tensors come out."""
    transform = train_transform(augmentation, RGB)
    return len({transform(image).numpy().tobytes() for _ in range(draws)})


def test_without_chance_training_sees_what_evaluation_sees(noise):
    plain = train_transform(Augmentation(geometry="none", flip=False), RGB)
    torch.testing.assert_close(plain(noise), RGB.transform()(noise))
    assert plain(noise).shape == (3, 32, 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"geometry": "crop"},
        {"geometry": "pad"},
        {"geometry": "affine"},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.4},
        {"random_erasing": 1.0},
    ],
)
def test_every_kind_of_chance_changes_the_image(noise, changes):
    augmentation = Augmentation(**{"geometry": "none", "flip": False, **changes})
    assert train_transform(augmentation, RGB)(noise).shape == (3, 32, 24)
    assert distinct(augmentation, noise) > 4


def test_flip_mirrors_and_does_nothing_else(noise):
    seen = {train_transform(Augmentation(geometry="none"), RGB)(noise).numpy().tobytes() for _ in range(20)}
    straight = RGB.transform()(noise)
    assert seen == {straight.numpy().tobytes(), straight.flip(2).contiguous().numpy().tobytes()}


def test_min_scale_bounds_the_crop():
    """An image whose halves differ: a crop of nearly everything always shows both."""
    halves = Image.new("RGB", (64, 64))
    halves.paste((255, 255, 255), (32, 0, 64, 64))
    means = [
        [train_transform(Augmentation(min_scale=scale, flip=False), RGB)(halves).mean().item() for _ in range(40)]
        for scale in (0.02, 0.95)
    ]
    assert np.std(means[0]) > 5 * np.std(means[1])


def test_affine_sees_what_evaluation_sees():
    wide = Image.new("L", (80, 40), 0)
    wide.paste(255, (0, 0, 15, 40))  # a white edge that the centre crop leaves out
    assert GREY.transform()(wide).max() < 0.05
    assert (
        max(train_transform(Augmentation(geometry="affine", flip=False), GREY)(wide).max().item() for _ in range(20))
        < 0.05
    )


def test_settings_that_cannot_be_are_refused():
    for name, value in (("min_scale", 0.0), ("random_erasing", 1.5), ("color_jitter", -1.0), ("repeats", 0)):
        with pytest.raises(InputError, match=f"augmentation.{name} is {value}"):
            Augmentation(**{name: value})
    for policy in ("rand-q9", "nonsense"):
        with pytest.raises(InputError, match="must be a policy that timm knows"):
            Augmentation(auto_augment=policy)
    with pytest.raises(InputError, match="needs colour images, and these are grey"):
        train_transform(Augmentation(auto_augment="rand-m9"), GREY)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_mixes_targets_in_the_shares_of_the_images(mixup, cutmix):
    """Images of one colour each: the mean of what comes out says which share of which image it holds."""
    values = torch.arange(1.0, 7.0)
    images = values.view(6, 1, 1, 1).expand(6, 1, 40, 40).clone()
    targets = torch.rand(6, 5).softmax(dim=1)  # soft labels as well as hard ones
    mixed, mixed_targets = mix(images.clone(), targets, mixup, cutmix, key=(3, 4))
    share = (mixed.mean((1, 2, 3)) - values.flip(0)) / (values - values.flip(0))
    assert 0.01 < share[0] < 0.99
    torch.testing.assert_close(share, share[:1].expand(6))
    torch.testing.assert_close(mixed_targets, share[:, None] * targets + (1 - share[:, None]) * targets.flip(0))


def test_mixing_is_a_function_of_its_key():
    images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    first = mix(images.clone(), targets, 0.8, 1.0, key=(0, 1))
    torch.manual_seed(5)
    np.random.seed(5)
    again, other = (mix(images.clone(), targets, 0.8, 1.0, key=key) for key in ((0, 1), (0, 2)))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_parts_of_a_batch_are_mixed_as_the_whole_is():
    from sret.data.sampler import part_of

    images, targets = torch.rand(8, 3, 16, 16), torch.eye(8)
    whole = mix(images.clone(), targets, 0.8, 1.0, key=(7,))
    for part in range(2):
        rows = part_of(range(8), part, 2)
        mixed = mix(images[rows].clone(), targets[rows], 0.8, 1.0, key=(7,))
        torch.testing.assert_close(mixed[0], whole[0][rows])
        torch.testing.assert_close(mixed[1], whole[1][rows])
