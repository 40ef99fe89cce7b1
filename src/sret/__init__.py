"""Recursive vision transformers: build, train, measure, ship.

Importing `sret` registers the published models with timm: `timm.create_model("sret_t")`.
"""

from sret import layers, registry, weights
from sret.checkpoint import load
from sret.config import ModelConfig, StageConfig
from sret.cost import model_cost
from sret.deep import deep_config
from sret.errors import InputError
from sret.fuse import fuse
from sret.model import SReT
from sret.weights import load_official

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "ModelConfig",
    "SReT",
    "StageConfig",
    "deep_config",
    "fuse",
    "layers",
    "load",
    "load_official",
    "model_cost",
    "registry",
    "weights",
]
