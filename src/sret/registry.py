"""Registers the named models with timm: `import sret; timm.create_model("sret_t", pretrained=True)`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from sret.checkpoints import download
from sret.errors import InputError, did_you_mean
from sret.models.config import ModelConfig
from sret.models.variants import CONFIGS, DEEP, RELEASES, Release, config_of

if TYPE_CHECKING:
    from sret.models.sret import SReT


def _default_cfg(name: str, release: Release | None = None) -> dict[str, Any]:
    config = config_of(name)
    height, width = config.input_size
    return {
        "url": download.drive_url(release.drive_id) if release else "",
        "num_classes": config.num_classes,
        "input_size": (3, height, width),
        "pool_size": config.grids()[-1],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head",
        "origin_url": "https://github.com/szq0214/SReT",
        "paper_ids": "arXiv:2111.05297",
    }


_cfgs: dict[str, Any] = {name: _default_cfg(name, release) for name, release in RELEASES.items()}
_cfgs |= {name: _default_cfg(name) for name in DEEP}
default_cfgs = generate_default_cfgs(_cfgs)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """What timm's entry points do, with files read by `sret.checkpoints.adapt` instead of timm's loader."""
    # Here, because this module is imported while timm is, perhaps in the midst of an import of these.
    from sret.checkpoints.adapt import transfer_file
    from sret.models.sret import SReT

    source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    path: Path | str | None = None
    if pretrained and not source.state_dict:
        path = source.file or (download.fetch(str(source.url)) if download.is_drive_url(source.url) else None)

    def build(cfg: ModelConfig, **options: Any) -> "SReT":
        names = list(cfg.to_dict())
        for name in options:
            if name not in names:
                raise InputError(
                    f"a model has no option {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
                )
        model = SReT(replace(cfg, **options))
        if path:  # here, since timm prunes what `features_only` does not need
            transfer_file(model, path)
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained and not path,
        model_cfg=CONFIGS[variant],
        feature_cfg={"out_indices": tuple(range(len(CONFIGS[variant].stages))), "feature_cls": "getter"},
        **kwargs,
    )


def _register(variant: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f"{variant}, see `sret info {variant}`."
    register_model(entrypoint)


for _variant in CONFIGS:
    _register(_variant)
