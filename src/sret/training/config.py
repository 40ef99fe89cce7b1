"""Training settings: the recipe, which determines the trained weights, and the runtime settings, which do not."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sret.data.config import Augmentation
from sret.errors import InputError, InputWarning
from sret.kernels.checkpointing import EXACT
from sret.models.config import ModelConfig
from sret.models.timm.config import TimmConfig
from sret.models.variants import config_of
from sret.ranges import (
    BelowOne,
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Seed,
    Workers,
    check_fields,
)
from sret.training.distillation.config import Distillation

# timm's names. timm has a hundred; some keep part of their state outside the state dict and could not resume exactly.
Optimizer = Literal["adamw", "sgd", "lamb", "lion", "nadamw", "adopt"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Recipe: model, data and training.

    Attributes:
        model: a `ModelConfig`, or its fields as plain values; or the name of a model, alone or as `name` with the
            fields to change; or a `TimmConfig`, or its fields, for a model of timm. By default plain values have the
            classes and channels of the data.
        data: "digits"; "cifar10", "cifar100", "fashion-mnist", "mnist"; "hf:owner/name", a data set of the Hugging
            Face Hub; or a folder of images, of parquet files or of WebDataset shards.
        exif_orientation: rotate photos by their EXIF orientation, in training and in prediction.
        init: weights to start from: a weights file of sret or of the authors, a published name such as
            sret_t.dist_in1k, or hf-hub:owner/name. Their depth, classes, channels and image size may differ. For a
            model of timm, "pretrained", or a weights file of sret or of timm for it, whose classes may differ. By
            default random.
        epochs: passes over the training images.
        recursion_start: train with the first pass of each recursion only, and run all passes from this share of the
            steps on. Until then validation measures the model with one pass, and no epoch counts as the best. 0 runs
            all passes from the beginning.
        pass_weights: how often a step runs 1, 2, ... passes of every recursion, relative to each other, such as
            (1, 1) for a model with two. Steps with fewer passes also learn from the predictions of all passes, so that
            the model is usable with any number (`--passes`). By default every step runs all passes.
        batch_size: images per step, over all processes.
        optimizer: AdamW, SGD, LAMB, Lion, NAdamW or ADOPT of timm.
        learning_rate: the maximum, after warm-up. It is not scaled with the batch size.
        min_learning_rate: the end of the cosine schedule.
        warmup_epochs: epochs of linear warm-up; may be a fraction.
        weight_decay: for weights with two or more dimensions.
        layer_decay: learning rate of a layer, relative to the next layer. By default all layers have the same.
        freeze: parts of the model that are not trained, such as "stem" or "stages.0".
        clip_grad: maximum norm of the gradient. By default the gradient is not clipped.
        class_balance: 0 uses every image once per epoch; 1 draws all classes equally often, so that images of small
            classes are repeated. b in between draws a class of n images in proportion to n^(1 - b).
        augmentation: augmentation of training images.
        mixup: alpha of mixup, which mixes pairs of images; 0 is off.
        cutmix: alpha of CutMix, which pastes rectangles; 0 is off. With both, each batch uses one of them at random.
        label_smoothing: part of the target that is divided equally among all classes.
        distillation: a teacher whose predictions replace the labels; its fields are teacher, teacher_weights and
            temperature.
        soft_labels: a folder written by `sret soft-labels`, whose crops and predictions replace images and labels.
        ema_decay: decay of an exponential moving average (EMA) of the weights. The average is then evaluated and saved
            as the best weights. By default there is none.
        patience: early stopping: stop after this many epochs without a higher validation accuracy, or the same with a
            lower loss. By default all epochs run.
        seed: seed of all random numbers.
        mixed_precision: "no" (float32), "bf16" or "fp16".
    """

    model: ModelConfig | TimmConfig | dict[str, Any] | str
    data: str = "digits"
    exif_orientation: bool = True
    init: Path | None = None
    epochs: PositiveInt = 60
    recursion_start: BelowOne = 0.0
    pass_weights: tuple[float, ...] = ()
    batch_size: PositiveInt = 64
    optimizer: Optimizer = "adamw"
    learning_rate: PositiveFloat = 1e-3
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_epochs: NonNegativeFloat = 3
    weight_decay: NonNegativeFloat = 0.05
    layer_decay: OpenUnitInterval | None = None
    freeze: tuple[str, ...] | str = ()
    clip_grad: PositiveFloat | None = None
    class_balance: ClosedUnitInterval = 0.0
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
        if isinstance(self.data, str):
            object.__setattr__(self, "data", self.data.rstrip("/") or self.data[:1])  # photos/ is photos
        object.__setattr__(self, "freeze", _tuple(self.freeze))
        object.__setattr__(self, "pass_weights", _tuple(self.pass_weights))
        name = self.model.get("name", "") if isinstance(self.model, dict) else ""
        if not (self.model and isinstance(self.model, ModelConfig | TimmConfig | dict | str) and isinstance(name, str)):
            raise InputError("no model; give a recipe (--config FILE), or the name of a model (--model sret_t)")
        if isinstance(self.model, str):
            object.__setattr__(self, "model", {"name": self.model})
        if isinstance(self.model, dict):
            given = [key for key in ("name", "stages", "timm") if key in self.model]
            if not given:
                raise InputError("model has no name, stages or timm; give a name, such as --model.name sret_t")
            if len(given) > 1:
                raise InputError(f"model has {' and also '.join(given)}; give only one of them")
        self.model_config()
        check_fields(self)
        if self.min_learning_rate > self.learning_rate:
            raise InputError(
                f"min_learning_rate is {self.min_learning_rate}; it must be at most learning_rate, {self.learning_rate}"
            )
        self._check_targets()
        self._check_pass_weights()
        if self.warmup_epochs >= self.epochs:
            warnings.warn(
                f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs: the learning rate never decreases",
                InputWarning,
                stacklevel=3,
            )

    def _check_targets(self) -> None:
        """Raises `InputError` for a setting that would be ignored because of another one."""
        if self.is_mixing and self.batch_size % 2:
            raise InputError(
                f"batch_size is {self.batch_size}; it must be even, because mixup and cutmix mix pairs of images"
            )
        if self.distillation is not None and self.soft_labels is not None:
            raise InputError("distillation and soft_labels both replace the labels; give one of them")
        if (self.distillation or self.soft_labels) and self.label_smoothing:
            raise InputError(
                f"label_smoothing is {self.label_smoothing}, but the targets are a teacher's predictions; set it to 0"
            )
        if self.soft_labels is not None and self.augmentation != Augmentation(geometry="none", flip=False):
            raise InputError(
                "soft_labels have their own crops; set augmentation to {geometry: none, flip: false} (mixup and cutmix "
                "may stay)"
            )

    def _check_pass_weights(self) -> None:
        """Raises `InputError` for other than a positive number for all passes, and one >= 0 for each number below."""
        weights, model = self.pass_weights, self.model_config()
        if isinstance(model, TimmConfig):
            if weights or self.recursion_start:
                raise InputError("pass_weights and recursion_start are for models of sret; leave them out")
            return
        passes = model.max_passes
        if not weights:
            return
        if passes == 1:
            raise InputError("pass_weights has no effect on a model with one pass; leave it out")
        if len(weights) != passes:
            raise InputError(f"pass_weights is {weights}; give {passes} numbers, for steps with 1 to {passes} passes")
        if not all(weight >= 0 for weight in weights) or not math.isfinite(sum(weights)) or not weights[-1]:
            raise InputError(f"pass_weights is {weights}; use numbers >= 0 of finite sum, and > 0 for the last")

    @property
    def is_mixing(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    def model_config(self, num_classes: int = 1000, in_chans: int = 3) -> ModelConfig | TimmConfig:
        """The model's configuration. Classes and channels are those given, unless the recipe sets them.

        Raises `InputError` for an unknown name or field.
        """
        if isinstance(self.model, ModelConfig | TimmConfig):
            return self.model
        assert isinstance(self.model, dict)
        given = {"num_classes": num_classes, "in_chans": in_chans, **self.model}
        if "timm" in given:
            return TimmConfig.from_dict(given)
        if "name" not in given:
            return ModelConfig.from_dict(given)
        return config_of(given.pop("name")).with_changes(given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files and comparisons."""
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Runtime: how a machine computes the steps.

    The trained weights depend on these settings only by rounding. One exception: with `grad_accum_steps` above 1 the
    stem's BatchNorm computes its statistics over one part of a step at a time, unless the stem is frozen.

    Attributes:
        num_workers: processes that load images, for each process that trains.
        grad_accum_steps: gradient accumulation: each process computes a step in this many parts, which needs less
            memory.
        compile: compile one pass of each stage first, which takes one or two minutes and needs a C++ compiler. Steps
            then need less time and memory.
        cuda_graph: replay forward and backward as one CUDA graph after a few steps, so that kernels do not wait for
            their launches; for one process on an NVIDIA GPU.
        fsdp: shard weights, gradients and optimizer state over the processes (FSDP2) instead of copying them (DDP).
        max_corrupt: number of unreadable images that may be skipped; each is replaced by the next image.
        save_every: also save the state after this many steps. By default it is saved after each epoch.
        trackers: names of accelerate's trackers that receive the metrics, such as "tensorboard".
    """

    num_workers: Workers = 0
    grad_accum_steps: PositiveInt = 1
    compile: bool = False
    cuda_graph: bool = False
    fsdp: bool = False
    max_corrupt: NonNegativeInt = 0
    save_every: PositiveInt | None = None
    trackers: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "trackers", _tuple(self.trackers))
        check_fields(self)
        if self.compile and self.fsdp:
            raise InputError(
                "compile and fsdp cannot be used together, since FSDP gathers weights between passes; set one to false"
            )
        if self.cuda_graph and (self.compile or self.fsdp or self.grad_accum_steps > 1):
            raise InputError("cuda_graph cannot be used with compile, fsdp or grad_accum_steps; set it to false")


def _tuple(names: Any) -> Any:
    """Names as a tuple; values of other types, which are refused later, stay as they are."""
    return (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list) else names


def resume_key(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that must be equal to resume: all, but `memory` only if it changes the gradients."""
    model = recipe["model"]
    if model.get("memory", "none") in EXACT:
        model = {**model, "memory": "exact"}
    return {**recipe, "model": model}
