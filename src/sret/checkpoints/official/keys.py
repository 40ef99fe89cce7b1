"""Translates the authors' state dicts into ours and back; no other module contains their key names.

A shared block is stored once per pass, under each position of its stage at which it is used: with R passes, pass r of
block i is position 2 (i R + r), and the projection after it is the next position.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sret.checkpoints.files import StateDict
from sret.checkpoints.fit import EXITS, differences
from sret.errors import InputError, first_few
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.variants import PUBLISHED

_STEM = {f"patch_embed.{name}.": f"stem.{name}." for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")}
_BLOCK = {
    "norm1.": "attn.norm.",
    "attn.": "attn.branch.",
    "coefficient1.bias": "attn.alpha",
    "coefficient2.bias": "attn.beta",
    "norm2.": "mlp.norm.",
    "mlp.": "mlp.branch.",
    "coefficient3.bias": "mlp.alpha",
    "coefficient4.bias": "mlp.beta",
}
_PROJECTION = {
    "norm1.": "norm.",
    "mlp.": "branch.",
    "coefficient1.bias": "alpha",
    "coefficient2.bias": "beta",
}


def official_keys(config: ModelConfig) -> dict[str, list[str]]:
    """Our key -> the authors' keys of the same tensor, in the order of use; more than one where a block is shared."""
    with torch.device("meta"):
        ours = SReT(config).state_dict()
    return {key: _official_names(key, config) for key in ours}


def _official_names(key: str, config: ModelConfig) -> list[str]:
    if key == "pos_embed.weight":
        return ["pos_embed"]
    if match := re.fullmatch(r"stages\.(\d+)\.pool\.(.*)", key):
        return [f"pools.{int(match[1]) - 1}.{match[2]}"]
    if match := re.fullmatch(r"stages\.(\d+)\.recursions\.(\d+)\.(block|projections\.(\d+))\.(.*)", key):
        stage, recursion, num_passes = int(match[1]), int(match[2]), config.stages[int(match[1])].num_passes
        if match[3] == "block":
            positions = [2 * (recursion * num_passes + i) for i in range(num_passes)]
            name = _renamed(match[5], _BLOCK)
        else:
            positions = [2 * (recursion * num_passes + int(match[4])) + 1]
            name = _renamed(match[5], _PROJECTION)
        return [f"transformers.{stage}.blocks.{position}.{name}" for position in positions]
    return [_renamed(key, _STEM)]


def _renamed(key: str, official_to_ours: Mapping[str, str]) -> str:
    for official, ours in official_to_ours.items():
        if key.startswith(ours):
            return official + key[len(ours) :]
    return key


def to_official(state_dict: Mapping[str, Tensor], config: ModelConfig) -> StateDict:
    """Our state dict under the authors' names, a shared tensor under each of its positions.

    Raises `InputError` for a model with exits.
    """
    if config.exits != "none":
        raise InputError("the authors' format has no exits; use a .safetensors file")
    return {name: state_dict[key] for key, names in official_keys(config).items() for name in names}


def from_official(state_dict: Mapping[str, Tensor], config: ModelConfig) -> StateDict:
    """The authors' state dict under our names, every tensor once.

    Raises `InputError` if keys or shapes are not those of `config`, naming them and the most similar variant, or if two
    positions of a shared block hold different values.
    """
    names = official_keys(config)
    wrong = differences({key: tensor.shape for key, tensor in state_dict.items()}, shapes_of(config))
    if wrong:
        raise InputError(f"the checkpoint does not fit this model: {first_few(wrong)}. {most_similar(state_dict)}")
    converted = {}
    for key, duplicates in names.items():
        first = state_dict[duplicates[0]]
        for other in duplicates[1:]:
            if not torch.equal(first, state_dict[other]):
                raise InputError(
                    f"{duplicates[0]} and {other} should be one shared tensor but differ; "
                    "this checkpoint was not trained with shared weights, or was altered"
                )
        converted[key] = first
    return converted


def matching_config(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> ModelConfig:
    """`config` with the classes, channels, exits and image size that a state dict, ours or the authors', is for."""
    changes: dict[str, Any] = {"num_classes": 0, "global_pool": "avg"}
    if not any(key.startswith(EXITS) for key in state_dict):
        changes["exits"] = "none"
    for key, tensor in state_dict.items():
        if key == "head.weight" and tensor.ndim > 0:
            changes["num_classes"] = tensor.shape[0]
        elif key in ("patch_embed.conv1.weight", "stem.conv1.weight") and tensor.ndim > 1:
            changes["in_chans"] = tensor.shape[1]
        elif key in ("pos_embed", "pos_embed.weight") and tensor.ndim == 4:
            changes["img_size"] = tuple(tokens * config.stem_stride for tokens in tensor.shape[2:])
    return replace(config, **changes)


@functools.cache
def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Key -> shape of the authors' state dict for this configuration."""
    with torch.device("meta"):
        ours = SReT(config).state_dict()
    return {name: tensor.shape for name, tensor in to_official(ours, config).items()}


def most_similar(state_dict: Mapping[str, Tensor]) -> str:
    """A sentence that names the published models that the authors' state dict fits, or fits best."""
    fitting = fitting_variants(state_dict)
    if fitting:
        return f"It fits {' or '.join(fitting)}"

    def matches(variant: str) -> int:
        return sum(key in state_dict and state_dict[key].shape == s for key, s in shapes_of(PUBLISHED[variant]).items())

    best = max(PUBLISHED, key=matches)
    if not matches(best):
        return "It fits no published SReT; is it a checkpoint of the authors' release?"
    return f"The most similar variant is {best}: {matches(best)} of {len(state_dict)} tensors fit"


def fitting_variants(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Variants whose keys and shapes the authors' state dict has, whatever its number of classes.

    Weights do not depend on slices, so the sliced and unsliced models of one size all fit.
    """
    shapes = {key: tensor.shape for key, tensor in state_dict.items() if not key.startswith("head.")}
    return [
        variant
        for variant, config in PUBLISHED.items()
        if {key: shape for key, shape in shapes_of(config).items() if not key.startswith("head.")} == shapes
    ]
