"""Computes what a model costs from its configuration: parameters, MACs and bytes, per stage and pass.

A multiply-add (MAC) is 2 FLOPs. As in the published figures, convolutions, linear layers and both products of
attention are counted; norms, activations, softmax, biases and additions are not.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from sret.kernels.slices import slice_lengths
from sret.models.config import STEM_STRIDES, ModelConfig
from sret.models.stage_config import StageConfig


@dataclass(frozen=True)
class PassCost:
    """One pass of every block of a stage: its number of slices, the longest slice in tokens, and MACs.

    The length is that before tokens are merged.
    """

    num_groups: int
    slice_length: int
    macs: int


@dataclass(frozen=True)
class StageCost:
    """One stage: tokens, parameters of its parts, MACs (pool included) and the cost of each pass."""

    grid: tuple[int, int]
    pool_parameters: int
    block_parameters: int
    projection_parameters: int
    macs: int
    passes: tuple[PassCost, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters; those of a shared block are counted once."""
        return self.pool_parameters + self.block_parameters + self.projection_parameters


@dataclass(frozen=True)
class ModelCost:
    """A whole model: its stages, the parameters of the other parts, and the MACs for one image."""

    stages: tuple[StageCost, ...]
    stem_parameters: int
    position_parameters: int
    head_parameters: int  # and those of the norm before it
    macs: int  # without exits
    exit_parameters: int = 0
    exit_macs: tuple[int, ...] = ()  # up to each exit, the classifiers before it included; the last is the whole model

    @property
    def parameters(self) -> int:
        """Number of parameters; those of a shared block are counted once."""
        return sum(self.parameters_by_part().values())

    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters of each part of the model."""
        return {
            "stem": self.stem_parameters,
            "position embedding": self.position_parameters,
            "blocks": sum(stage.block_parameters for stage in self.stages),
            "projections": sum(stage.projection_parameters for stage in self.stages),
            "pools": sum(stage.pool_parameters for stage in self.stages),
            "head": self.head_parameters,
            **({"exits": self.exit_parameters} if self.exit_parameters else {}),
        }

    @property
    def flops(self) -> int:
        """Floating-point operations: 2 for a MAC."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Size of the weights in float32, in bytes."""
        return 4 * self.parameters


def model_cost(config: ModelConfig, img_size: tuple[int, int] | None = None) -> ModelCost:
    """The cost of one image at `img_size` pixels (the configured size by default).

    Raises `InputError` if the slices cannot be formed at that size.
    """
    size = img_size or config.input_size
    config.check(size)
    grids = config.grids(size)
    stem_parameters, stem_macs = _stem(config, size)
    coefficients = 0 if not config.learnable_residual else 1 if config.reversible else 2  # of each residual
    dims = [None, *(stage.embed_dim for stage in config.stages)]
    stages = tuple(
        _stage(stage, grid, in_dim, coefficients)
        for stage, grid, in_dim in zip(config.stages, grids, dims[:-1], strict=True)
    )
    dim, exit_dims = config.stages[-1].embed_dim, _exit_dims(config)
    norms = 2 * sum(exit_dims) if config.exits == "stages" else 0
    return ModelCost(
        stages=stages,
        stem_parameters=stem_parameters,
        position_parameters=config.stages[0].embed_dim * _area(config.grids()[0]),
        head_parameters=2 * dim + (dim + 1) * config.num_classes,
        macs=stem_macs + sum(stage.macs for stage in stages) + dim * config.num_classes,
        exit_parameters=norms + sum((width + 1) * config.num_classes for width in exit_dims),
        exit_macs=_exit_macs(config, stem_macs, stages),
    )


def _exit_dims(config: ModelConfig) -> list[int]:
    """Channels at each exit before the last one."""
    if config.exits == "stages":
        return [stage.embed_dim for stage in config.stages[:-1]]
    return [config.stages[-1].embed_dim] * config.num_exits


def _exit_macs(config: ModelConfig, stem_macs: int, stages: tuple[StageCost, ...]) -> tuple[int, ...]:
    """MACs up to each exit, including all classifiers so far."""
    if config.exits == "passes":
        last, num_blocks = stages[-1], config.stages[-1].num_blocks
        before = stem_macs + sum(stage.macs for stage in stages) - sum(cost.macs for cost in last.passes)
        parts = [cost.macs // num_blocks for cost in last.passes] * num_blocks
        parts[0] += before
    elif config.exits == "stages":
        parts = [stage.macs for stage in stages]
        parts[0] += stem_macs
    else:
        parts = [stem_macs + sum(stage.macs for stage in stages)]
    dims = [*_exit_dims(config), config.stages[-1].embed_dim]
    return tuple(accumulate(part + dim * config.num_classes for part, dim in zip(parts, dims, strict=True)))


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _stem(config: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters and MACs of the three convolutions, BatchNorm's parameters included."""
    dim = config.stages[0].embed_dim
    channels = [config.in_chans, dim // 2, dim, dim]
    parameters, macs, grid = 0, 0, size
    for c_in, c_out, stride in zip(channels, channels[1:], STEM_STRIDES[config.stem_stride], strict=False):
        grid = (-(-grid[0] // stride), -(-grid[1] // stride))
        parameters += 9 * c_in * c_out + 3 * c_out
        macs += 9 * c_in * c_out * _area(grid)
    return parameters, macs


def _stage(stage: StageConfig, grid: tuple[int, int], in_dim: int | None, coefficients: int) -> StageCost:
    C, N = stage.embed_dim, _area(grid)
    hidden = int(C * stage.mlp_ratio)
    projection_hidden = 0 if stage.projection_ratio is None else int(C * stage.projection_ratio)

    def mlp(hidden: int) -> int:  # with its norm and residual
        return 2 * C * hidden + hidden + C + 2 * C + coefficients

    attention = 4 * C * C + 4 * C + 2 * C + coefficients
    projection = mlp(projection_hidden) if projection_hidden else 0

    @lru_cache  # most layers of a deep model are equal
    def layer(num_groups: int, before: int, after: int) -> int:
        """MACs of a layer that merges tokens after attention."""
        lengths = slice_lengths(before, num_groups)
        linear = before * C * 4 * C + after * C * (2 * hidden + 2 * projection_hidden)
        attended = 2 * C * sum(slices * length**2 for slices, length in lengths)
        pairs = sum(slices * (-(-length // 2)) * (length // 2) for slices, length in lengths)
        return linear + attended + (C // stage.num_heads * pairs if after < before else 0)

    num_tokens = stage.lengths(N) if stage.merge else [N] * (stage.depth + 1)
    layers = [
        layer(num_groups, before, after)
        for num_groups, before, after in zip(stage.groups * stage.num_blocks, num_tokens, num_tokens[1:], strict=False)
    ]
    passes = tuple(
        PassCost(num_groups, slice_lengths(N, num_groups)[0][1], sum(layers[i :: stage.num_passes]))
        for i, num_groups in enumerate(stage.groups)
    )
    pool_parameters, pool_macs = (10 * C, 9 * C * N) if in_dim else (0, 0)
    return StageCost(
        grid=grid,
        pool_parameters=pool_parameters,
        block_parameters=stage.num_blocks * (attention + mlp(hidden)),
        projection_parameters=stage.num_blocks * stage.num_passes * projection,
        macs=sum(cost.macs for cost in passes) + pool_macs,
        passes=passes,
    )
