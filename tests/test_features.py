"""`sret features`: the table, and scores that separate what can be separated."""

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from pyarrow import parquet

from sret import InputError, SReT
from sret.checkpoints.card import Card, save_weights
from sret.cli.main import main
from sret.data.dataset import Samples
from sret.data.preprocess import Preprocessing
from sret.inference.features import Features, features_of, knn_accuracy, linear_probe_accuracy

RGB = Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def photos(tmp_path):
    """Ten red and ten blue images, a folder each, and one file that is not an image."""
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 80, (70, 70, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.safetensors"
    config = small_config(num_classes=2)
    save_weights(path, SReT(config).state_dict(), Card(config=config, preprocessing=RGB))
    return path


def test_features_are_what_the_classifier_takes(photos):
    model = SReT(small_config()).eval()
    paths = sorted(photos.rglob("*.png"))[:3]
    found = list(features_of(model, RGB, Samples(paths, [0] * 3), batch_size=2))
    images = torch.stack([RGB.normalize(RGB.transform()(RGB.load(path))) for path in paths])
    model.reset_classifier(0)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(torch.tensor(np.stack([f.values for f in found])), expected)


def test_a_table_of_a_data_set_and_its_scores(photos, checkpoint, tmp_path, capsys):
    (photos / "red" / "bad.png").write_text("not an image")
    out = tmp_path / "features.parquet"
    command = ["features", "--data", str(photos), "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main([*command, "--knn", "3", "--linear_probe"]) == 1  # for the file that is not an image
    rows = parquet.read_table(out).to_pylist()
    assert len(rows) == 20
    assert {row["class"] for row in rows} == {"red", "blue"}
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert {len(row["feature"]) for row in rows} == {64}
    printed = capsys.readouterr()
    assert "bad.png" in printed.err
    assert printed.out.count("top-1 100.00 %") == 2


def test_a_table_of_files_has_no_classes(photos, checkpoint, tmp_path, capsys):
    out = tmp_path / "features.csv"
    command = ["features", str(photos / "red"), "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main(command) == 0
    header, *rows = out.read_text().splitlines()
    assert header.startswith("image,split,class,feature_0,")
    assert len(rows) == 10
    assert main([*command, "--knn", "3"]) == 2
    assert f"--data {photos / 'red'}" in capsys.readouterr().err


def test_scores_are_measured_on_the_test_images():
    def of(split, label, value):
        return Features("", split, label, np.array([value, 1.0]))

    fitted = [of("train", label, value) for label, value in ((0, -2.0), (0, -1.0), (1, 1.0), (1, 2.0))]
    tested = [of("test", 0, -3.0), of("test", 1, 3.0), of("test", 0, 3.0), of("test", 1, 2.5)]
    assert knn_accuracy([*fitted, *tested], 1) == 75
    assert linear_probe_accuracy([*fitted, *tested]) == 75
    with pytest.raises(InputError, match="9 neighbours"):
        knn_accuracy([*fitted, *tested], 9)
    with pytest.raises(InputError, match="two splits"):
        knn_accuracy(fitted, 1)
