"""A recipe: everything that decides the weights a training run ends with, as one frozen dataclass.

Beside it stands what the machine decides: with how many processes, and in how many parts, the same steps are computed.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sret.data.config import Augmentation
from sret.errors import InputError, InputWarning
from sret.kernels.checkpointing import EXACT
from sret.models.config import ModelConfig
from sret.models.variants import config_of
from sret.ranges import (
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_ranges,
)
from sret.training.distillation.config import Distillation

# timm's names. It has a hundred, some of which keep a part of their state where no state dict has it.
OPTIMIZERS = ("adamw", "sgd", "lamb", "lion", "nadamw", "adopt")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how.

    Attributes:
        model: a `ModelConfig`, or its fields as plain values; or a published model's name, alone or as `name` beside
            the fields to change. Classes and channels follow the data where plain values leave them out.
        data: "digits"; "cifar10", "cifar100", "fashion-mnist", "mnist"; "hf:owner/name", a set of the Hugging Face
            hub; or a folder of images, of parquet files or of WebDataset shards.
        init: weights to start from: a file of ours, or of the authors', also of other depth, classes or images
            (`sret.checkpoints.adapt`). None starts afresh.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        optimizer: "adamw", or another of timm's whose state can be saved whole.
        learning_rate: the peak of a cosine with warm-up, at this batch size.
        min_learning_rate: where the cosine ends.
        warmup_epochs: epochs until the peak; may be a fraction.
        weight_decay: on weights of two dimensions or more.
        layer_decay: learning rate of a layer as a share of the next one's; None treats all alike.
        freeze: parts of the model that stay as they are, such as "stem" or "stages.0".
        clip_grad: largest norm of the gradient; None does not clip.
        augmentation: what chance does to a training image.
        mixup: images are mixed in pairs; alpha of the Beta distribution of the share, 0 is off.
        cutmix: the same by pasting a rectangle; where both are on, a batch takes one of them by chance.
        label_smoothing: share of the target given to all classes alike.
        distillation: a teacher in place of the labels.
        soft_labels: a folder that `sret soft-labels` wrote: its crops and its teacher's answers in place of the labels.
        ema_decay: of a moving average of the weights, which is then evaluated and kept as the best; None has none.
        patience: stop after this many epochs without a better one; None goes to the end.
        seed: of all randomness.
        mixed_precision: "no" (float32), "bf16" or "fp16".
    """

    model: ModelConfig | dict[str, Any] | str
    data: str = "digits"
    init: Path | None = None
    epochs: PositiveInt = 60
    batch_size: PositiveInt = 64
    optimizer: str = "adamw"
    learning_rate: PositiveFloat = 1e-3
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_epochs: NonNegativeFloat = 3
    weight_decay: NonNegativeFloat = 0.05
    layer_decay: OpenUnitInterval | None = None
    freeze: tuple[str, ...] | str = ()
    clip_grad: PositiveFloat | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    label_smoothing: BelowOne = 0.1
    distillation: Distillation | None = None
    soft_labels: Path | None = None
    ema_decay: OpenUnitInterval | None = None
    patience: PositiveInt | None = None
    seed: Seed = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.data.rstrip("/") or "/")  # photos/ is photos
        object.__setattr__(self, "freeze", _tuple(self.freeze))
        if isinstance(self.model, str):
            object.__setattr__(self, "model", {"name": self.model})
        if isinstance(self.model, dict) and not {"name", "stages"} & self.model.keys():
            raise InputError("model has neither stages nor the name of a published model, as in --model.name sret_t")
        if isinstance(self.model, dict) and {"name", "stages"} <= self.model.keys():
            raise InputError(
                f"model has stages of its own, and the name of a published model, {self.model['name']!r}; "
                "give one of them"
            )
        self.model_config()
        check_ranges(self)
        if self.min_learning_rate > self.learning_rate:
            raise InputError(
                f"min_learning_rate is {self.min_learning_rate}; it must be at most learning_rate, {self.learning_rate}"
            )
        self._check_targets()
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"optimizer is {self.optimizer!r}; it must be one of those that resume exactly: {', '.join(OPTIMIZERS)}"
            )
        if self.warmup_epochs >= self.epochs:
            warnings.warn(
                f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs: the learning rate never falls",
                InputWarning,
                stacklevel=3,
            )

    def _check_targets(self) -> None:
        """Settings that another one would silently overrule are refused."""
        if self.mixes and self.batch_size % 2:
            raise InputError(f"batch_size is {self.batch_size}; mixup and cutmix pair images, so it must be even")
        if self.distillation is not None and self.soft_labels is not None:
            raise InputError("distillation and soft_labels both replace the labels; give one of them")
        if (self.distillation or self.soft_labels) and self.label_smoothing:
            raise InputError(
                f"label_smoothing is {self.label_smoothing}, but the teacher's answers replace the labels; set it to 0"
            )
        if self.soft_labels is not None:
            own = Augmentation(geometry="none", flip=False)
            if self.augmentation != own:
                raise InputError(
                    "soft_labels bring their own crops, and their answers hold for these images alone; set "
                    "augmentation to {geometry: none, flip: false} (mixup and cutmix may stay)"
                )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def model_config(self, num_classes: int = 1000, in_chans: int = 3) -> ModelConfig:
        """The model for data of so many classes and channels, which what the recipe says need not agree with.

        Raises `InputError` for an unknown name or field.
        """
        if isinstance(self.model, ModelConfig):
            return self.model
        assert isinstance(self.model, dict)
        given = {"num_classes": num_classes, "in_chans": in_chans, **self.model}
        if "name" not in given:
            return ModelConfig.from_dict(given)
        return config_of(given.pop("name")).with_changes(given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to be stored and compared."""
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a machine computes the steps of a recipe; the weights do not depend on it, but for rounding.

    (The stem's BatchNorm takes its statistics over all processes, but over one part of an accumulated step at a time:
    with `grad_accum_steps` above 1 the weights do depend on it, unless the stem is frozen.)

    Attributes:
        num_workers: processes that load images, beside each process that trains.
        grad_accum_steps: parts that each process computes a step in, one after the other, to need less memory.
        compile: compile a pass of each stage first, which takes a minute or two and a C++ compiler; steps then take
            less time and memory.
        fsdp: divide weights, gradients and optimizer among the processes (FSDP2) instead of copying them (DDP).
        max_corrupt: images that may be skipped because they cannot be read; the next one stands in for each.
        save_every: save the state after every so many steps too, not only after an epoch.
        trackers: such as "tensorboard": accelerate's names of what receives the metrics too.
    """

    num_workers: NonNegativeInt = 0
    grad_accum_steps: PositiveInt = 1
    compile: bool = False
    fsdp: bool = False
    max_corrupt: NonNegativeInt = 0
    save_every: PositiveInt | None = None
    trackers: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "trackers", _tuple(self.trackers))
        check_ranges(self)
        if self.compile and self.fsdp:
            raise InputError("compile and fsdp exclude each other: sharded weights are gathered between the passes")


def _tuple(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the weights of a run, of a recipe as plain values: all but how backward saves memory exactly."""
    model = recipe["model"]
    if model.get("memory", "none") in EXACT:
        model = {**model, "memory": "exact"}
    return {**recipe, "model": model}
