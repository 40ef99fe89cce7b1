"""Model configuration: frozen dataclasses that check their values.

Letters: C channels. A *layer* is one pass of attention and MLP.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, cast

from sret.errors import InputError, did_you_mean
from sret.kernels.checkpointing import CheckpointPolicy
from sret.kernels.slices import slice_lengths
from sret.ranges import BelowOne, Channels, Classes, NonNegativeFloat, PositiveInt, check_fields

# Strides of the stem's three convolutions. The published models use 8; smaller ones suit 32- or 64-pixel images.
STEM_STRIDES = {8: (2, 2, 2), 4: (2, 2, 1), 2: (2, 1, 1), 1: (1, 1, 1)}
POOL_STRIDE = 2  # between stages
# Larger numbers are typing errors, or files that would need too much memory.
MAX_SIDE = 16_384  # pixels
MAX_DEPTH = 20_000  # layers

PermutationKind = Literal["random", "strided"]
ResidualScale = Literal["one", "sqrt", "passes"]


def num_stem_maps(stem_stride: int) -> int:
    """Feature maps inside the stem: at strides 2, 4, ... below the stem's own."""
    return sum(stride > 1 for stride in STEM_STRIDES[stem_stride][1:])


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: distinct blocks, each applied once per entry of `groups`, a projection after every pass.

    Attributes:
        embed_dim: channels C.
        num_heads: attention heads; a divisor of `embed_dim`.
        num_blocks: distinct weight sets.
        groups: slices in each pass of a block; its length is the number of passes. 1 is global attention.
        mlp_ratio: hidden channels of the MLP over C.
        projection_ratio: hidden channels of the non-linear projection over C; `None` leaves the projection out.
    """

    embed_dim: Channels
    num_heads: PositiveInt
    num_blocks: PositiveInt
    groups: tuple[int, ...] = (1, 1)
    mlp_ratio: NonNegativeFloat = 4.0
    projection_ratio: NonNegativeFloat | None = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.groups, list | tuple):
            raise InputError(f"groups is {self.groups!r}; give the slices of each pass, such as (8, 2) for two passes")
        object.__setattr__(self, "groups", tuple(self.groups))
        for num_groups in {repr(number): number for number in self.groups}.values():  # thousands are equal
            if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
                raise InputError(f"groups {self.groups}: {num_groups!r} slices in a pass; use whole numbers >= 1")
        check_fields(self)
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim {self.embed_dim} cannot form {self.num_heads} equal heads; "
                f"try {self.embed_dim // self.num_heads * self.num_heads or self.num_heads} channels"
            )
        if not self.groups:
            raise InputError("groups is empty; give the number of slices of each pass, such as (1, 1) for two passes")
        for name in ("mlp_ratio", "projection_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 1 <= self.embed_dim * ratio < 2**31:
                raise InputError(
                    f"{name} {ratio} of {self.embed_dim} channels is not a possible number of hidden channels; it must "
                    "give at least 1"
                )

    @property
    def num_passes(self) -> int:
        """Number of times that each block is applied."""
        return len(self.groups)

    @property
    def depth(self) -> int:
        """Layers executed per image."""
        return self.num_blocks * self.num_passes

    def check(self, num_tokens: int) -> None:
        """Raises `InputError` if `num_tokens` cannot form the slices of some pass."""
        most = max(self.groups)
        try:
            slice_lengths(num_tokens, most)
        except InputError as error:
            raise InputError(f"groups {self.groups}, pass {self.groups.index(most) + 1}: {error}") from None


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
        if self.global_pool == "" and self.num_classes:
            raise InputError(f"global_pool '' with {self.num_classes} classes; use avg or max, or set num_classes to 0")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.embed_dim % before.embed_dim:
                raise InputError(
                    f"a stage of {after.embed_dim} channels cannot follow one of {before.embed_dim}; "
                    f"use a multiple of {before.embed_dim}"
                )
        self.check(self.input_size)

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config that `to_dict` wrote. Raises `InputError` naming unknown or missing fields."""
        stages = values.get("stages")
        if not isinstance(stages, list | tuple) or not all(
            isinstance(stage, Mapping | StageConfig) for stage in stages
        ):
            raise InputError(f"stages must be a list of stage configurations, not {stages!r}")
        found = (s if isinstance(s, StageConfig) else StageConfig(**_known_fields(StageConfig, s)) for s in stages)
        return cls(**{**_known_fields(cls, values), "stages": tuple(found)})

    def with_changes(self, changes: Mapping[str, Any]) -> "ModelConfig":
        """This config with some fields changed, given as plain values. Raises `InputError` as `from_dict` does."""
        return ModelConfig.from_dict({**self.to_dict(), **changes})


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(cls)]
    for name in values:
        if name not in names:
            raise InputError(
                f"{cls.__name__} has no field {name!r} (it has {', '.join(names)}){did_you_mean(name, names)}"
            )
    for field in fields(cls):
        if field.default is MISSING and field.name not in values:
            raise InputError(f"{cls.__name__} needs {field.name}")
    return dict(values)
