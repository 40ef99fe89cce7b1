"""Images as people have them: turned by the camera, 16 bits, huge; folders with other names, links and other files."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sret import InputError, ModelConfig, StageConfig
from sret.checkpoints.card import load_weights
from sret.cli.main import main
from sret.data import image_files
from sret.data.config import Augmentation
from sret.data.image_files import find_image_files
from sret.data.preprocess import Encoded, Preprocessing
from sret.data.sources import load_data
from sret.data.sources.folder import split_of_folder
from sret.errors import InputWarning
from sret.training.config import TrainConfig
from sret.training.loop import train

GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))
RGB = Preprocessing(img_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
UPRIGHT = Image.fromarray(np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) // 8 * 8)
# What each EXIF orientation asks for, as the steps that undo it.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # stored so; ROTATE_270 makes it upright
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def make_class(folder, *names, size=(12, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (i, 2 * i, 100)).save(folder / name)


# pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_a_photo_is_upright_however_the_camera_was_held(tmp_path, orientation, kind):
    turn = TURNS[orientation]
    stored = UPRIGHT if turn is None else UPRIGHT.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    path = tmp_path / "photo.png"
    source = path if kind == "file" else Encoded("row 1", path.read_bytes())
    assert GREY.load(source).tobytes() == UPRIGHT.tobytes()
    as_stored = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,), exif_orientation=False)
    assert as_stored.load(source).tobytes() == stored.tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_have_one_scale_however_dark_the_image(tmp_path, suffix):
    dark = np.full((8, 8), 300, np.uint16)
    path = tmp_path / f"dark.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5\n8 8\n65535\n" + dark.astype(">u2").tobytes())
    else:
        Image.fromarray(dark).save(path)
    assert np.asarray(GREY.load(path)).tolist() == [[1] * 8] * 8  # 300 of 65,535 is 1 of 255
    dark[0, 0] = 200  # another maximum or minimum changes nothing else
    Image.fromarray(dark).save(tmp_path / "other.png")
    assert np.asarray(GREY.load(tmp_path / "other.png"))[1, 1] == 1


def test_integers_of_32_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(InputError, match=r"wide\.tif: has 32-bit integers"):
        GREY.load(tmp_path / "wide.tif")


def test_more_pixels_than_the_limit_are_refused_or_decoded_smaller(tmp_path, monkeypatch):
    image = Image.new("RGB", (400, 300), (200, 100, 50))
    for suffix in ("png", "jpg"):
        image.save(tmp_path / f"large.{suffix}")
    monkeypatch.setenv("SRET_MAX_PIXELS", "50000")
    with pytest.raises(InputError, match=r"400x300 pixels are more than 50,000.*SRET_MAX_PIXELS"):
        RGB.load(tmp_path / "large.png")
    assert RGB.load(tmp_path / "large.jpg").size == (200, 150)
    monkeypatch.setenv("SRET_MAX_PIXELS", "200000")
    assert RGB.load(tmp_path / "large.png").size == (400, 300)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        RGB.load(tmp_path / "pipe.png")
    assert find_image_files(tmp_path) == []


# folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "training_set", "trainset", "seg_train")),
        *((name, "val") for name in ("val", "Valid", "validation-set", "dev", "images_val")),
        *((name, "test") for name in ("test", "Test", "testing", "test set", "testset")),
        *((name, None) for name in ("trains", "steam_train", "contest", "set", "cat", "train_test", "")),
    ],
)
def test_names_of_splits(name, split):
    assert split_of_folder(name) == split


def test_folders_of_splits_are_found_whatever_their_case_and_nesting(tmp_path):
    for split in ("seg_train/seg_train", "seg_test/seg_test"):
        for name in ("cat", "dog"):
            make_class(tmp_path / split / name, *(f"{i}.png" for i in range(4)))
    data = load_data(str(tmp_path))
    assert set(data.source_splits) == {"train", "test"}
    assert data.class_names == ("cat", "dog")
    make_class(tmp_path / "loose" / "Train", "1.png")
    make_class(tmp_path / "loose" / "dev" / "cat", "1.png")
    with pytest.raises(InputError, match="Train: its images are not in sub-folders"):
        load_data(str(tmp_path / "loose"))


def test_hidden_and_system_folders_are_no_data_at_any_depth(tmp_path):
    for name in ("cat", "dog"):
        make_class(tmp_path / name, "1.png", "2.png", "3.png")
        for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbs/deep"):
            make_class(tmp_path / name / hidden, "copy.png")
    make_class(tmp_path / "__MACOSX" / "cat", "1.png")
    data = load_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert len(data.split("all")) == 6


def test_linked_folders_are_followed_once(tmp_path):
    make_class(tmp_path / "elsewhere", "1.jpg", "2.jfif")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "cat")
    assert [path.name for path in find_image_files(tmp_path / "cat")] == ["1.jpg", "2.jfif"]


def test_files_that_are_passed_over_are_counted_by_kind_with_a_cure(tmp_path):
    for name in ("cat", "dog"):
        make_class(tmp_path / name, "1.png", "2.png", "3.png")
    for name in ("a.heic", "b.HEIC", "clip.mp4", "notes.txt"):
        (tmp_path / "cat" / name).write_text("x")
    (tmp_path / "dog" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    with pytest.warns(InputWarning, match=r"4 files skipped.*2 \.heic \(pip install pillow-heif\)") as warned:
        load_data(str(tmp_path))
    text = str(warned[0].message)
    assert "1 .mp4" in text
    assert "1 broken link" in text
    assert "notes" not in text


def test_a_photo_that_needs_another_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "image_suffixes", frozenset)
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match=r"a.HEIC: not an image that can be read \(pip install pillow-heif\)"):
        RGB.load(tmp_path / "a.HEIC")


def test_unequal_classes_give_a_warning_and_can_be_balanced(tmp_path, capsys):
    make_class(tmp_path / "photos" / "common", *(f"{i}.png" for i in range(60)))
    make_class(tmp_path / "photos" / "rare", *(f"{i}.png" for i in range(6)))
    stages = "[{embed_dim: 16, num_heads: 1, num_blocks: 1, groups: [1], mlp_ratio: 2.0}]"
    options = ["--model.img_size=16", f"--model.stages={stages}", "--epochs", "1", "--batch_size", "8"]
    train_photos = ["train", "--data", str(tmp_path / "photos"), *options, "--max_steps", "1"]
    assert main([*train_photos, "--out", str(tmp_path / "plain")]) == 0
    plain = capsys.readouterr()
    assert "; from 4 (class rare) to 41 (class common) in train" in plain.out
    assert "classes have 4 to 41 training images" in plain.err
    assert main([*train_photos, "--class_balance", "1", "--out", str(tmp_path / "balanced")]) == 0
    assert "classes have" not in capsys.readouterr().err
    weights = [load_file(tmp_path / run / "last.safetensors")["head.weight"] for run in ("plain", "balanced")]
    assert not torch.equal(*weights)


def test_grey_images_among_colour_ones_give_a_warning(tmp_path):
    for name in ("cat", "dog"):
        make_class(tmp_path / name, *(f"{i}.png" for i in range(5)))
    Image.new("L", (12, 10)).save(tmp_path / "cat" / "grey.png")
    with pytest.warns(InputWarning, match="1 of 11 .* grey"):
        assert load_data(str(tmp_path)).in_chans == 3


def test_names_that_are_not_utf8_are_trained_on_and_evaluated(tmp_path, capsys):
    photos = tmp_path / "photos"
    for folder in (b"caf\xe9", b"the\n\x1b[31m"):
        path = os.fsencode(photos) + b"/" + folder
        os.makedirs(path)
        for i in range(8):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (i, 0, 250 if folder[0] == 99 else 0)).save(buffer, "PNG")
            with open(path + b"/\xff%d.png" % i, "wb") as file:
                file.write(buffer.getvalue())
    out = str(tmp_path / "run")
    stages = "[{embed_dim: 16, num_heads: 1, num_blocks: 1, groups: [1], mlp_ratio: 2.0}]"
    model = ["--model.img_size=32", "--model.stem_stride=8", f"--model.stages={stages}"]
    options = ["--epochs", "1", "--batch_size", "4", "--augmentation.geometry", "none"]
    assert main(["train", "--data", str(photos), *model, *options, "--out", out]) == 0
    assert main(["eval", "--checkpoint", f"{out}/best.safetensors"]) == 0
    assert main(["predict", str(photos), "--checkpoint", f"{out}/best.safetensors"]) == 0
    printed = capsys.readouterr()
    assert r"caf\xe9" in printed.out
    assert "\x1b[31m" not in printed.out


def test_a_run_trains_on_photos_as_they_are_stored_where_it_says_so(tmp_path):
    """Wide photos that EXIF turns tall: the checkpoint keeps which of them it was trained on."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (48, 32), (i, 0, 200)).save(tmp_path / "photos" / name / f"{i}.png", exif=exif)
    stage = StageConfig(embed_dim=16, num_heads=1, num_blocks=1, groups=(1,), mlp_ratio=2.0)
    for choice in (True, False):
        recipe = TrainConfig(
            model=ModelConfig(stages=(stage,), img_size=32, num_classes=2),
            data=str(tmp_path / "photos"),
            exif_orientation=choice,
            epochs=1,
            batch_size=4,
            augmentation=Augmentation(geometry="none"),
        )
        _, card = load_weights(train(recipe, tmp_path / str(choice)))
        size = card.preprocessing.load(tmp_path / "photos" / "cat" / "1.png").size
        assert size == ((32, 48) if choice else (48, 32))
