"""Augmentation by its properties; mixing against its formula."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from sret import InputError
from sret.data.augment import mix, train_transform
from sret.data.config import Augmentation
from sret.data.dataset import Samples
from sret.data.loading import TrainDataset
from sret.data.policy import SECTIONS, operations
from sret.data.preprocess import Preprocessing
from sret.data.sampler import SampleIndex

GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))
RGB = Preprocessing(img_size=(32, 24), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


def distinct(augmentation: Augmentation, image: Image.Image, draws: int = 12) -> int:
    """How many different tensors come out."""
    transform = train_transform(augmentation, RGB)
    return len({transform(image).numpy().tobytes() for _ in range(draws)})


def test_padding_moves_an_image_by_up_to_an_eighth_of_its_side():
    white = Image.new("RGB", (24, 32), "white")
    transform = train_transform(Augmentation(geometry="pad", flip=False), replace(RGB, crop_pct=1.0))
    moves = set()
    for _ in range(400):
        inside = transform(white)[0] == 1
        rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
        moves.add((32 - rows, 24 - columns))
    assert max(row for row, _ in moves) == 4
    assert max(column for _, column in moves) == 3
    assert (0, 0) in moves


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


def test_invalid_settings_are_refused():
    for name, value in (("min_scale", 0.0), ("random_erasing", 1.5), ("geometry", "resize")):
        with pytest.raises(InputError, match=f"augmentation.{name} is {value!r}"):
            Augmentation(**{name: value})
    with pytest.raises(InputError, match="needs colour images, but these are grey"):
        train_transform(Augmentation(auto_augment="rand-m9"), GREY)


@pytest.mark.parametrize(
    ("policy", "nearest"),
    [
        ("nonsense", "there are rand, augmix, v0"),
        ("", "there are rand"),
        ("rnd-m9", "did you mean 'rand'"),
        ("rand-zz", "for example, m9, n2"),
        ("rand-m9-mstd0.5-incx", "did you mean 'inc1'"),
        ("rand-m9-ms0.5", "did you mean 'mstd0.5'"),
        ("rand-m9-", "no section ''"),
        ("augmix-n3", "for example, m3, w3"),
        ("original-m9", "for example, mstd0.5"),
    ],
)
def test_a_misspelt_policy_is_refused_with_the_nearest(policy, nearest):
    with pytest.raises(InputError, match=nearest):
        Augmentation(auto_augment=policy)


@pytest.mark.parametrize("kind", SECTIONS)
def test_timm_reads_every_section_of_every_policy(kind):
    """The policy and each section change something of what timm builds, so none is a word that timm passes over."""
    examples = {"m9": "m7", "n2": "n3", "p0.5": "p0.6", "m3": "m4", "w3": "w4", "a1": "a2"}  # other than timm's own
    for section in SECTIONS[kind]:
        assert settings(f"{kind}-{examples.get(section, section)}") != settings(kind), section


def settings(words: str) -> list[Any]:
    policy = policy_of(words)
    return [repr(policy), vars(policy).get("blended"), *(operation.magnitude_max for operation in operations(policy))]


def policy_of(words: str) -> Any:
    augmentation = Augmentation(auto_augment=words, geometry="none", flip=False)
    return next(step for step in train_transform(augmentation, RGB).transforms if list(operations(step)))


@pytest.mark.parametrize(
    "words", [*SECTIONS, *(f"rand-m{level}-inc{i}" for level in (1, 10) for i in (0, 1)), "rand-m40-mmax40-inc1"]
)
def test_every_operation_of_every_policy_works_at_every_level(noise, words):
    for operation in operations(policy_of(words)):
        operation.prob, operation.magnitude_std = 1.0, 0
        for level in np.linspace(0, operation.magnitude_max or 10, 21).tolist():
            operation.magnitude = level
            assert operation(noise).size == noise.size


def test_an_image_that_keeps_no_bits_is_black(noise):
    posterize = next(o for o in operations(policy_of("rand-m10-inc1")) if o.name == "PosterizeIncreasing")
    posterize.prob = 1.0
    assert posterize(noise).getextrema() == ((0, 0),) * 3


def test_an_operation_that_fails_is_named_with_its_image(tmp_path, noise, monkeypatch):
    monkeypatch.setitem(auto_augment.NAME_TO_OP, "Rotate", lambda *_, **__: 1 / 0)
    noise.save(tmp_path / "a.png")
    samples = Samples([tmp_path / "a.png"], [0])
    policy = TrainDataset(samples, RGB, Augmentation(auto_augment="rand-p1-n20"))
    *_, error = policy[SampleIndex(0, 0)]
    assert re.fullmatch(r".*a\.png: Rotate\(.*\) failed: division by zero", error)
    plain = TrainDataset(samples, RGB, Augmentation())
    plain.transform.transforms.append(lambda image: image.no_such_thing)
    *_, error = plain[SampleIndex(0, 0)]
    assert re.fullmatch(r".*a\.png: function failed: .*no_such_thing.*", error)


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
