"""Early exit in batches: images that leave are removed, and the next part of the model runs on the others.

Each image gets the logits and the exit that it would get alone, up to rounding: a matrix product of another number of
rows may add in another order. An image whose score differs from the threshold only by rounding can leave elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sret.elastic.policy import ExitPolicy
from sret.errors import InputError
from sret.kernels.gpu.dispatch import shared_packing
from sret.models.cost import model_cost
from sret.models.exits import Part, exit_parts
from sret.models.sret import SReT, check_images


@dataclass(frozen=True)
class Waiting:
    """Images between two parts: what the next part takes, their numbers, and the probabilities at the exit before.

    Attributes:
        x: (B, ...).
        numbers: (B,) int64, which images they are.
        probabilities: (B, K), None before the first part.
    """

    x: Tensor
    numbers: Tensor
    probabilities: Tensor | None

    def of(self, rows: Tensor | slice) -> "Waiting":
        """Some of the images: a slice, or (B,) bool."""
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        return Waiting(self.x[rows], self.numbers[rows], probabilities)

    @classmethod
    def joined(cls, parts: "list[Waiting]") -> "Waiting":
        """All images of several, in order."""
        if len(parts) == 1:
            return parts[0]
        known = [part.probabilities for part in parts if part.probabilities is not None]
        return cls(
            torch.cat([part.x for part in parts]),
            torch.cat([part.numbers for part in parts]),
            torch.cat(known) if known else None,
        )


def advance(
    parts: Sequence[Part], k: int, waiting: Waiting, policy: ExitPolicy
) -> tuple[Waiting | None, Tensor, Tensor]:
    """Runs part k on images. Returns those that go on, None if there are none, and numbers and logits of the others.

    All images leave after the last part.
    """
    x = parts[k].run(waiting.x)
    logits = parts[k].classify(x)
    if k == len(parts) - 1:
        return None, waiting.numbers, logits
    probabilities = logits.float().softmax(1)
    leaves = policy.leaves(probabilities, waiting.probabilities, k)
    leaves_list = leaves.tolist()  # one transfer; for one image, small operations are most of what an exit costs
    if all(leaves_list):
        return None, waiting.numbers, logits
    after = Waiting(x, waiting.numbers, probabilities)
    if not any(leaves_list):
        return after, waiting.numbers[:0], logits[:0]
    return after.of(~leaves), waiting.numbers[leaves], logits[leaves]


@torch.inference_mode()
def predict_with_exits(model: SReT, x: Tensor, policy: ExitPolicy) -> tuple[Tensor, Tensor]:
    """Predicts images, each with only the parts of the model that it needs.

    Args:
        x: normalised images (B, in_chans, H, W).

    Returns logits (B, K), and the number of the exit of each image, (B,) int64 from 0. With threshold 1 the logits are
    bitwise those of `model(x)`, computed without gradients.
    Raises `InputError` for a model without exits, for one in training mode, for a policy of another model, and for
    images of another shape than the model takes.
    """
    parts = checked_parts(model, x, policy)
    waiting: Waiting | None = Waiting(x, torch.arange(len(x), device=x.device), None)
    exits = torch.empty(len(x), dtype=torch.int64, device=x.device)
    logits: Tensor | None = None
    with shared_packing():
        for k in range(len(parts)):
            assert waiting is not None
            waiting, numbers, left = advance(parts, k, waiting, policy)
            if len(numbers) == len(x):
                return left, exits.fill_(k)
            if len(numbers):
                logits = left.new_empty(len(x), left.shape[1]) if logits is None else logits
                logits[numbers], exits[numbers] = left, k
            if waiting is None:
                break
    assert logits is not None
    return logits, exits


def check_evaluates(model: SReT) -> None:
    """Raises `InputError` for a model in training mode."""
    if model.training:
        raise InputError("images exit early only in evaluation mode; call model.eval() first")


def checked_parts(model: SReT, x: Tensor, policy: ExitPolicy) -> list[Part]:
    """The parts of a model in evaluation mode. Raises `InputError` as `predict_with_exits` does."""
    if not isinstance(model, SReT):
        raise InputError(f"only models of sret have exits, not {type(model).__name__}")
    check_evaluates(model)
    check_images(x, model.config)
    parts = exit_parts(model, x.shape[2:])
    policy.check_exits(len(parts))
    return parts


class EarlyExit(nn.Module):
    """A model that takes images and gives logits, as `SReT` does, with early exit; it counts the exits.

    Attributes:
        counts: (exits,) int64 on the CPU, how many images left at each exit since the passes were last set.

    Raises `InputError` for a model without exits.
    """

    def __init__(self, model: SReT, policy: ExitPolicy) -> None:
        super().__init__()
        self.model, self.policy = model, policy
        self.config, self.num_classes, self.training = model.config, model.num_classes, model.training
        self._start_counting()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) normalised -> (B, num_classes)."""
        return self.predict(x)[0]

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `predict_with_exits`; counts the exits."""
        if self.model.passes != self._passes:
            self._start_counting()
        logits, exits = predict_with_exits(self.model, x, self.policy)
        self.counts += exits.bincount(minlength=len(self.counts)).cpu()
        return logits, exits

    def share_of_macs(self) -> float:
        """The mean number of MACs of the images so far, as a share of those of the model without exits."""
        cost = model_cost(self.config.first_passes(self._passes))
        spent = sum(int(count) * macs for count, macs in zip(self.counts, cost.exit_macs, strict=True))
        return spent / (cost.macs * max(1, int(self.counts.sum())))

    def _start_counting(self) -> None:
        self._passes = self.model.passes
        self.counts = torch.zeros(len(exit_parts(self.model, self.config.input_size)), dtype=torch.int64)
