import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sret import InputError
from sret.data.config import Augmentation
from sret.data.dataset import ImageData, Samples, warn_of_mirrors
from sret.data.loading import UNREADABLE, ImageDataset, TrainDataset, Unreadable
from sret.data.preprocess import Preprocessing
from sret.data.sampler import SampleIndex
from sret.data.sources import load_data
from sret.errors import InputWarning

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


def test_the_examples_are_test_images():
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
    assert load_data(str(tmp_path)).fingerprint() == data.fingerprint()
    again = load_data(str(tmp_path)).splits
    assert all(list(again[name].images) == list(data.splits[name].images) for name in again)


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


def test_loose_images_of_a_split_are_not_passed_over(tmp_path):
    make_folder(tmp_path / "train", {"a": 3, "b": 3})
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "loose.png")
    with pytest.raises(InputError, match=r"val: its images are not in sub-folders; .* as in .*train"):
        load_data(str(tmp_path))


def test_invalid_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="no data 'nowhere'"):
        load_data("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no sub-folders"):
        load_data(str(tmp_path / "empty"))
    make_folder(tmp_path / "hollow", {"a": 3})
    (tmp_path / "hollow" / "b").mkdir()
    with pytest.raises(InputError, match=r"hollow/b: no images"):
        load_data(str(tmp_path / "hollow"))
    make_folder(tmp_path / "small", {"a": 1, "b": 9})
    small = load_data(str(tmp_path / "small"))
    assert len(small.split("all")) == 10
    with pytest.raises(InputError, match=r"of a \(1\).* at least 3"):
        small.split("train")
    make_folder(tmp_path / "odd" / "train", {"a": 3, "b": 3})
    make_folder(tmp_path / "odd" / "val", {"a": 3, "c": 3})
    with pytest.raises(InputError, match="differ in their classes: b; c"):
        load_data(str(tmp_path / "odd"))


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


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    np.testing.assert_array_equal(np.asarray(GREY.load(tmp_path / "ramp.png")), ramp >> 8)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match=r"float.tiff: has floating-point numbers"):
        GREY.load(tmp_path / "float.tiff")


def test_images_like_threads_are_refused(tmp_path):
    Image.new("L", (6000, 1)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match=r"thread.png: 6000x1 pixels is too narrow"):
        GREY.load(tmp_path / "thread.png")


def test_evaluation_keeps_the_share_of_the_image_it_says():
    image = Image.new("L", (100, 100), 0)
    image.paste(255, (10, 10, 90, 90))  # white but for a border of a tenth
    for crop_pct, share in ((1.0, 0.64), (0.8, 1.0)):
        x = Preprocessing(img_size=(50, 50), mean=(0.0,), std=(1.0,), crop_pct=crop_pct).transform()(image)
        assert x.mean().item() == pytest.approx(share, abs=0.02)


def test_images_of_any_mode_become_the_model_s(tmp_path):
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"):
        image = Image.new(mode, (8, 8))
        image.save(path := tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}")
        assert GREY.load(path).mode == "L"
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert GREY.load(clear).getpixel((0, 0)) == 255  # transparent is white


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    for name in ("text.png", "cut.png"):
        with pytest.raises(InputError, match=rf"{name}: not an image that can be read"):
            GREY.load(tmp_path / name)
    with pytest.raises(InputError, match=r"gone.png: no such file"):
        GREY.load(tmp_path / "gone.png")
    with pytest.raises(InputError, match="1 or 3 channels, not 2"):
        Preprocessing(img_size=(8, 8), mean=(0.5, 0.5), std=(0.5, 0.5))


def test_pixels_undo_the_normalisation():
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(GREY.normalize(x), (x - 0.5) / 0.5)


def test_training_images_are_a_function_of_seed_and_draw():
    samples = load_data("digits").split("train")
    affine = Augmentation(geometry="affine", flip=False)

    def draw(seed: int, *place: int) -> torch.Tensor:
        return TrainDataset(samples, GREY, affine, seed)[SampleIndex(*place)][0]

    torch.manual_seed(1)
    first = draw(0, 3, 0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw(0, 3, 0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(0, 3, 1), first)
    assert not torch.equal(draw(0, 3, 0, 1), first)
    assert not torch.equal(draw(1, 3, 0), first)
    plain = ImageDataset(samples, GREY)
    assert torch.equal(plain[3][0], plain[3][0])
    assert not torch.equal(plain[3][0], first)


def broken_folder(tmp_path: Path) -> ImageData:
    folder = make_folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    for i in (1, 2):
        (folder / "cat" / f"{i:03d}.png").write_text("no image")
    return load_data(str(folder))


def test_evaluation_marks_what_it_cannot_read(tmp_path):
    data = broken_folder(tmp_path)
    rgb = Preprocessing(img_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    items = list(map(ImageDataset(data.split("all"), rgb).__getitem__, range(12)))
    assert [i for i, (_, label, _) in enumerate(items) if label == UNREADABLE] == [1, 2]
    assert [i for i, (_, _, error) in enumerate(items) if "not an image" in error] == [1, 2]


def test_training_takes_the_next_image_for_one_it_cannot_read(tmp_path):
    data = broken_folder(tmp_path)
    rgb = Preprocessing(img_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    none = Augmentation(geometry="none", flip=False)
    dataset = TrainDataset(data.split("all"), rgb, none, max_corrupt=2)
    x, label, errors = dataset[SampleIndex(1, 0)]
    assert torch.equal(x, dataset[SampleIndex(3, 0)][0])
    assert label == 0
    assert [line.partition(":")[0][-7:] for line in errors.splitlines()] == ["001.png", "002.png"]
    assert dataset[SampleIndex(0, 0)][2] == ""
    x, _, errors = TrainDataset(data.split("all"), rgb, none, max_corrupt=1)[SampleIndex(1, 0)]
    assert not x.any()  # a blank: so many errors end the run
    with pytest.raises(InputError, match=r"max_corrupt 1.*001.png.*002.png"):
        Unreadable(1).add([errors], is_quiet=True)


def test_unreadable_images_are_named_once_and_counted():
    unreadable = Unreadable(2)
    with pytest.warns(UserWarning, match=r"a: bad; skipped \(1 of at most 2\)"):
        unreadable.add(["", "a: bad"])
    with pytest.warns(UserWarning, match=r"b: bad; skipped \(2 of at most 2\)"):
        unreadable.add(["a: bad", "a: bad\nb: bad"])
    with pytest.raises(InputError, match=r"max_corrupt 2.* a: bad; b: bad; c: bad"):
        unreadable.add(["c: bad"])


def test_channels_and_crop_are_read_off_the_images():
    def of(*images: Image.Image) -> ImageData:
        return ImageData.of("x", {"all": Samples(images, [0] * len(images))}, ["a"])

    grey, red = Image.new("L", (9, 9)), Image.new("RGB", (9, 9))
    assert (of(grey, grey).in_chans, of(grey, red).in_chans) == (1, 3)
    assert of(red, red).crop_pct == 1.0  # squares of one size
    assert of(red, Image.new("RGB", (10, 10))).crop_pct == 0.875
    assert of(Image.new("RGB", (9, 8))).crop_pct == 0.875
    with pytest.raises(InputError, match="its all split has no images"):
        of()
    with pytest.raises(InputError, match=r"label 1 .* 1 classes"):
        ImageData.of("x", {"all": Samples([grey], [1])}, ["a"])


def test_mirror_images_of_characters_are_warned_of():
    digits, pets = (ImageData("x", {}, names) for names in (("0", "1", "a"), ("cat", "7")))
    with pytest.warns(InputWarning, match="the classes of x are characters, .*set flip of the augmentation to false"):
        warn_of_mirrors(digits, Augmentation())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_mirrors(digits, Augmentation(flip=False))
        warn_of_mirrors(pets, Augmentation())
