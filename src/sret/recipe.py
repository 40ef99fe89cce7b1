"""A recipe: everything that decides the weights a training run ends with, as one frozen dataclass."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sret.config import ModelConfig
from sret.errors import InputError
from sret.preprocess import Augmentation


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how.

    Attributes:
        model: a variant by name (its classes and channels then follow the data), or a whole `ModelConfig`.
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

    model: ModelConfig | str
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
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}; it must be at least 0 and below 2^31")

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
