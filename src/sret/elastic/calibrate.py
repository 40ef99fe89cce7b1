"""Says what each threshold of an exit policy gives on labelled images: accuracy, cost, and where images leave.

Letters: E exits, N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sret.elastic.learned import MIN_IMAGES, fit
from sret.elastic.policy import Criterion, ExitPolicy
from sret.errors import InputError

THRESHOLDS = (*(i / 20 for i in range(19)), 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True)
class Outcome:
    """What a threshold gives.

    Attributes:
        top1: top-1 accuracy in percent.
        share: mean MACs of an image, as a share of those of an image that reaches the last exit.
        counts: how many images leave at each exit.
    """

    threshold: float
    top1: float
    share: float
    counts: tuple[int, ...]


def scores_of(policy: ExitPolicy, logits: Tensor) -> Tensor:
    """(E, N, K) logits at all exits, the deepest last -> (E, N) scores; those of the last exit are above 1."""
    probabilities = logits.float().softmax(2)
    pairs = enumerate(probabilities[:-1])
    scores = [policy.score(p, probabilities[k - 1] if k else None, k) for k, p in pairs]
    return torch.stack([*scores, torch.full_like(probabilities[-1, :, 0], 2)])  # all leave at the last exit


def fitted(criterion: Criterion, logits: Tensor, labels: Tensor) -> tuple[ExitPolicy, Tensor]:
    """The policy of a criterion, with threshold 1, and the (E, N) scores to choose a threshold by.

    For "learned", the scores of an image come from coefficients that were fitted on the other half of the images
    (every second one), because those fitted on the image itself would promise a smaller loss than new images have. The
    policy has the coefficients fitted on all images.

    Args:
        logits: (E, N, K) at all exits, the deepest last.
        labels: (N,) int64.

    Raises `InputError` for too few images to fit on.
    """
    if criterion != "learned":
        policy = ExitPolicy(criterion=criterion, threshold=1)
        return policy, scores_of(policy, logits)
    if len(labels) < MIN_IMAGES:
        raise InputError(f"{len(labels)} images; the criterion learned is fitted on {MIN_IMAGES} or more")
    scores = torch.empty(logits.shape[:2])
    for half in (0, 1):
        one, other = slice(half, None, 2), slice(1 - half, None, 2)
        scores[:, one] = scores_of(_learned(logits[:, other], labels[other]), logits[:, one])
    return _learned(logits, labels), scores


def _learned(logits: Tensor, labels: Tensor) -> ExitPolicy:
    return ExitPolicy(criterion="learned", threshold=1, coefficients=fit(logits, labels))


def outcomes(
    scores: Tensor, is_correct: Tensor, exit_macs: Sequence[int], thresholds: Sequence[float] = THRESHOLDS
) -> list[Outcome]:
    """The outcome of each threshold.

    Args:
        scores: (E, N), as `scores_of` gives.
        is_correct: (E, N) bool, the predictions at all exits.
        exit_macs: MACs up to each exit, as in `ModelCost`.
    """
    macs = torch.tensor(exit_macs, dtype=torch.float64)
    found = []
    for threshold in thresholds:
        exits = (scores > threshold).int().argmax(0)  # the first one
        top1 = 100 * is_correct.gather(0, exits[None]).double().mean().item()
        share = (macs[exits].mean() / macs[-1]).item()
        found.append(Outcome(threshold, top1, share, tuple(exits.bincount(minlength=len(scores)).tolist())))
    return found


def representative(scores: Tensor, count: int) -> list[int]:
    """The numbers of `count` images, or of all, that are easy and hard in the proportion of all images.

    They are evenly spaced in the order of the mean score. `scores`: (E, N), as `scores_of` gives.
    """
    order = scores.mean(0).argsort(stable=True)
    return order[torch.linspace(0, len(order) - 1, min(count, len(order))).long()].tolist()


def acceptable(found: Sequence[Outcome], max_drop: float) -> list[Outcome]:
    """The outcomes whose accuracy is at most `max_drop` points below that of threshold 1, which is one of them."""
    whole = next(outcome for outcome in found if outcome.threshold == 1)
    return [outcome for outcome in found if outcome.top1 >= whole.top1 - max_drop]
