"""Early exit of checkpoints: uses the policy in a card, and measures exits on labelled images to choose one."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sret.checkpoints.card import METADATA_KEY, Card, read_card, save_weights
from sret.checkpoints.files import CHECKSUM_KEY, read_safetensors
from sret.data.loading import ImageDataset
from sret.elastic import EarlyExit, ExitPolicy
from sret.elastic.calibrate import Outcome, fitted, outcomes, representative
from sret.elastic.policy import Criterion
from sret.errors import InputError
from sret.export.exits import exit_policy, with_exits
from sret.export.runtime import Exported
from sret.inference.evaluate import evaluate_on
from sret.models.cost import model_cost
from sret.models.sret import SReT

NUM_SAMPLES = 32  # images to measure times with


def with_exit(model: nn.Module, card: Card, source: object, threshold: float | Literal["auto"] | None) -> nn.Module:
    """The model with the early exit of `exit_policy`; a file that was exported with early exit is one for "auto"."""
    if threshold == "auto" and isinstance(model, Exported) and card.exit_policy is not None:
        return model
    policy = exit_policy(model, card, source, threshold)
    return model if policy is None else EarlyExit(with_exits(model, source), policy)


def check_one_process() -> None:
    """Raises `InputError` for one of several processes: each would count only the exits of its own images."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the exits are measured by one process; start the command without torchrun")


class _Recorder(nn.Module):
    """A model that keeps the logits of all exits."""

    def __init__(self, model: SReT) -> None:
        super().__init__()
        self.model, self.kept, self.training = model, list[Tensor](), False

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack(self.model.forward_exits(images))
        self.kept.append(logits.float().cpu())
        return logits[-1]


@dataclass(frozen=True)
class Calibration:
    """What each threshold of a criterion gives on the validation images of a data set.

    Attributes:
        policy: the criterion, with threshold 1.
        found: the outcome of each threshold; for "learned" by coefficients fitted on other images (`fitted`).
        data: the name of the data, with the number of images.
        sample: some of the images (B, in_chans, H, W), normalised, on the device of the model, to measure times with.
    """

    policy: ExitPolicy
    found: list[Outcome]
    data: str
    sample: Tensor


def calibrate(
    model: SReT,
    card: Card,
    data: str | None,
    criterion: Criterion,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Calibration:
    """Evaluates all thresholds on the validation images of a data set, by default that of the training.

    Raises `InputError` as `evaluate_on` does, and for several processes.
    """
    check_one_process()
    recorder = _Recorder(model)
    evaluation = evaluate_on(recorder, card, data, "val", batch_size, num_workers)
    logits, labels = torch.cat(recorder.kept, 1), evaluation.predictions.labels
    policy, scores = fitted(criterion, logits, labels)
    costs = model_cost(model.config.first_passes(model.passes)).exit_macs
    found = outcomes(scores, logits.argmax(2) == labels, costs)
    images = ImageDataset(evaluation.samples, card.preprocessing)
    sample = card.preprocessing.normalize(torch.stack([images[i][0] for i in representative(scores, NUM_SAMPLES)]))
    device = next(model.parameters()).device
    return Calibration(policy, found, f"{evaluation.data.name}, val: {len(labels):,} images", sample.to(device))


def store_policy(path: Path, policy: ExitPolicy, checksum: str | None) -> None:
    """Writes a policy into the card of a weights file; the weights stay. The file is replaced when all is written.

    Raises `InputError` if the file no longer has this checksum: the policy is for the weights that it had.
    """
    weights, metadata = read_safetensors(path)
    if metadata.get(CHECKSUM_KEY) != checksum:
        raise InputError(f"{path} was replaced meanwhile, so the threshold was not stored; run the command again")
    save_weights(path, weights, replace(read_card(path, metadata[METADATA_KEY]), exit_policy=policy))
