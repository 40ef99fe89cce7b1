"""What predictions say beyond their accuracy: per class, confusions, calibration; with intervals.

Sources: Wilson, "Probable inference, the law of succession, and statistical inference", 1927; Guo et al., "On
calibration of modern neural networks", ICML 2017, arXiv:1706.04599 (expected calibration error, equal bins).
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from sret.data.loading import UNREADABLE
from sret.inference.evaluate import Predictions

Z = 1.959964  # of 95 %
BINS = 10


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, in 0..1, from `right` of `count`; (0, 1) for none."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, Z * Z / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * sqrt(share * (1 - share) / count + z2 / count / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Statistics:
    """Of N readable images and K classes.

    Attributes:
        order: (N,) places of the images in the data.
        truth, predicted: (N,) classes.
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
        order = np.flatnonzero(predictions.labels.numpy() != UNREADABLE)
        truth, predicted = predictions.labels.numpy()[order], predictions.classes.numpy()[order]
        confusion = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(confusion, (truth, predicted), 1)
        return cls(order, truth, predicted, predictions.confidences.numpy()[order], confusion)

    @property
    def is_right(self) -> np.ndarray:
        return self.truth == self.predicted

    def worst(self, count: int) -> np.ndarray:
        """Rows to look at: the surest mistakes first; where there are few, the least certain right predictions."""
        return np.where(self.is_right, 1 + self.confidence, 1 - self.confidence).argsort(kind="stable")[:count]

    def calibration(self) -> list[tuple[float, float, int]]:
        """(mean confidence, accuracy, images) of each tenth of 0..1 that has images."""
        bins = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        return [
            (float(self.confidence[bins == b].mean()), float(self.is_right[bins == b].mean()), int((bins == b).sum()))
            for b in np.unique(bins)
        ]

    def calibration_error(self) -> float:
        """Expected calibration error, in 0..1: the mean distance between confidence and accuracy."""
        return sum(abs(confidence - right) * n for confidence, right, n in self.calibration()) / len(self.truth)

    def confusions(self, count: int) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) of the most frequent mistakes."""
        wrong = self.confusion * (1 - np.eye(len(self.confusion), dtype=np.int64))
        ranked = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(ranked, wrong.shape), strict=True)]
        return [(i, j, int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
