"""Registers the named models with timm: `import sret; timm.create_model("sret_t", pretrained=True)`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from sret.checkpoints import download
from sret.errors import InputError, did_you_mean
from sret.models.config import ModelConfig
from sret.models.timm_cfg import timm_cfg
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
default_cfgs = generate_default_cfgs(_cfgs)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Builds a model as timm's entry points do, but reads files by `sret.checkpoints.adapt`, not by timm's loader."""
    # Imported here, because this module is imported while timm is, perhaps during an import of these modules.
    from sret.checkpoints.adapt import transfer_file
    from sret.models.sret import SReT

    source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    path: Path | str | None = None
    if pretrained and not source.state_dict:
        if source.file and not Path(source.file).is_dir():  # a folder comes from timm's "local-dir:"
            path = source.file
        elif download.is_drive_url(source.url) and source.source not in ("hf-hub", "local-dir"):
            path = download.fetch(str(source.url))

    def build(cfg: ModelConfig, device: Any = None, dtype: Any = None, **options: Any) -> "SReT":
        names = list(cfg.to_dict())
        for name in options:
            if name not in names:
                raise InputError(
                    f"a model has no option {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
                )
        model = SReT(replace(cfg, **options)).to(device, dtype)
        if path:  # now, because timm removes what `features_only` does not need afterwards
            transfer_file(model, path)
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained and not path,
        model_cfg=CONFIGS[variant],
        pretrained_filter_fn=_resized,
        feature_cfg={
            "out_indices": tuple(range(len(CONFIGS[variant].stages))),
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


def _register(variant: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f"{variant}, see `sret info {variant}`."
    register_model(entrypoint)


for _variant in CONFIGS:
    _register(_variant)
