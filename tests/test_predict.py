"""`sret predict` over files, folders and patterns, and its tables."""

import csv
import json
import os

import pytest
import torch
from conftest import small_config
from PIL import Image
from pyarrow import parquet

from sret import InputError, SReT
from sret.checkpoints.card import Card, save_weights
from sret.cli.main import main
from sret.data.preprocess import Preprocessing
from sret.inference.predict import find_images, predict

CARD = Card(
    config=small_config(num_classes=3),
    class_names=("a", "b", "c"),
    preprocessing=Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3),
)


@pytest.fixture
def photos(tmp_path):
    """Seven images, one of them with a name that is not UTF-8, a hidden one, and a file that is not an image."""
    root = tmp_path / "photos"
    for name in ("b/2.jpg", "b/1.PNG", "a/x.webp", "top.jpg", "b/.hidden/y.jpg", "b/c/z.jpg", "a/n\nl.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        color = tuple(hash(name) // 256**i % 256 for i in range(3))
        Image.new("RGB", (70, 90), color).save(path, path.suffix[1:].lower().replace("jpg", "jpeg"))
    Image.new("RGB", (70, 90)).save(os.fsencode(root / "a") + b"/caf\xe9.jpg")
    (root / "b" / "bad.jpg").write_text("not an image")
    return root


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, SReT(CARD.config).state_dict(), CARD)
    return path


def test_folders_patterns_and_files_name_each_image_once(photos):
    found = find_images([photos / "top.jpg", photos, f"{photos}/**/[12].*", photos / "gone.jpg"])
    names = [os.fsencode(path.relative_to(photos)) for path in found]
    expected = [b"top.jpg", b"a/caf\xe9.jpg", b"a/n\nl.png", b"a/x.webp", b"b/1.PNG", b"b/2.jpg", b"b/bad.jpg"]
    assert sorted(names) == sorted([*expected, b"b/c/z.jpg", b"gone.jpg"])
    assert names[0] == b"top.jpg"
    assert names[-1] == b"gone.jpg"
    (photos / "empty").mkdir()
    for given, problem in ((photos / "empty", "has no images"), (f"{photos}/*.tiff", "no file matches")):
        with pytest.raises(InputError, match=problem):
            find_images([given])


def test_a_batch_gives_each_image_the_prediction_it_gets_alone(photos):
    model = SReT(CARD.config).eval()
    paths = find_images([photos])
    alone, together = (list(predict(model, CARD, paths, batch_size=size)) for size in (1, 5))
    assert [p.path for p in together] == paths
    for one, other in zip(alone, together, strict=True):
        assert one.error == other.error
        assert dict(one.classes) == pytest.approx(dict(other.classes))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_has_a_row_for_every_image(photos, checkpoint, tmp_path, suffix, capsys):
    out = tmp_path / f"table.{suffix}"
    assert main(["predict", str(photos), "--checkpoint", str(checkpoint), "--top_k", "5", "--out", str(out)]) == 1
    if suffix == "csv":
        rows = list(csv.DictReader(out.open(newline="")))
    else:
        text = out.read_text() if suffix == "jsonl" else ""
        rows = list(map(json.loads, text.splitlines())) or parquet.read_table(out).to_pylist()
    assert len(rows) == 8
    for row in rows:
        if row["error"]:
            assert row["image"].endswith("bad.jpg")
            assert not row["class_1"]
        else:
            assert sum(float(row[f"confidence_{k}"]) for k in (1, 2, 3)) == pytest.approx(1)
            assert row["prediction"] == row["class_1"]
    assert {row["image"].rpartition("/")[2] for row in rows} >= {r"caf\xe9.jpg", r"n\nl.png"}
    captured = capsys.readouterr()
    assert "8 images in" in captured.out
    assert "1 of them could not be read" in captured.out


def test_a_prediction_below_the_least_confidence_is_unsure(photos, checkpoint, capsys):
    image = str(photos / "top.jpg")
    for least, is_unsure in (("0.0", False), ("1.0", True)):
        command = ["predict", image, "--checkpoint", str(checkpoint), "--min_confidence", least]
        assert main(command) == 0
        assert ("unsure" in capsys.readouterr().out) == is_unsure
        assert main([*command, "--json"]) == 0
        assert (json.loads(capsys.readouterr().out)["prediction"] == "unsure") == is_unsure


def test_a_table_of_another_kind_is_refused_before_any_work(photos, checkpoint, tmp_path, capsys):
    assert main(["predict", "gone", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "table.xls")]) == 2
    assert ".parquet" in capsys.readouterr().err


def test_outputs_that_are_not_finite_are_refused(photos):
    model = SReT(CARD.config).eval()
    torch.nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(InputError, match="not finite"):
        list(predict(model, CARD, [photos / "top.jpg"]))
