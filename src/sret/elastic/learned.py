"""A learned score for early exit: the probability that an image loses nothing by leaving.

    s_k = sigmoid(w_k0 + w_k1 p1 + w_k2 (p1 - p2) + w_k3 H / log C + w_k4 o)

p1, p2 are the largest two probabilities at exit k, H is their entropy, and o the overlap with those at the exit before,
sum_c min(p_k(c), p_{k-1}(c)), 0 at the first exit. A logistic regression for each exit but the last is fitted after the
training, on labelled images, so that the weights and logits of the model stay as they are:

    min_w  sum_i BCE(s_k(i), y_k(i)) + L2 / 2 |w_k|^2
    y_k(i) = 1 if the prediction of exit k is right, or equal to that of the last exit

Source of the idea: a policy learned for each exit of a trained network, Bolukbasi, Wang, Dekel, Saligrama, "Adaptive
Neural Networks for Efficient Inference", ICML 2017, arXiv:1702.07811. Deviation: there the targets weigh cost against
loss; here a threshold does, so that one fit serves every accepted loss.
Letters: E exits, N images, K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from sret.errors import InputError

Coefficients = tuple[tuple[float, ...], ...]  # for each exit but the last: w_k0, ..., w_k4
NUM_COEFFICIENTS = 5
MIN_IMAGES = 100  # to fit: 10 for each coefficient, in each half
L2 = 0.01  # weak: it bounds the coefficients where all images of an exit have the same target
TINY = 1e-30  # 0 log 0 is 0


def overlap(probabilities: Tensor, before: Tensor | None) -> Tensor:
    """1 minus the total variation distance of (N, K) probabilities: (N,) in 0..1; 0 if there is no exit before."""
    if before is None:
        return torch.zeros_like(probabilities[:, 0])
    return probabilities.minimum(before).sum(1).clamp(max=1)


def learned_score(probabilities: Tensor, before: Tensor | None, coefficients: Sequence[float]) -> Tensor:
    """(N, K) probabilities at an exit, and at the exit before, None at the first -> (N,) scores in 0..1."""
    constant, *weights = coefficients
    total = torch.full_like(probabilities[:, 0], constant)
    for weight, feature in zip(weights, _features(probabilities, before), strict=True):
        total = total + weight * feature
    return total.sigmoid()


def _features(probabilities: Tensor, before: Tensor | None) -> list[Tensor]:
    top = probabilities.topk(min(2, probabilities.shape[1])).values
    entropy = -(probabilities * probabilities.clamp(min=TINY).log()).sum(1)
    log_classes = math.log(max(2, probabilities.shape[1]))
    return [top[:, 0], top[:, 0] - top[:, -1], entropy / log_classes, overlap(probabilities, before)]


def fit(logits: Tensor, labels: Tensor) -> Coefficients:
    """Fits the coefficients of all exits but the last: (E, N, K) logits, the deepest last, and (N,) int64 labels."""
    probabilities, predicted = logits.float().softmax(2), logits.argmax(2)
    found = []
    for k in range(len(logits) - 1):
        x = torch.stack(_features(probabilities[k], probabilities[k - 1] if k else None), 1).double()  # (N, 4)
        x = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        found.append(_regression(x, (predicted[k] == labels) | (predicted[k] == predicted[-1])))
    return tuple(found)


def _regression(x: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Logistic regression by L-BFGS: features (N, F) and targets (N,) -> F coefficients. It draws no numbers."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(x @ weights, targets.double())
        loss = loss + L2 / (2 * len(x)) * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return tuple(weights.tolist())


def check_coefficients(coefficients: Coefficients) -> None:
    """Raises `InputError` unless each exit has `NUM_COEFFICIENTS` numbers, of a size that a fit gives."""
    for k, row in enumerate(coefficients):
        if len(row) != NUM_COEFFICIENTS or not all(abs(value) < 1e6 for value in row):  # nan is not
            raise InputError(
                f"coefficients of exit {k + 1} are {list(row)}; they must be {NUM_COEFFICIENTS} numbers between -1e6 "
                "and 1e6"
            )
