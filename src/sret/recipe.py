"""A recipe: everything that decides the weights a training run ends with, as one frozen dataclass."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sret.config import ModelConfig
from sret.errors import InputError, InputWarning
from sret.preprocess import Augmentation
from sret.variants import config_of


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how.

    Attributes:
        model: a `ModelConfig`, or its fields as plain values; or a published model's name, alone or as `name` beside
            the fields to change. A named model's classes and channels follow the data unless they are given.
        data: "digits", or a folder of pictures.
        init: weights to start from: a file of ours, or of the authors' for the same variant. None starts afresh.
        epochs: passes over the training pictures.
        batch_size: pictures per step, over all processes.
        learning_rate: the peak of a cosine with warm-up, at this batch size.
        warmup_epochs: epochs until the peak; may be a fraction.
        weight_decay: AdamW's, on weights of two dimensions or more.
        label_smoothing: share of the target given to all classes alike.
        clip_grad: largest norm of the gradient; None does not clip.
        augmentation: "none", "affine" (digits) or "crop" (photos).
        seed: of all randomness.
        mixed_precision: "no" (float32), "bf16" or "fp16".
    """

    model: ModelConfig | dict[str, Any] | str
    data: str = "digits"
    init: Path | None = None
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_epochs: float = 3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad: float | None = None
    augmentation: Augmentation = "crop"
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", str(Path(self.data)))  # photos/ is photos
        if isinstance(self.model, str):
            object.__setattr__(self, "model", {"name": self.model})
        if isinstance(self.model, dict) and not {"name", "stages"} & self.model.keys():
            raise InputError("model has neither stages nor the name of a published model, as in --model.name sret_t")
        if isinstance(self.model, dict) and "name" not in self.model:
            object.__setattr__(self, "model", ModelConfig.from_dict(self.model))
        self.model_config()
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be positive")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        for name in ("warmup_epochs", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise InputError(f"clip_grad is {self.clip_grad}; it must be positive, or null for no clipping")
        if self.warmup_epochs >= self.epochs:
            warnings.warn(
                f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs: the learning rate never falls",
                InputWarning,
                stacklevel=3,
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}; it must be at least 0 and below 2^31")

    def model_config(self, num_classes: int = 1000, in_chans: int = 3) -> ModelConfig:
        """The model for data of so many classes and channels, which a whole `ModelConfig` need not agree with.

        Raises `InputError` for an unknown name or field.
        """
        if isinstance(self.model, ModelConfig):
            return self.model
        assert isinstance(self.model, dict)
        changes = {key: value for key, value in self.model.items() if key != "name"}
        return config_of(self.model["name"]).with_changes({"num_classes": num_classes, "in_chans": in_chans, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to be stored and compared."""
        return json.loads(json.dumps(asdict(self), default=str))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two recipes as plain values, one phrase per field."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changes(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, now {b!r}")
    return found
