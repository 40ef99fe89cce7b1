"""Settings of recovery. Does not import torch, which takes seconds."""

from dataclasses import dataclass

from sret.data.config import Augmentation
from sret.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, check_fields


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How the shared model is trained: AdamW, linear warm-up over `warmup_epochs`, a half cosine to 0.

    Attributes:
        epochs: passes over the training images; 0 only measures the model.
        batch_size: images per step.
        learning_rate: the maximum, after warm-up.
        gate_rate: the learning rate of the gates of `extra_passes`, relative to that of other weights.
        warmup_epochs: epochs of linear warm-up; may be a fraction.
        weight_decay: for weights with two or more dimensions.
        feature_weight: of the distance of features in the loss; 0 uses only predictions.
        augmentation: augmentation of training images.
        seed: seed of all random numbers.
    """

    epochs: NonNegativeInt = 5
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    gate_rate: PositiveFloat = 10.0
    warmup_epochs: NonNegativeFloat = 0.5
    weight_decay: NonNegativeFloat = 0.05
    feature_weight: NonNegativeFloat = 1.0
    augmentation: Augmentation
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
