"""Models of any depth within a parameter budget: few distinct blocks, each applied many times.

A layer is one pass of attention and MLP. Most layers are in the cheapest stage: 1/64 of them in the first stage, a
quarter in the second, the rest in the third, which has the fewest tokens. The linear layers of a pass need the same
number of MACs in each stage (channels double where tokens become a quarter), but attention makes a pass of the
first stage two to three times as expensive, and its input takes twice the memory of the second stage's and four times
that of the third's. Nothing is sliced: attention is a tenth of the cost of all passes.
"""

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any

from sret.errors import InputError
from sret.models.config import ModelConfig
from sret.models.cost import model_cost
from sret.models.stage_config import StageConfig
from sret.ranges import PositiveInt, check_number

BLOCKS = (1, 2, 2)  # distinct ones per stage
HEAD_DIM = 32
MLP_RATIO = 4.0
# Hidden ratios of the projections. There are thousands of projections, which get the parameters that the blocks leave.
MIN_RATIO, MAX_RATIO = 0.05, 1.0  # in steps of 0.01
MIN_LAYERS = sum(BLOCKS)


def deep_config(
    *,
    layers: int,
    max_parameters: int,
    embed_dim: int | None = None,
    img_size: int | tuple[int, int] = 224,
    stem_stride: int = 8,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> ModelConfig:
    """The configuration with exactly `layers` layers and at most `max_parameters` parameters.

    The first stage gets as many channels (a multiple of 32, doubled from stage to stage) as fit with the smallest
    projections, of hidden ratio 0.05. Then the projections get the largest ratio that fits, up to 1.

    Args:
        layers: passes of attention and MLP, over all blocks.
        max_parameters: including the classifier.
        embed_dim: channels of the first stage, if given; used to compare depths at the same width.

    Raises `InputError` with the nearest possible value if there is no such model.
    """
    check_number("layers", layers, PositiveInt)
    check_number("max_parameters", max_parameters, PositiveInt)
    if layers < MIN_LAYERS:
        raise InputError(f"layers is {layers}; it must be at least {MIN_LAYERS}, the number of blocks")
    if embed_dim is not None:
        _check_width(embed_dim)

    smallest_of = partial(
        _config,
        ratio=MIN_RATIO,
        img_size=img_size,
        stem_stride=stem_stride,
        num_classes=num_classes,
        in_chans=in_chans,
    )
    dim = embed_dim or HEAD_DIM
    smallest = _parameters(smallest_of(layers, dim))
    if smallest > max_parameters:
        raise InputError(
            f"{layers} layers of {dim} channels need at least {smallest:,} parameters, and max_parameters is "
            f"{max_parameters:,}; {_nearest(layers, max_parameters, partial(smallest_of, dim=dim))}"
        )
    while embed_dim is None and _parameters(smallest_of(layers, dim + HEAD_DIM)) <= max_parameters:
        dim += HEAD_DIM
    ratios = [hundredths / 100 for hundredths in range(round(100 * MIN_RATIO), round(100 * MAX_RATIO) + 1)]
    fitting = bisect_right(ratios, max_parameters, key=lambda ratio: _parameters(smallest_of(layers, dim, ratio=ratio)))
    return smallest_of(layers, dim, ratio=ratios[fitting - 1])


def _config(layers: int, dim: int, ratio: float, **shape: Any) -> ModelConfig:
    """`layers` layers, `dim` channels in the first stage, projections with `ratio` hidden channels per channel."""
    stages = tuple(
        StageConfig(
            embed_dim=dim * 2**i,
            num_heads=max(1, dim * 2**i // HEAD_DIM),
            num_blocks=blocks,
            groups=(1,) * passes,
            mlp_ratio=MLP_RATIO,
            projection_ratio=ratio,
        )
        for i, (blocks, passes) in enumerate(zip(BLOCKS, passes_of(layers), strict=True))
    )
    return ModelConfig(stages=stages, residual_scale="passes", memory="nested", **shape)


def _parameters(config: ModelConfig) -> int:
    return model_cost(config).parameters


def _check_width(embed_dim: int) -> None:
    """Raises `InputError` if the channels cannot form heads of about 32 channels in all three stages."""
    check_number("embed_dim", embed_dim, PositiveInt)
    dims = [embed_dim * 2**i for i in range(len(BLOCKS))]
    if embed_dim * MIN_RATIO < 1 or any(dim % max(1, dim // HEAD_DIM) for dim in dims):
        near = max(HEAD_DIM, round(embed_dim / HEAD_DIM) * HEAD_DIM)
        raise InputError(
            f"embed_dim is {embed_dim}, which cannot form heads of about {HEAD_DIM} channels in each stage; try {near}"
        )


def _nearest(layers: int, max_parameters: int, smallest_of: Callable[[int], ModelConfig]) -> str:
    """Says how many layers fit into the budget with the smallest projections."""
    depths = range(MIN_LAYERS, layers)
    fitting = bisect_right(depths, max_parameters, key=lambda depth: _parameters(smallest_of(depth)))
    if not fitting:
        return f"the smallest model, of {MIN_LAYERS} layers, has {_parameters(smallest_of(MIN_LAYERS)):,}"
    return f"that is enough for {depths[fitting - 1]} layers"


def passes_of(layers: int) -> tuple[int, int, int]:
    """The number of passes of each block, in each of the three stages, for `layers` layers in total."""
    first = max(1, round(layers / 64))
    first += (layers - first) % 2  # the other stages have two blocks each
    second = max(1, round(layers / 8))
    third = (layers - first) // 2 - second
    return (first, second, third)
