"""Statistics of predictions against their definitions, and the pages that show them."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from sret import InputError
from sret.data.dataset import ImageData, Samples
from sret.data.loading import UNREADABLE
from sret.data.preprocess import Preprocessing
from sret.inference.drawing import draw_losses
from sret.inference.evaluate import Evaluation, Metrics, Predictions
from sret.inference.png_report import write_png
from sret.inference.report import write_report
from sret.inference.statistics import Statistics, wilson

RGB = Preprocessing(img_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def statistics(labels, classes, confidences, num_classes=3):
    predictions = Predictions(torch.tensor(labels), torch.tensor(classes), torch.tensor(confidences))
    return Statistics.of(predictions, num_classes)


def test_wilson_intervals_solve_their_equation():
    """The bounds p are where |share - p| is 1.96 standard errors of p (Wilson 1927)."""
    for right, count in ((0, 5), (3, 10), (98, 100), (7, 7)):
        for bound in wilson(right, count):
            if 0 < bound < 1:
                distance = abs(right / count - bound)
                assert distance == pytest.approx(1.959964 * (bound * (1 - bound) / count) ** 0.5, rel=1e-5)
    assert wilson(0, 5)[0] == 0
    assert wilson(7, 7)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_images_that_cannot_be_read_are_left_out():
    found = statistics([0, UNREADABLE, 2, 2], [0, 1, 2, 1], [0.9, 0.5, 0.8, 0.7])
    assert found.order.tolist() == [0, 2, 3]
    assert found.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert found.confusions(5) == [(2, 1, 1)]


def test_the_surest_mistakes_come_first_and_then_the_least_sure_right_ones():
    found = statistics([0, 0, 0, 0], [0, 1, 2, 0], [0.9, 0.6, 0.8, 0.4])
    assert found.worst(4).tolist() == [2, 1, 3, 0]


def test_calibration_is_the_accuracy_of_each_tenth_of_confidence():
    found = statistics([0, 0, 0, 1], [0, 1, 0, 1], [0.92, 0.98, 0.55, 1.0])
    (low, low_right, one), (high, high_right, three) = found.calibration()
    assert (low, low_right, one) == pytest.approx((0.55, 1, 1))
    assert (high, high_right, three) == pytest.approx((2.9 / 3, 2 / 3, 3))
    assert found.calibration_error() == pytest.approx((0.45 * 1 + (2.9 / 3 - 2 / 3) * 3) / 4)


@pytest.mark.parametrize(("num_classes", "suffix"), [(3, "html"), (40, "html"), (3, "png"), (40, "png")])
def test_a_page_shows_names_safely_and_the_worst_mistake(tmp_path, num_classes, suffix):
    names = ("<b>cat</b>", *(f"my_class {k}" for k in range(1, num_classes)))
    labels = torch.arange(60) % num_classes
    paths = [tmp_path / f"image {i}.png" for i in range(60)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(path)
    samples = Samples(paths, labels.tolist())
    predictions = Predictions(labels, torch.zeros_like(labels), torch.linspace(0.1, 0.9, 60))
    data = ImageData.of("photos", {"test": samples}, names)
    evaluation = Evaluation(Metrics(50.0, 100.0, 1.0, 60), predictions, data, "test", samples)
    out = tmp_path / f"page.{suffix}"
    write_report(out, evaluation, RGB)
    if suffix == "png":
        assert np.asarray(Image.open(out).convert("L")).std() > 10
    else:
        page = out.read_text()
        assert "<b>cat" not in page
        assert "&lt;b&gt;cat" in page
        assert "my_<wbr>class 1" in page  # where a name may break on a narrow screen
        assert '<meta name="viewport" content="width=device-width' in page
        first_mistake = page.index("image 59.png")
        assert all(page.index(f"image {i}.png") >= first_mistake for i in (56, 58) if f"image {i}.png" in page)
    with pytest.raises(InputError, match=r"\.html or \.png"):
        write_report(tmp_path / "page.pdf", evaluation, RGB)


@pytest.mark.parametrize("losses", [(1.44, 1.52), (0.93, 1.04), (0.9, 2.3), (0.02, 3.0)])
def test_losses_have_ticks_that_are_plain_numbers(losses):
    figure, axes = plt.subplots()
    draw_losses(axes, [{"epoch": k, "train_loss": loss} for k, loss in enumerate(losses)])
    figure.canvas.draw()
    labels = [label.get_text() for which in ("major", "minor") for label in axes.get_yticklabels(which=which)]
    assert sum(losses[0] <= float(label) <= losses[1] for label in labels if label) >= 2
    plt.close(figure)


def test_the_page_of_a_run_has_its_curves_too(tmp_path):
    rows = [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1.2 / epoch, "train_top1": 50.0, "val_top1": top1}
        for epoch, top1 in ((1, 40.0), (2, 60.0), (3, 55.0))
    ]
    samples = Samples([Image.new("L", (8, 8), i) for i in range(6)], [0, 1, 2, 0, 1, 2])
    found = statistics([0, 1, UNREADABLE, 0, 1, 2], [0, 2, 0, 1, 1, 2], [0.9, 0.6, 1.0, 0.8, 0.4, 0.7])
    preprocessing = Preprocessing(img_size=(8, 8), mean=(0.5,), std=(0.5,))
    pages = []
    for name, curves in (("plain", ()), ("run", (rows, rows[1]))):
        path = tmp_path / f"{name}.png"
        write_png(path, "greys", ("a", "b", "c"), found, samples, preprocessing, *curves)
        with Image.open(path) as page:
            assert page.format == "PNG"
            pages.append(page.size)
    assert pages[0][0] == pages[1][0] == 1500
    assert pages[1][1] - pages[0][1] == 340  # the curves, at 100 pixels per inch
