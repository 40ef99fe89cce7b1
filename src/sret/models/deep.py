"""Models of any depth within a budget of parameters: few distinct blocks, each applied many times.

A layer is one pass of attention and MLP. Depth lies where it costs least: a 64th of the layers in the first stage, a
quarter in the second, the rest in the third, where tokens are fewest. The linear layers of a pass take as many
multiply-adds in each stage (channels double where tokens become a quarter), but attention makes a pass of the first
stage two to three times as dear, and its input takes twice and four times the memory. Nothing is sliced: of all passes
together attention is a tenth.
"""

from collections.abc import Callable

from sret.errors import InputError
from sret.models.config import ModelConfig, StageConfig
from sret.models.cost import model_cost
from sret.ranges import PositiveInt, check_number

BLOCKS = (1, 2, 2)  # distinct ones per stage
HEAD_DIM = 32
MLP_RATIO = 4.0
# Projections take a hidden ratio from the first to the last: thousands of them share what the blocks leave.
LEAST_RATIO, MOST_RATIO = 0.05, 1.0  # in hundredths between
FEWEST_LAYERS = sum(BLOCKS)


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
    """The model of exactly so many layers and at most so many parameters.

    The channels of the first stage are the most (a multiple of 32, doubled from stage to stage) with which projections
    of a twentieth of the channels still fit; the projections then become as large as the budget lets them, up to the
    number of channels.

    Args:
        layers: passes of attention and MLP, over all blocks.
        max_parameters: with the classifier.
        embed_dim: channels of the first stage instead, to compare depths at one width.

    Raises `InputError` naming the nearest that can be, if there is no such model.
    """
    check_number("layers", layers, PositiveInt)
    check_number("max_parameters", max_parameters, PositiveInt)
    if layers < FEWEST_LAYERS:
        raise InputError(f"layers is {layers}; the stages have {FEWEST_LAYERS} blocks, so that is the fewest")
    if embed_dim is not None:
        _check_width(embed_dim)

    def config(dim: int, ratio: float, layers: int = layers) -> ModelConfig:
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
        return ModelConfig(
            stages=stages,
            img_size=img_size,
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            residual_scale="passes",
            memory="nested",
        )

    def parameters(dim: int, ratio: float) -> int:
        return model_cost(config(dim, ratio)).parameters

    def slimmest(num_layers: int) -> ModelConfig:
        return config(dim, LEAST_RATIO, num_layers)

    dim = embed_dim or HEAD_DIM
    if parameters(dim, LEAST_RATIO) > max_parameters:
        raise InputError(
            f"{layers} layers of {dim} channels have {parameters(dim, LEAST_RATIO):,} parameters or more, and "
            f"max_parameters is {max_parameters:,}; {_nearest(layers, max_parameters, slimmest)}"
        )
    while embed_dim is None and parameters(dim + HEAD_DIM, LEAST_RATIO) <= max_parameters:
        dim += HEAD_DIM
    few, many = round(100 * LEAST_RATIO), round(100 * MOST_RATIO)
    while few < many:  # the most hundredths that fit
        middle = (few + many + 1) // 2
        few, many = (middle, many) if parameters(dim, middle / 100) <= max_parameters else (few, middle - 1)
    return config(dim, few / 100)


def _check_width(embed_dim: int) -> None:
    """Raises `InputError` for channels that do not form heads of about 32 in all three stages."""
    check_number("embed_dim", embed_dim, PositiveInt)
    dims = [embed_dim * 2**i for i in range(len(BLOCKS))]
    if embed_dim * LEAST_RATIO < 1 or any(dim % max(1, dim // HEAD_DIM) for dim in dims):
        near = max(HEAD_DIM, round(embed_dim / HEAD_DIM) * HEAD_DIM)
        raise InputError(
            f"embed_dim is {embed_dim}, which forms no heads of about {HEAD_DIM} channels in each stage: try {near}"
        )


def _nearest(layers: int, max_parameters: int, slimmest: Callable[[int], ModelConfig]) -> str:
    """The most layers that the slimmest model has within a budget."""
    few, many = FEWEST_LAYERS - 1, layers
    while few < many:
        middle = (few + many + 1) // 2
        fits = model_cost(slimmest(middle)).parameters <= max_parameters
        few, many = (middle, many) if fits else (few, middle - 1)
    if few < FEWEST_LAYERS:
        return f"the smallest model, of {FEWEST_LAYERS} layers, has {model_cost(slimmest(FEWEST_LAYERS)).parameters:,}"
    return f"that is enough for {few} layers"


def passes_of(layers: int) -> tuple[int, int, int]:
    """How often each block of the three stages is applied, for so many layers in all."""
    first = max(1, round(layers / 64))
    first += (layers - first) % 2  # the other stages have two blocks each
    second = max(1, round(layers / 8))
    third = (layers - first) // 2 - second
    return (first, second, third)
