"""Fast distillation: what is stored is what the teacher said of just those crops, and what training replays."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_data import make_folder
from test_train import MODEL, NONE, RECIPE

from sret import InputError, SReT
from sret.checkpoints.card import Card, save_weights
from sret.data.preprocess import Preprocessing
from sret.data.sampler import SampleIndex
from sret.data.sources import load_data
from sret.training.distillation import soft_labels
from sret.training.distillation.config import Distillation
from sret.training.distillation.precompute import write_soft_labels
from sret.training.distillation.soft_labels import SoftLabelDataset
from sret.training.distillation.teacher import Teacher
from sret.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_report")

GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.25,))
OPTIONS = {"crops": 2, "top_k": 4, "batch_size": 32, "seed": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Distillation:
    """A random model of another normalisation, with a temperature."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(1)
    model = SReT(replace(MODEL, drop_rate=0.0, drop_path_rate=0.0))
    torch.nn.init.normal_(model.head.weight, std=2.0)  # with an opinion
    save_weights(path, model.state_dict(), Card(config=model.config, preprocessing=GREY))
    return Distillation(teacher=str(path), temperature=2.0)


@pytest.fixture(scope="module")
def labels(teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "digits"
    assert list(write_soft_labels(out, "digits", teacher, **OPTIONS)) == [(1, 2), (2, 2)]
    return out


@pytest.fixture(scope="module")
def replayed(labels) -> SoftLabelDataset:
    return SoftLabelDataset(labels, load_data("digits"), GREY)


def test_a_replayed_image_gets_the_teacher_s_prediction_for_it(replayed, teacher):
    """The online teacher, asked about what the student is shown, answers what was stored: exactly the crop."""
    from sret.checkpoints.card import load_weights

    online = Teacher(load_weights(teacher.teacher)[0], GREY, 1, teacher.temperature)
    for index in (0, 7, 1000, 1221):  # of both shards
        for epoch in range(2):
            image, target, errors = replayed[SampleIndex(index, epoch)]
            answer = online(image[None])[0]
            kept = answer.topk(4).indices
            torch.testing.assert_close(target[kept], answer[kept], atol=1e-3, rtol=1e-3)
            others = [k for k in range(10) if k not in kept]
            torch.testing.assert_close(target[others], ((1 - answer[kept].sum()) / 6).expand(6), atol=1e-3, rtol=1e-2)
            torch.testing.assert_close(target.sum(), torch.ones(()))
            assert errors == ""


def test_epochs_take_the_crops_in_turn(replayed):
    first, second, third = (replayed[SampleIndex(5, epoch)] for epoch in range(3))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], third[0])
    assert torch.equal(first[1], third[1])


def test_crops_vary_and_half_are_mirrored(labels):
    shard = load_file(labels / "labels-00000.safetensors")
    assert shard["crops"].shape == (1000, 2, 4)
    top, left, height, width = shard["crops"].unbind(-1)
    assert ((top + height <= 8) & (left + width <= 8) & (height > 0) & (width > 0)).all()
    assert len(shard["crops"].flatten(0, 1).unique(dim=0)) > 50
    assert 0.45 < shard["flips"].float().mean() < 0.55


@pytest.mark.slow
def test_an_interrupted_pass_goes_on_and_a_damaged_shard_is_written_anew(labels, teacher, tmp_path):
    expected = [(labels / name).read_bytes() for name in ("labels-00000.safetensors", "labels-00001.safetensors")]
    passing = write_soft_labels(tmp_path / "out", "digits", teacher, **OPTIONS)
    next(passing)
    passing.close()
    first, second = (soft_labels.shard_path(tmp_path / "out", shard) for shard in range(2))
    assert (first.exists(), second.exists()) == (True, False)
    with pytest.raises(InputError, match=r"1 of 2 shards .*labels-00001.safetensors"):
        SoftLabelDataset(tmp_path / "out", load_data("digits"), GREY)
    list(write_soft_labels(tmp_path / "out", "digits", teacher, **OPTIONS))
    assert [first.read_bytes(), second.read_bytes()] == expected
    damaged = bytearray(expected[0])
    damaged[-5] ^= 1
    first.write_bytes(damaged)
    with pytest.raises(InputError, match=r"damaged: labels-00000.safetensors"):
        SoftLabelDataset(tmp_path / "out", load_data("digits"), GREY)
    written = second.stat().st_mtime_ns
    list(write_soft_labels(tmp_path / "out", "digits", teacher, **OPTIONS))
    assert first.read_bytes() == expected[0]
    assert second.stat().st_mtime_ns == written  # kept


def test_labels_of_other_settings_or_data_are_refused(labels, teacher, tmp_path):
    with pytest.raises(InputError, match="started with other settings: seed was 3, now 4"):
        list(write_soft_labels(labels, "digits", teacher, **{**OPTIONS, "seed": 4}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="already has other files"):
        list(write_soft_labels(tmp_path / "full", "digits", teacher, **OPTIONS))
    for name, value in (("crops", 0), ("top_k", 0), ("min_scale", 0.0)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            list(write_soft_labels(tmp_path / "x", "digits", teacher, **{name: value}))
    other = replace(load_data("digits"), class_names=tuple("abcdefghij"))
    with pytest.raises(InputError, match="holds soft labels of other data"):
        SoftLabelDataset(labels, other, GREY)
    with pytest.raises(InputError, match="no soft labels; `sret soft-labels` writes them"):
        SoftLabelDataset(tmp_path / "nowhere", other, GREY)
    manifest = json.loads((labels / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "novelty": 1}))
    with pytest.raises(InputError, match="damaged, or of another version"):
        SoftLabelDataset(tmp_path, other, GREY)


def test_labels_are_not_written_into_their_data(teacher, tmp_path):
    folder = make_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    with pytest.raises(InputError, match="is inside the data folder"):
        next(write_soft_labels(folder / "labels", str(folder), teacher, **OPTIONS))


@pytest.mark.slow
def test_a_run_learns_from_them_and_mixes_them(labels, tmp_path):
    recipe = replace(RECIPE, soft_labels=labels, augmentation=NONE, label_smoothing=0.0, mixup=0.8, cutmix=1.0)
    train(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    train(recipe, tmp_path / "again", max_steps=3)
    train(recipe, tmp_path / "again", resume="auto")
    expected = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(t, expected[k]) for k, t in load_file(tmp_path / "again" / "last.safetensors").items())


def test_images_that_cannot_be_read_are_skipped_in_both_passes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 255, (30, 20), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    data = load_data(str(tmp_path / "pets"))
    data.split("train").images[1].write_text("no image")
    model = SReT(replace(MODEL, num_classes=2))
    path = tmp_path / "teacher.safetensors"
    save_weights(path, model.state_dict(), Card(config=model.config, preprocessing=GREY))
    pets, pass_ = str(tmp_path / "pets"), {"crops": 1, "top_k": 5}  # of two classes
    with pytest.raises(InputError, match="not an image that can be read"):
        list(write_soft_labels(tmp_path / "strict", pets, Distillation(teacher=str(path)), **pass_))
    with pytest.warns(UserWarning, match=r"skipped \(1 of at most 1\)"):
        list(write_soft_labels(tmp_path / "out", pets, Distillation(teacher=str(path)), max_corrupt=1, **pass_))
    dataset = SoftLabelDataset(tmp_path / "out", data, GREY, max_corrupt=1)
    image, target, errors = dataset[SampleIndex(1, 0)]
    assert "no image" not in errors
    assert "not an image" in errors
    assert torch.equal(image, dataset[SampleIndex(2, 0)][0])
    assert torch.equal(target, dataset[SampleIndex(2, 0)][1])
    good = data.split("train").images[0].read_bytes()
    data.split("train").images[1].write_bytes(good)  # mended since: its answer is still that to no image
    image, target, errors = dataset[SampleIndex(1, 0)]
    assert "image 1 could not be read when its labels were made" in errors
    assert torch.equal(target, dataset[SampleIndex(2, 0)][1])


@pytest.mark.slow
def test_labels_made_anew_at_the_same_place_are_the_new_ones(labels, teacher, tmp_path):
    """In one process: no file of the old ones is still open."""
    for seed in (3, 4):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        list(write_soft_labels(tmp_path / "out", "digits", teacher, **{**OPTIONS, "seed": seed}))
        dataset = SoftLabelDataset(tmp_path / "out", load_data("digits"), GREY)
        crop = dataset.label(0, 0)[0]
        shard = load_file(tmp_path / "out" / "labels-00000.safetensors")
        assert crop == tuple(shard["crops"][0, 0].tolist())
    assert dataset.__getstate__()["files"] == {}


@pytest.mark.slow
def test_a_killed_first_write_does_not_bar_the_folder(teacher, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".manifest.json.tmp").write_text("{")
    next(write_soft_labels(tmp_path / "out", "digits", teacher, **OPTIONS))


def test_a_teacher_that_changed_does_not_go_on(labels, teacher, tmp_path):
    shutil.copytree(labels, tmp_path / "out")
    path = Path(teacher.teacher)
    before = path.read_bytes()
    model = SReT(replace(MODEL, drop_rate=0.0, drop_path_rate=0.0))
    try:
        save_weights(path, model.state_dict(), Card(config=model.config, preprocessing=GREY))
        with pytest.raises(InputError, match="started with other settings: teacher_digest was"):
            list(write_soft_labels(tmp_path / "out", "digits", teacher, **OPTIONS))
    finally:
        path.write_bytes(before)
