"""Computes the features of images, and the accuracy of simple classifiers on them: k-NN and a linear probe.

Features are the input of a model's classifier: C numbers for each image, pooled and normalised. The simple classifiers
are those of Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, arXiv:2104.14294:
k-NN by cosine similarity, and logistic regression. They are fitted on training and validation images, and tested on
test images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from sret.data.dataset import Samples
from sret.data.loading import UNREADABLE, ImageDataset, check_batch
from sret.data.preprocess import Preprocessing, name_of
from sret.data.workers import worker_options
from sret.errors import InputError


@dataclass(frozen=True)
class Features:
    """The features of one image.

    Attributes:
        name: its path, or its index in the data set.
        split: of the data set; None for a list of images.
        label: its class.
        values: (C,) float32; zeros if the image could not be read.
        error: why it could not be read, or empty.
    """

    name: str
    split: str | None
    label: int
    values: np.ndarray
    error: str = ""


class _Pooled(nn.Module):
    """A model without its classifier, for images in 0..1."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.preprocessing = model, preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, C)."""
        model: Any = self.model
        return model.forward_head(model.forward_features(self.preprocessing.normalize(images)), pre_logits=True)


@torch.inference_mode()
def features_of(
    model: nn.Module,
    preprocessing: Preprocessing,
    samples: Samples,
    split: str | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
) -> Iterator[Features]:
    """The features of each image, in order, on the model's device and in its precision.

    Raises `InputError` for a model whose outputs are not finite.
    """
    net = _Pooled(model.eval(), preprocessing)
    device = next(model.parameters()).device
    done = 0
    check_batch(preprocessing, batch_size, len(samples))
    loader = DataLoader(ImageDataset(samples, preprocessing), batch_size, **worker_options(num_workers))
    for images, labels, errors in loader:
        values = net(images.to(device)).float().cpu()
        if not values[labels != UNREADABLE].isfinite().all():
            raise InputError("the model's features are not finite: its weights are damaged")
        for row, error in zip(values.numpy(), errors, strict=True):
            name = samples.names[done] if samples.names else name_of(samples.images[done])
            yield Features(name, split, int(samples.labels[done]), 0 * row if error else row, error)
            done += 1


def knn_accuracy(features: Sequence[Features], neighbours: int) -> float:
    """Top-1 accuracy in percent of a k-NN classifier with cosine similarity on the test images."""
    from sklearn.neighbors import KNeighborsClassifier

    (train, train_labels), (test, test_labels) = _parts(features)
    if neighbours > len(train):
        raise InputError(
            f"{neighbours} neighbours are more than the {len(train)} images to choose them from; use fewer"
        )
    classifier = KNeighborsClassifier(neighbours, metric="cosine").fit(train, train_labels)
    return 100 * float(classifier.score(test, test_labels))


def linear_probe_accuracy(features: Sequence[Features]) -> float:
    """Top-1 accuracy in percent of a logistic regression of standardised features on the test images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train, train_labels), (test, test_labels) = _parts(features)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, train_labels)
    return 100 * float(classifier.score(test, test_labels))


def _parts(features: Sequence[Features]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(features, labels) of the images for fitting, and of the images for testing ("test", or "val" without test)."""
    readable = [f for f in features if not f.error]
    held = "test" if any(f.split == "test" for f in readable) else "val"
    parts = [[f for f in readable if (f.split == held) == is_test] for is_test in (False, True)]
    if not all(parts):
        raise InputError("k-NN and linear probe need training images and test images; give data with two splits")
    return [(np.stack([f.values for f in part]), np.array([f.label for f in part])) for part in parts]
