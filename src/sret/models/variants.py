"""Named models: the published ones, with the Drive ids of the authors' weights, and deep ones.

Sizes and slices: Shen, Liu, Xing, ECCV 2022, arXiv:2111.05297 and the authors' release. Accuracies are the authors'
ImageNet-1K top-1; none has been reproduced here.
"""

from dataclasses import dataclass, fields
from typing import Any

from sret.errors import InputError, did_you_mean
from sret.models.config import ModelConfig
from sret.models.deep import deep_config
from sret.models.stage_config import StageConfig

GROUPS_SLICED = ((8, 2), (4, 1), (1, 1))  # per stage: slices in pass one, slices in pass two
GROUPS_SLICED_ONCE = ((16, 1), (14, 1), (1, 1))
GROUPS_UNSLICED = ((1, 1), (1, 1), (1, 1))


@dataclass(frozen=True)
class Release:
    """One published checkpoint: `official` is the authors' name, `top1` their ImageNet-1K accuracy in percent."""

    official: str
    top1: float
    drive_id: str


def _config(
    dims: tuple[int, int, int],
    heads: tuple[int, int, int],
    mlp_ratio: float,
    projection_ratio: float,
    groups: tuple[tuple[int, int], ...],
    img_size: int = 224,
) -> ModelConfig:
    stages = tuple(
        StageConfig(
            embed_dim=dim,
            num_heads=num_heads,
            num_blocks=num_blocks,
            groups=stage_groups,
            mlp_ratio=mlp_ratio,
            projection_ratio=projection_ratio,
        )
        for dim, num_heads, num_blocks, stage_groups in zip(dims, heads, (2, 5, 3), groups, strict=True)
    )
    return ModelConfig(stages=stages, img_size=img_size)


def _t(groups: tuple[tuple[int, int], ...], img_size: int = 224, mlp_ratio: float = 3.6) -> ModelConfig:
    return _config((64, 128, 256), (2, 4, 8), mlp_ratio, 1.0, groups, img_size)


def _lt(groups: tuple[tuple[int, int], ...]) -> ModelConfig:
    return _t(groups, mlp_ratio=4.0)


def _s(groups: tuple[tuple[int, int], ...], img_size: int = 224) -> ModelConfig:
    return _config((126, 252, 504), (3, 6, 12), 3.0, 2.0, groups, img_size)


PUBLISHED: dict[str, ModelConfig] = {
    "sret_t": _t(GROUPS_SLICED),
    "sret_t_unsliced": _t(GROUPS_UNSLICED),
    "sret_t_unsliced_384": _t(GROUPS_UNSLICED, 384),
    "sret_lt": _lt(GROUPS_SLICED),
    "sret_lt_16_14_1": _lt(GROUPS_SLICED_ONCE),
    "sret_lt_unsliced": _lt(GROUPS_UNSLICED),
    "sret_s": _s(GROUPS_SLICED),
    "sret_s_unsliced": _s(GROUPS_UNSLICED),
    "sret_s_unsliced_384": _s(GROUPS_UNSLICED, 384),
    "sret_s_unsliced_512": _s(GROUPS_UNSLICED, 512),
}

# The number in a name is that of layers (passes of attention and MLP). Models for 32-pixel images have the same width.
DEEP: dict[str, ModelConfig] = {
    **{f"sret_deep_{n}": deep_config(layers=n, max_parameters=14_000_000) for n in (108, 1008)},
    **{
        f"sret_deep_{n}_32": deep_config(
            layers=n, max_parameters=2_500_000, embed_dim=32, img_size=32, stem_stride=4, num_classes=10
        )
        for n in (20, 108, 1008)
    },
}

CONFIGS = {**PUBLISHED, **DEEP}

# Tags: `in1k` trained on ImageNet-1K (the last epoch), `best_in1k` the same run's best epoch, `dist_in1k` distilled,
# at 384 and 512 pixels then fine-tuned. The first tag of a name is its default.
RELEASES: dict[str, Release] = {
    "sret_t.in1k": Release("SReT_T", 76.0, "1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni"),
    "sret_t.dist_in1k": Release("SReT_T_Distill", 77.6, "1xzG4VQyQyxWJfQTcGCE-fuMuK3BwPCjK"),
    "sret_t_unsliced.in1k": Release("SReT_T_wo_slice", 76.1, "1wHM7NRSkz-WykCSES17xFV56h_m5RMXj"),
    "sret_t_unsliced.dist_in1k": Release("SReT_T_wo_slice_Distill", 77.7, "1P1qK-j1Cac5le8-DNUFBbjmIpRThuiVp"),
    "sret_t_unsliced_384.dist_in1k": Release(
        "SReT_T_wo_slice_Distill_Finetune384", 79.7, "11mWAktu6LrNa0Qt61WJGA0eTWoKYD1Be"
    ),
    "sret_lt.in1k": Release("SReT_LT", 76.7, "1uSWvoVLHmOH6rNYiXSxD_rlN5dSBvEm3"),
    "sret_lt.best_in1k": Release("SReT_LT", 76.7, "1INTWy7OOI1aIAWhGAZRR7o2eKpZp37dy"),
    "sret_lt.dist_in1k": Release("SReT_LT_Distill", 77.7, "1l6u0q4kwli5czEyo4TeJANtqsulh-J5G"),
    "sret_lt_16_14_1.in1k": Release("SReT_LT", 76.6, "1sKW9KJ5PLkDVXcW6m7dp8ieLwyCJNRqV"),
    "sret_lt_unsliced.in1k": Release("SReT_LT_wo_slice", 76.8, "1EXwfiMMa1UVQ_tmY6YQJ-Se0b3bW5NpC"),
    "sret_lt_unsliced.best_in1k": Release("SReT_LT_wo_slice", 76.8, "14ulscJSXrTq0AVZEUruvyeA2hrk2hCmV"),
    "sret_lt_unsliced.dist_in1k": Release("SReT_LT_wo_slice_Distill", 77.9, "1FDqkfkw5nZEuTcBmiBKg3lvPJOPQWS6i"),
    "sret_s.in1k": Release("SReT_S", 81.9, "1y6F_bCgS1sagm7pxjAtuSPUB5HoNb8Ed"),
    "sret_s_unsliced.in1k": Release("SReT_S_wo_slice", 82.0, "1vlsxJieKhfnw-F6xFiwczvXBuk7ugXxm"),
    "sret_s_unsliced_384.dist_in1k": Release(
        "SReT_S_wo_slice_Distill_Finetune384", 83.8, "1z5whJpXbbtFdjLpS1pCPvKcJhVnYCeo-"
    ),
    "sret_s_unsliced_512.dist_in1k": Release(
        "SReT_S_wo_slice_Distill_Finetune512", 84.3, "1AZXIGMiGboI-nkoKuPnHnhDlBwZumuiB"
    ),
}


def config_of(name: str) -> ModelConfig:
    """The configuration of a variant, with or without a tag. Raises `InputError` with the nearest name if unknown."""
    variant, _, tag = name.partition(".")
    if variant not in CONFIGS:
        hint = did_you_mean(variant, CONFIGS) or f"; for a model of timm use --model.timm {name}"
        raise InputError(f"unknown model {name!r} (known: {', '.join(CONFIGS)}){hint}")
    if tag and name not in RELEASES:
        if variant in DEEP:
            raise InputError(f"{variant} has no published weights and so no tag {tag!r}; leave the tag out")
        tags = [release.partition(".")[2] for release in RELEASES if release.startswith(f"{variant}.")]
        raise InputError(f"{variant} has no weights tagged {tag!r}{did_you_mean(tag, tags)}; it has {', '.join(tags)}")
    return CONFIGS[variant]


# What timm sets by itself, or what only concerns training.
_NOT_BUILT_IN = ("num_classes", "in_chans", "drop_rate", "drop_path_rate")


def architecture_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The named model that is nearest to a configuration, and the fields to change, as plain values for timm."""
    names = [field.name for field in fields(config) if field.name not in _NOT_BUILT_IN]
    changed = {
        variant: [name for name in names if getattr(config, name) != getattr(known, name)]
        for variant, known in CONFIGS.items()
    }
    nearest = min(changed, key=lambda variant: len(changed[variant]))
    values = config.to_dict() if changed[nearest] else {}
    return nearest, {name: values[name] for name in changed[nearest]}
