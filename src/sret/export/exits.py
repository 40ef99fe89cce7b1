"""Early exit in an exported graph: each exit but the last is an `If`, whose other branch holds the rest of the model.

    y_k = logits_k                                        if all images of the batch leave at exit k
    y_k = where(leaves_k, logits_k, y_{k+1})              otherwise

Each image gets the logits of the exit at which it would leave alone, in batches of any size. Time is saved when all
images of a batch have left; images that left stay in the batch until then, so that shapes do not depend on values.
"""

import warnings
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from sret.checkpoints.card import Card
from sret.elastic import ExitPolicy
from sret.errors import InputError, InputWarning
from sret.export.runtime import Exported
from sret.models.exits import exit_parts
from sret.models.sret import SReT


class ExitGraph(nn.Module):
    """A model with early exit that `torch.export` can trace: images of one size -> logits, as `predict_with_exits`.

    Attributes:
        has_shared_weights: whether what runs after an exit has weights of what ran before it.

    Raises `InputError` for a model without exits, and for a policy of another model.
    """

    def __init__(self, model: SReT, img_size: tuple[int, int], policy: ExitPolicy) -> None:
        super().__init__()
        self.model, self.policy, self.training = model, policy, False
        self.has_shared_weights = model.config.exits == "passes"
        self._parts = exit_parts(model, img_size)
        policy.check_exits(len(self._parts))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, *img_size) normalised -> (B, num_classes)."""
        return self._logits_from(0, x, None)

    def _logits_from(self, k: int, x: Tensor, before: Tensor | None) -> Tensor:
        """The output of part k - 1 and the probabilities at its exit -> logits (B, num_classes)."""
        x = self._parts[k].run(x)
        logits = self._parts[k].classify(x)
        if k == len(self._parts) - 1:
            return logits
        probabilities = logits.softmax(1)
        leaves = self.policy.leaves(probabilities, before, k)

        def stop(x: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
            return logits.clone()  # an output may not be an input

        def go_on(x: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
            return self._logits_from(k + 1, x, probabilities)

        deeper = torch.cond(leaves.all(), stop, go_on, (x, logits, probabilities))
        return torch.where(leaves[:, None], logits, deeper)


def exit_policy(
    model: nn.Module, card: Card, source: object, threshold: float | Literal["auto"] | None
) -> ExitPolicy | None:
    """The policy that `--exit` asks for.

    Args:
        source: the name of the checkpoint, for errors.
        threshold: "auto" for the policy of the card; a number for another threshold of its criterion, or of confidence;
            None for none.

    Raises `InputError` for a model without exits, "auto" for a card without a policy, and a threshold outside 0 to 1.
    Warns for "auto" if the model runs fewer passes than those that the threshold was chosen with.
    """
    if threshold is None:
        return None
    ours, stored = with_exits(model, source), card.exit_policy
    runs_all = ours.passes == ours.config.passes_by_stage(None)
    if threshold != "auto":
        return replace(stored, threshold=threshold) if stored else ExitPolicy(threshold=threshold)
    if stored is None and not runs_all:
        raise InputError(
            f"{source} has no threshold for early exit that fits these passes; choose one with `sret calibrate-exit` "
            "and run all passes, or give a number from 0 to 1"
        )
    if stored is None:
        raise InputError(
            f"{source} has no threshold for early exit; choose one with `sret calibrate-exit`, or give a number from 0 "
            "to 1"
        )
    if not runs_all:
        text = f"{source}: the threshold for early exit was chosen with all passes; with fewer its accuracy is unknown"
        warnings.warn(text, InputWarning, stacklevel=2)
    return stored


def with_exits(model: nn.Module, source: object) -> SReT:
    """The model of a checkpoint. Raises `InputError` if it has no exits that can be chosen."""
    if isinstance(model, Exported):
        raise InputError(f"{source} is an exported file, which keeps its exits; export the weights again with --exit")
    if not isinstance(model, SReT) or not len(model.exits):
        run = f", run with {model.passes} passes," if isinstance(model, SReT) else ""
        raise InputError(
            f"{source}{run} has no exits; give no more passes than it was trained with, or train a model with exits, "
            "such as with --model.exits passes"
        )
    return model
