"""Recursive vision transformers: build, train, evaluate and export them.

Importing `sret` registers its models with timm: `timm.create_model("sret_t")`.

The names below are imported when they are first used, and the models are registered when timm is imported, because
torch and timm take seconds to import, and `sret --help` needs neither.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sret.version import __version__ as __version__

if TYPE_CHECKING:
    from sret import layers, registry
    from sret.checkpoints import official as weights
    from sret.checkpoints.card import load
    from sret.checkpoints.official import load_official
    from sret.errors import InputError
    from sret.models.config import ModelConfig
    from sret.models.cost import model_cost
    from sret.models.deep import deep_config
    from sret.models.fuse import fuse
    from sret.models.merge import merge_tokens
    from sret.models.recursify import recursify, recursify_cost, recursify_distance
    from sret.models.sret import SReT
    from sret.models.stage_config import StageConfig
    from sret.models.timm.config import TimmConfig

__all__ = [
    "InputError",
    "ModelConfig",
    "SReT",
    "StageConfig",
    "TimmConfig",
    "deep_config",
    "fuse",
    "layers",
    "load",
    "load_official",
    "merge_tokens",
    "model_cost",
    "recursify",
    "recursify_cost",
    "recursify_distance",
    "registry",
    "weights",
]

_MODULE_OF = {
    "InputError": "sret.errors",
    "ModelConfig": "sret.models.config",
    "SReT": "sret.models.sret",
    "StageConfig": "sret.models.stage_config",
    "TimmConfig": "sret.models.timm.config",
    "deep_config": "sret.models.deep",
    "fuse": "sret.models.fuse",
    "layers": "sret.layers",
    "load": "sret.checkpoints.card",
    "load_official": "sret.checkpoints.official",
    "merge_tokens": "sret.models.merge",
    "model_cost": "sret.models.cost",
    "recursify": "sret.models.recursify",
    "recursify_cost": "sret.models.recursify",
    "recursify_distance": "sret.models.recursify",
    "registry": "sret.registry",
    "weights": "sret.checkpoints.official",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sret' has no attribute {name!r}")
    module = importlib.import_module(_MODULE_OF[name])
    return module if name in ("layers", "registry", "weights") else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _RegisterWithTimm(MetaPathFinder):
    """Imports `sret.registry` right after timm."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and (loader := spec.loader) is not None:
            exec_timm = loader.exec_module

            def exec_and_register(module: ModuleType) -> None:
                exec_timm(module)
                importlib.import_module("sret.registry")

            loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("sret.registry")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
