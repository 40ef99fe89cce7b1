from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sret import InputError
from sret.data import EpochBatches, ImageDataset, load_data, seeded
from sret.preprocess import Preprocessing

EXAMPLES = Path(__file__).parents[1] / "examples" / "digits"
GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """A sub-folder per class with that many one-coloured PNGs."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 10), (40 * label, i, 0)).save(root / name / f"{i:03d}.png")
    return root


def keys(samples) -> set[bytes]:
    return {np.asarray(image).tobytes() for image in samples.images}


def test_digits_are_divided_fixed_stratified_and_without_overlap():
    data = load_data("digits")
    sizes = {name: len(samples) for name, samples in data.splits.items()}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] / 1797 == pytest.approx(0.2, abs=0.001)
    for name, samples in data.splits.items():
        counts = np.bincount(samples.labels)
        assert counts.max() - counts.min() <= 0.1 * counts.mean() + 2, name
    train, val, test = (keys(data.splits[name]) for name in ("train", "val", "test"))
    assert not train & test
    assert not val & test
    assert not train & val
    again = load_data("digits")
    assert all(again.splits[name].labels == data.splits[name].labels for name in data.splits)
    assert len(data.split("all")) == 1797


def test_the_examples_are_test_pictures():
    test = load_data("digits").split("test")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    label_of = {np.asarray(image).tobytes(): label for image, label in zip(test.images, test.labels, strict=True)}
    files = sorted(EXAMPLES.glob("*.png"))
    assert files
    for file in files:
        assert names[label_of[np.asarray(Image.open(file)).tobytes()]] == file.stem


def test_an_undivided_folder_is_divided_the_same_way_every_time(tmp_path):
    make_folder(tmp_path, {"cat": 20, "dog": 40})
    data = load_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [41, 7, 12]
    assert np.bincount(data.splits["test"].labels).tolist() == [4, 8]
    assert set(data.split("all").images) == set(tmp_path.glob("*/*.png"))
    (tmp_path / "cat" / "._000.png").write_text("what macOS leaves")
    assert load_data(str(tmp_path)).splits == data.splits


def test_a_divided_folder_is_taken_as_it_is(tmp_path):
    make_folder(tmp_path / "train", {"a": 10, "b": 10})
    make_folder(tmp_path / "validation", {"a": 2, "b": 3})
    data = load_data(str(tmp_path))
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 20, "val": 5}
    with pytest.raises(InputError, match="has no test split; it has train, val"):
        data.split("test")


def test_validation_is_held_out_where_there_is_none(tmp_path):
    make_folder(tmp_path / "train", {"a": 20, "b": 20})
    make_folder(tmp_path / "test", {"a": 2, "b": 2})
    assert {k: len(s) for k, s in load_data(str(tmp_path)).splits.items()} == {"train": 34, "val": 6, "test": 4}


def test_data_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="no data 'nowhere'"):
        load_data("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no sub-folders"):
        load_data(str(tmp_path / "empty"))
    make_folder(tmp_path / "hollow", {"a": 3})
    (tmp_path / "hollow" / "b").mkdir()
    with pytest.raises(InputError, match=r"hollow/b: no pictures"):
        load_data(str(tmp_path / "hollow"))
    make_folder(tmp_path / "small", {"a": 1, "b": 9})
    small = load_data(str(tmp_path / "small"))
    assert len(small.split("all")) == 10
    with pytest.raises(InputError, match=r"too few pictures of a \(1\).*at least 3"):
        small.split("train")
    make_folder(tmp_path / "odd" / "train", {"a": 3, "b": 3})
    make_folder(tmp_path / "odd" / "val", {"a": 3, "c": 3})
    with pytest.raises(InputError, match="differ in their classes: b; c"):
        load_data(str(tmp_path / "odd"))


def test_augmentation_is_a_function_of_seed_epoch_and_picture():
    samples = load_data("digits").split("train")

    def draw(seed: int, epoch: int, index: int) -> torch.Tensor:
        dataset = ImageDataset(samples, GREY, "affine", seed)
        dataset.set_epoch(epoch)
        return dataset[index][0]

    torch.manual_seed(1)
    first = draw(0, 0, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw(0, 0, 3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(0, 1, 3), first)
    assert not torch.equal(draw(1, 0, 3), first)
    plain = ImageDataset(samples, GREY)
    assert torch.equal(plain[3][0], plain[3][0])
    assert not torch.equal(plain[3][0], first)


def test_an_epoch_s_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int, first: int = 0, rank: int = 0, num_ranks: int = 1) -> list[list[int]]:
        batches = EpochBatches(103, 10, seed, rank, num_ranks)
        batches.start_at(epoch, first)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    flat = [i for batch in order(0, 0) for i in batch]
    assert len(set(flat)) == len(flat) == 100
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 1, first=4) == order(0, 1)[4:]
    shares = zip(order(0, 1, rank=0, num_ranks=2), order(0, 1, rank=1, num_ranks=2), strict=True)
    assert [sorted(a + b) for a, b in shares] == [sorted(batch) for batch in order(0, 1)]
    with pytest.raises(InputError, match="batch_size 10 does not divide by 3 processes"):
        EpochBatches(100, 10, 0, 0, 3)


def test_a_fingerprint_tells_what_changed(tmp_path):
    make_folder(tmp_path / "a", {"cat": 4, "dog": 4})
    make_folder(tmp_path / "b", {"cat": 4, "dog": 4})
    before = load_data(str(tmp_path / "a")).fingerprint()
    assert load_data(str(tmp_path / "b")).fingerprint() == before
    (tmp_path / "a" / "cat").rename(tmp_path / "a" / "zebra")
    after = load_data(str(tmp_path / "a")).fingerprint()
    assert after["class_names"] == ["dog", "zebra"]
    assert after["all"] != before["all"]


def test_a_class_may_be_called_train(tmp_path):
    assert load_data(str(make_folder(tmp_path / "vehicles", {"bus": 5, "train": 5}))).class_names == ("bus", "train")
    make_folder(tmp_path / "val", {"a": 3})
    make_folder(tmp_path / "validation", {"a": 3})
    with pytest.raises(InputError, match="both val and validation"):
        load_data(str(tmp_path))


def test_16_bit_pictures_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    np.testing.assert_array_equal(np.asarray(GREY.load(tmp_path / "ramp.png")), ramp >> 8)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match=r"float.tiff: holds floating-point numbers"):
        GREY.load(tmp_path / "float.tiff")


def test_pictures_like_threads_are_refused(tmp_path):
    Image.new("L", (6000, 1)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match=r"thread.png: 6000x1 pixels is too long and thin"):
        GREY.load(tmp_path / "thread.png")


def test_evaluation_keeps_the_share_of_the_picture_it_says():
    picture = Image.new("L", (100, 100), 0)
    picture.paste(255, (10, 10, 90, 90))  # white but for a border of a tenth
    for crop_pct, share in ((1.0, 0.64), (0.8, 1.0)):
        x = Preprocessing(img_size=(50, 50), mean=(0.0,), std=(1.0,), crop_pct=crop_pct).transform()(picture)
        assert x.mean().item() == pytest.approx(share, abs=0.02)


def test_affine_sees_what_evaluation_sees():
    wide = Image.new("L", (80, 40), 0)
    wide.paste(255, (0, 0, 15, 40))  # a white edge that the centre crop leaves out
    assert GREY.transform()(wide).max() < -0.9
    assert max(GREY.transform("affine")(wide).max().item() for _ in range(20)) < -0.9


def test_seeded_restores_all_generators():
    import random

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded((1, 2)):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_photos_are_cropped_at_random_in_training_only(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "noise.png")
    rgb = Preprocessing(img_size=(32, 24), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    picture = rgb.load(tmp_path / "noise.png")
    assert rgb.transform()(picture).shape == (3, 32, 24)
    assert torch.equal(rgb.transform()(picture), rgb.transform()(picture))
    assert not torch.equal(rgb.transform("crop")(picture), rgb.transform("crop")(picture))


def test_pictures_of_any_mode_become_the_model_s(tmp_path):
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"):
        image = Image.new(mode, (8, 8))
        image.save(path := tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}")
        assert GREY.load(path).mode == "L"
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert GREY.load(clear).getpixel((0, 0)) == 255  # transparent is white


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    for name in ("text.png", "cut.png"):
        with pytest.raises(InputError, match=rf"{name}: not a picture that can be read"):
            GREY.load(tmp_path / name)
    with pytest.raises(InputError, match=r"gone.png: no such file"):
        GREY.load(tmp_path / "gone.png")
    with pytest.raises(InputError, match="1 or 3 channels, not 2"):
        Preprocessing(img_size=(8, 8), mean=(0.5, 0.5), std=(0.5, 0.5))


def test_pixels_undo_the_normalisation():
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(GREY.pixels((x - 0.5) / 0.5), x)
