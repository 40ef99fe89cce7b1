"""Registers the named models with timm: `import sret; timm.create_model("sret_t", pretrained=True)`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from sret.checkpoints import download
from sret.errors import InputError
from sret.models.config import ModelConfig, num_stem_maps
from sret.models.timm.cfg import timm_cfg
from sret.models.variants import CONFIGS, DEEP, RELEASES, Release, config_of

if TYPE_CHECKING:
    from sret.models.sret import SReT


def _default_cfg(name: str, release: Release | None = None) -> dict[str, Any]:
    return {
        **timm_cfg(config_of(name)),
        "url": download.drive_url(release.drive_id) if release else "",
        "origin_url": "https://github.com/szq0214/SReT",
        "paper_ids": "arXiv:2111.05297",
    }


_cfgs: dict[str, Any] = {name: _default_cfg(name, release) for name, release in RELEASES.items()}
_cfgs |= {name: _default_cfg(name) for name in DEEP}
# `register_model` reads this name in the module of an entry point.
default_cfgs = generate_default_cfgs(_cfgs)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Builds a model as timm's entry points do, but reads files by `sret.checkpoints.adapt`, not by timm's loader."""
    # Imported here, because this module is imported while timm is, perhaps during an import of these modules.
    from sret.checkpoints.adapt import transfer_file
    from sret.models.sret import SReT

    has_stem_features = kwargs.pop("stem_features", False)
    feature_cls = kwargs.get("feature_cls", "getter")
    if has_stem_features and feature_cls != "getter":
        raise InputError(f"stem_features needs feature_cls 'getter', not {feature_cls!r}")
    source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    path: Path | str | None = None
    if pretrained and not source.state_dict:
        if source.file and not Path(source.file).is_dir():  # a folder comes from timm's "local-dir:"
            path = source.file
        elif download.is_drive_url(source.url) and source.source not in ("hf-hub", "local-dir"):
            path = download.fetch(str(source.url))

    def build(cfg: ModelConfig, device: Any = None, dtype: Any = None, **options: Any) -> "SReT":
        model = SReT(cfg.with_changes(options), has_stem_features).to(device, dtype)
        if path:  # now, because timm removes what `features_only` does not need afterwards
            transfer_file(model, path)
        return model

    num_maps = len(kwargs.get("stages", CONFIGS[variant].stages))
    if has_stem_features:
        num_maps += num_stem_maps(kwargs.get("stem_stride", CONFIGS[variant].stem_stride))
    return build_model_with_cfg(
        build,
        variant,
        pretrained and not path,
        model_cfg=CONFIGS[variant],
        pretrained_filter_fn=_resized,
        feature_cfg={
            "out_indices": tuple(range(num_maps)),
            "feature_cls": "getter",
            "flatten_sequential": True,
        },
        **kwargs,
    )


def _resized(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Called by timm's loader for weights of its hub or a folder: resizes the position embedding for the model.

    timm itself adapts the first convolution and the classifier.
    """
    from sret.layers.position import resize

    grid = model.state_dict()["pos_embed.weight"].shape[-2:]
    return {**state_dict, "pos_embed.weight": resize(state_dict["pos_embed.weight"], (grid[0], grid[1]))}


def register(name: str, variant: str, **options: Any) -> None:
    """Registers a named model with other options under a new name, for libraries that take only a name of timm.

        sret.registry.register("sret_t_stem", "sret_t", stem_features=True)
        segmentation_models_pytorch.Unet("tu-sret_t_stem")

    Args:
        options: of `timm.create_model`: fields of `ModelConfig`, and `stem_features`.

    Raises `InputError` for an unknown variant, and for a name that timm does not allow.
    """
    config_of(variant)
    if not re.fullmatch(r"\w+", name):
        raise InputError(f"{name!r} is not a name for timm; use letters, digits and _")

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, pretrained, **{**options, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{variant}, see `sret info {variant}`."
    register_model(entrypoint)


for _variant in CONFIGS:
    register(_variant, _variant)
