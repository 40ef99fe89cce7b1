"""Describes a model and its inputs as a `pretrained_cfg`, which timm's data functions read."""

from collections.abc import Sequence
from typing import Any

from sret.models.config import ModelConfig
from sret.models.variants import architecture_of


def timm_cfg(
    config: ModelConfig,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> dict[str, Any]:
    """The configuration. Mean and std default to those of ImageNet, or to 0.5 if there are not three channels."""
    # Imported here: importing timm imports `sret.registry`, which must not find this module half-imported.
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    is_rgb = config.in_chans == 3
    return {
        "architecture": architecture_of(config)[0],
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, *config.input_size),
        "pool_size": config.grids()[-1],
        "fixed_input_size": False,
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "mean": tuple(mean or (IMAGENET_DEFAULT_MEAN if is_rgb else (0.5,) * config.in_chans)),
        "std": tuple(std or (IMAGENET_DEFAULT_STD if is_rgb else (0.5,) * config.in_chans)),
        "first_conv": "stem.conv1",
        "classifier": "head",
    }
