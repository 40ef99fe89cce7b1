"""Model configuration: frozen dataclasses that check their values.

Letters: C channels. A *layer* is one pass of attention and MLP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, cast

from sret.errors import InputError, did_you_mean
from sret.kernels.checkpointing import CheckpointPolicy
from sret.models.stage_config import StageConfig
from sret.ranges import BelowOne, Channels, Classes, check_fields, is_whole

# Strides of the stem's three convolutions. The published models use 8; smaller ones suit 32- or 64-pixel images.
STEM_STRIDES = {8: (2, 2, 2), 4: (2, 2, 1), 2: (2, 1, 1), 1: (1, 1, 1)}
POOL_STRIDE = 2  # between stages
# Larger numbers are typing errors, or files that would need too much memory.
MAX_SIDE = 16_384  # pixels
MAX_DEPTH = 20_000  # layers

PermutationKind = Literal["random", "strided"]
ResidualScale = Literal["one", "sqrt", "passes"]
Exits = Literal["none", "passes", "stages"]


def num_stem_maps(stem_stride: int) -> int:
    """Feature maps inside the stem: at strides 2, 4, ... below the stem's own."""
    return sum(stride > 1 for stride in STEM_STRIDES[stem_stride][1:])


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model.

    Attributes:
        stages: one or more; the feature map is halved between them, and channels grow by an integer factor.
        img_size: pixels, one number or (height, width). It sets the size of the position embedding; the model takes
            images of any size.
        in_chans: image channels.
        num_classes: number of logits; 0 for no classifier.
        stem_stride: pixels per token of the first stage, 1, 2, 4 or 8.
        learnable_residual: `False` fixes all residual coefficients at 1 (the ablation).
        residual_scale: what a pass adds to the stream is divided by this: "one" (as published), "sqrt" (the square root
            of the number of passes of its recursion), or "passes" (that number).
        reversible: use two streams, whose inputs can be computed from their outputs; this is another architecture.
        memory: activation checkpointing policy (`sret.kernels.checkpointing`): "none", "pass", "nested", "reversible"
            (needs `reversible`), "truncated:k".
        permutation: how sliced passes after the first reorder tokens: "random" or "strided" (no gather).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth. The rate of a block, the same in all its passes, grows with its depth from 0
            towards this probability.
        global_pool: "avg", "max", or "" for an unpooled feature map (needs num_classes 0).
        exits: classifiers before the last one, for `sret.elastic`: "passes" has one after each pass of the last stage's
            blocks, which share the final norm; "stages" one, with its norm, after each stage. "none" has only the last.
    """

    stages: tuple[StageConfig, ...]
    img_size: int | tuple[int, int] = 224
    in_chans: Channels = 3
    num_classes: Classes = 1000
    stem_stride: int = 8
    learnable_residual: bool = True
    residual_scale: ResidualScale = "one"
    reversible: bool = False
    memory: str = "none"
    permutation: PermutationKind = "random"
    drop_rate: BelowOne = 0.0
    drop_path_rate: BelowOne = 0.0
    global_pool: Literal["avg", "max", ""] = "avg"
    exits: Exits = "none"

    def __post_init__(self) -> None:
        size = self.img_size if isinstance(self.img_size, list | tuple) else (self.img_size, self.img_size)
        if len(size) != 2 or not all(isinstance(pixels, int) and 1 <= pixels <= MAX_SIDE for pixels in size):
            raise InputError(
                f"img_size {self.img_size!r} is not a number of pixels or (height, width), of at most {MAX_SIDE:,}"
            )
        object.__setattr__(self, "img_size", tuple(size))
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages or not all(isinstance(stage, StageConfig) for stage in self.stages):
            raise InputError(f"stages is {self.stages!r}; give at least one StageConfig")
        check_fields(self)
        if self.depth > MAX_DEPTH:
            raise InputError(f"the model has {self.depth:,} layers, which is more than {MAX_DEPTH:,}")
        if not isinstance(self.stem_stride, int) or self.stem_stride not in STEM_STRIDES:
            raise InputError(f"stem_stride {self.stem_stride} is not one of {', '.join(map(str, STEM_STRIDES))}")
        if self.stages[0].embed_dim < 2:
            raise InputError("the first stage needs at least 2 channels: the stem starts with half of them")
        CheckpointPolicy.parse(self.memory, self.reversible)
        if self.is_merging:
            if self.reversible:
                raise InputError("merge needs a one-stream model; set reversible to false, or leave merge out")
            if self.memory != "none":
                raise InputError(f"merge does not work with memory {self.memory!r}; use memory 'none'")
            if self.exits == "passes" and self.stages[-1].merge:
                raise InputError("exits 'passes' needs a last stage that merges no tokens; leave out its merge")
        if self.global_pool == "" and self.num_classes:
            raise InputError(f"global_pool '' with {self.num_classes} classes; use avg or max, or set num_classes to 0")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.embed_dim % before.embed_dim:
                raise InputError(
                    f"a stage of {after.embed_dim} channels cannot follow one of {before.embed_dim}; "
                    f"use a multiple of {before.embed_dim}"
                )
        self.check(self.input_size)
        self._check_exits()

    def _check_exits(self) -> None:
        """Raises `InputError` for exits that the model cannot have."""
        if self.exits == "none":
            return
        if not self.num_classes:
            raise InputError(f"exits {self.exits!r} are classifiers, but num_classes is 0; set exits to none")
        if self.exits == "passes" and (self.reversible or self.memory != "none"):
            name, value = ("reversible", "false") if self.reversible else ("memory", "none")
            raise InputError(
                f"exits 'passes' needs the output of each pass, which a recursion with {name} {getattr(self, name)!r} "
                f"does not keep; set {name} to {value}, or exits to stages"
            )

    @property
    def is_merging(self) -> bool:
        """Whether some layer merges tokens."""
        return any(stage.merge for stage in self.stages)

    @property
    def num_exits(self) -> int:
        """Number of classifiers before the last one."""
        return {"none": 0, "passes": self.stages[-1].depth - 1, "stages": len(self.stages) - 1}[self.exits]

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return cast(tuple[int, int], self.img_size)

    @property
    def depth(self) -> int:
        """Layers executed per image."""
        return sum(stage.depth for stage in self.stages)

    def residual_factor(self, stage: StageConfig) -> float:
        """The factor of what a pass adds to the stream, in one of the stages."""
        return {"one": 1.0, "sqrt": stage.num_passes**-0.5, "passes": 1 / stage.num_passes}[self.residual_scale]

    def grids(self, img_size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """(height, width) in tokens of every stage, at `img_size` pixels or the configured size."""
        height, width = img_size or self.input_size
        strides = [self.stem_stride * POOL_STRIDE**i for i in range(len(self.stages))]
        return [(-(-height // stride), -(-width // stride)) for stride in strides]

    def check(self, img_size: tuple[int, int]) -> None:
        """Raises `InputError` if some stage cannot be sliced at `img_size` pixels."""
        if min(img_size) < 1:
            raise InputError(f"images of {img_size[0]}x{img_size[1]} pixels; both sides must be at least 1")
        for i, (stage, (height, width)) in enumerate(zip(self.stages, self.grids(img_size), strict=True)):
            try:
                stage.check(height * width)
            except InputError as error:
                raise InputError(f"stage {i + 1} at {img_size[0]}x{img_size[1]} pixels: {error}") from None

    @property
    def max_passes(self) -> int:
        """The largest number of passes of a stage."""
        return max(stage.num_passes for stage in self.stages)

    def passes_by_stage(self, passes: int | Sequence[int] | None) -> tuple[int, ...]:
        """The number of passes that run in each stage, if only the first ones do.

        Args:
            passes: one number for all stages, of which a stage with fewer passes runs all; or a number for each stage.
                None for all passes.

        Raises `InputError` for a number that is not between 1 and the passes of the model.
        """
        if passes is None:
            return tuple(stage.num_passes for stage in self.stages)
        if not isinstance(passes, Sequence):
            if not is_whole(passes) or not 1 <= passes <= self.max_passes:
                raise InputError(f"passes is {passes!r}; the model has {self.max_passes}: use 1 to {self.max_passes}")
            return tuple(min(int(passes), stage.num_passes) for stage in self.stages)
        if len(passes) != len(self.stages):
            raise InputError(f"passes is {tuple(passes)}; give one number, or {len(self.stages)}: one for each stage")
        for i, (number, stage) in enumerate(zip(passes, self.stages, strict=True), 1):
            if not is_whole(number) or not 1 <= number <= stage.num_passes:
                raise InputError(
                    f"passes is {tuple(passes)}; stage {i} has {stage.num_passes}: use 1 to {stage.num_passes}"
                )
        return tuple(map(int, passes))

    def first_passes(self, passes: int | Sequence[int] | None) -> "ModelConfig":
        """The configuration of a model that has only the first passes, as in `passes_by_stage`; tells what they cost.

        Raises `InputError` as `passes_by_stage` does.
        """
        numbers = self.passes_by_stage(passes)
        stages = (stage.with_passes(n) for stage, n in zip(self.stages, numbers, strict=True))
        return replace(self, stages=tuple(stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML; `from_dict` reads them back."""
        values = asdict(self)
        if self.exits == "none":  # so that earlier versions can read the file
            del values["exits"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config that `to_dict` wrote. Raises `InputError` naming unknown or missing fields."""
        stages = values.get("stages")
        if not isinstance(stages, list | tuple) or not all(
            isinstance(stage, Mapping | StageConfig) for stage in stages
        ):
            raise InputError(f"stages must be a list of stage configurations, not {stages!r}")
        found = (s if isinstance(s, StageConfig) else StageConfig(**known_fields(StageConfig, s)) for s in stages)
        return cls(**{**known_fields(cls, values), "stages": tuple(found)})

    def with_changes(self, changes: Mapping[str, Any]) -> "ModelConfig":
        """This config with some fields changed, given as plain values. Raises `InputError` as `from_dict` does."""
        return ModelConfig.from_dict({**self.to_dict(), **changes})


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass. Raises `InputError` naming unknown or missing fields."""
    names = [field.name for field in fields(cls)]
    for name in values:
        if name not in names:
            raise InputError(
                f"{cls.__name__} has no field {name!r} (it has {', '.join(names)}){did_you_mean(str(name), names)}"
            )
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise InputError(f"{cls.__name__} needs {field.name}")
    return dict(values)
