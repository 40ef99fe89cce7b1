"""Decides at which exit an image leaves: it is confident, it agrees with the exit before, or by a learned score.

    confidence   max_c p_k(c) > threshold
    agreement    sum_c min(p_k(c), p_{k-1}(c)) > threshold     1 minus the total variation distance; 0 at the first exit
    learned      sigmoid(w_k . features) > threshold           a logistic regression for each exit: `learned.py`

p_k are the probabilities at exit k. All scores are in 0..1. With threshold 1 no image leaves before the last exit,
because a score is never above 1.

Sources: confidence as in MSDNet, Huang et al., ICLR 2018, arXiv:1703.09844; agreement of consecutive exits as in PABEE,
Zhou et al., NeurIPS 2020, arXiv:2006.04152 (there: equal classes; here: a distance, which a threshold can be chosen
for).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sret.elastic.learned import Coefficients, check_coefficients, learned_score, overlap
from sret.errors import InputError
from sret.ranges import ClosedUnitInterval, check_fields

Criterion = Literal["confidence", "agreement", "learned"]


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """When images leave.

    Attributes:
        criterion: "confidence", "agreement" or "learned".
        threshold: 0 to 1; an image leaves at the first exit whose score is above it. With 1 no image leaves early.
        coefficients: of "learned", as `fit` gives them; empty for the others.

    Raises `InputError` for another criterion, a threshold outside 0 to 1, and coefficients that do not fit.
    """

    criterion: Criterion = "confidence"
    threshold: ClosedUnitInterval
    coefficients: Coefficients = ()

    def __post_init__(self) -> None:
        if isinstance(self.coefficients, list):  # from a file
            rows = (tuple(row) if isinstance(row, list) else row for row in self.coefficients)
            object.__setattr__(self, "coefficients", tuple(rows))
        check_fields(self)
        check_coefficients(self.coefficients)
        if self.criterion == "learned" and not self.coefficients:
            raise InputError(
                "the criterion learned needs coefficients; fit them: sret calibrate-exit --criterion learned"
            )
        if self.criterion != "learned" and self.coefficients:
            raise InputError(f"coefficients belong to the criterion learned, not to {self.criterion}")

    def __str__(self) -> str:
        """In words, such as "confidence above 0.9"."""
        return "no image leaves early" if self.threshold == 1 else f"{self.criterion} above {self.threshold:g}"

    def fits(self, count: int) -> bool:
        """Whether a model with `count` exits, the last included, can use the policy."""
        return not self.coefficients or len(self.coefficients) == count - 1

    def check_exits(self, count: int) -> None:
        """Raises `InputError` if the policy was fitted for another number of exits than `count`, the last included."""
        if not self.fits(count):
            raise InputError(
                f"the policy was learned for {len(self.coefficients) + 1} exits, and the model runs {count}; run all "
                "passes, or choose another criterion"
            )

    def score(self, probabilities: Tensor, before: Tensor | None, exit_index: int) -> Tensor:
        """The scores of images at an exit: (B,) in 0..1.

        Args:
            probabilities: (B, K) at this exit.
            before: (B, K) at the exit before; None at the first.
            exit_index: which exit, from 0.
        """
        if self.criterion == "confidence":
            return probabilities.amax(1)
        if self.criterion == "agreement":
            return overlap(probabilities, before)
        return learned_score(probabilities, before, self.coefficients[exit_index])

    def leaves(self, probabilities: Tensor, before: Tensor | None, exit_index: int) -> Tensor:
        """Which images leave at an exit: (B,) bool. Arguments as in `score`."""
        return self.score(probabilities, before, exit_index) > self.threshold
