"""Computes statistics of predictions: accuracy per class, confusions, calibration, confidence intervals.

Sources: Wilson, "Probable inference, the law of succession, and statistical inference", 1927; Guo et al., "On
calibration of modern neural networks", ICML 2017, arXiv:1706.04599 (expected calibration error, equal bins).
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from sret.data.loading import UNREADABLE
from sret.inference.evaluate import Predictions

Z = 1.959964  # of a 95 % interval
BINS = 10  # of confidence


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy of `right` in `count` images, in 0..1; (0, 1) without images."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, Z * Z / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * sqrt(share * (1 - share) / count + z2 / count / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the predictions for N readable images of K classes.

    Attributes:
        order: (N,) indices of the images in the data.
        truth, predicted: (N,) true and predicted classes.
        confidence: (N,) probability of the predicted class.
        confusion: (K, K) counts, true class by predicted class.
    """

    order: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    confusion: np.ndarray

    @classmethod
    def of(cls, predictions: Predictions, num_classes: int) -> "Statistics":
        """The statistics of predictions, without the images that could not be read."""
        order = np.flatnonzero(predictions.labels.numpy() != UNREADABLE)
        truth, predicted = predictions.labels.numpy()[order], predictions.classes.numpy()[order]
        confusion = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(confusion, (truth, predicted), 1)
        return cls(order, truth, predicted, predictions.confidences.numpy()[order], confusion)

    @property
    def is_right(self) -> np.ndarray:
        """(N,) whether each prediction is correct."""
        return self.truth == self.predicted

    def worst(self, count: int) -> np.ndarray:
        """Indices of the worst predictions: most confident mistakes, then least confident correct predictions."""
        return np.where(self.is_right, 1 + self.confidence, 1 - self.confidence).argsort(kind="stable")[:count]

    def calibration(self) -> list[tuple[float, float, int]]:
        """(mean confidence, accuracy, number of images) of each of ten bins of confidence that has images."""
        bins = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        return [
            (float(self.confidence[bins == b].mean()), float(self.is_right[bins == b].mean()), int((bins == b).sum()))
            for b in np.unique(bins)
        ]

    def calibration_error(self) -> float:
        """Expected calibration error, in 0..1: the mean difference between confidence and accuracy."""
        return sum(abs(confidence - right) * n for confidence, right, n in self.calibration()) / len(self.truth)

    def confusions(self, count: int) -> list[tuple[int, int, int]]:
        """(true class, predicted class, number of images) of the most frequent mistakes."""
        wrong = self.confusion * (1 - np.eye(len(self.confusion), dtype=np.int64))
        ranked = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(ranked, wrong.shape), strict=True)]
        return [(i, j, int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
