"""Weights of one model into another of more or fewer passes.

A block applied R times is taken for a path that R steps divide. In R' passes the same path is walked in other steps:

- Blocks are taken as they are: their weights do not know how often they are applied.
- Pass i of R' takes the projection that stood at the same share of the way, number floor((i + 1/2) R / R').
- Coefficients are made those of a step R / R' times as long: s' beta' = s beta R / R', and the factor of the stream to
  the power of R / R'.
- A projection with more hidden channels than that one has gets new ones whose answers begin at zero; one with fewer
  keeps those of the largest weights. Where the source has none, projections start afresh and silent, with beta = 0.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sret.checkpoint import METADATA_KEY, read_card
from sret.config import ModelConfig, StageConfig
from sret.errors import InputError, naming
from sret.model import SReT
from sret.reading import StateDict, read_safetensors
from sret.variants import config_of
from sret.weights import fitted, from_official, has_shapes_of, identify, load_pretrained, read_official

_KEY = re.compile(r"stages\.(\d+)\.recursions\.(\d+)\.(?:block\.attn|block\.mlp|projections\.(\d+))\.(.*)")

WEIGHTS = ("branch.fc1.weight", "branch.fc2.weight")
HIDDEN_AXIS = {"branch.fc1.weight": 0, "branch.fc1.bias": 0, "branch.fc2.weight": 1}


def read_source(path: str | os.PathLike[str], config: ModelConfig) -> tuple[StateDict, ModelConfig]:
    """Our state dict of a file of ours or of the authors', and the configuration of its model.

    `config`, of the model that shall have them, decides where the file does not say: slices leave no trace in weights.
    Raises `InputError` if the file cannot be read safely, or is of no model.
    """
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; name a file of weights in it, such as {Path(path) / 'best.safetensors'}")
    if Path(path).suffix == ".safetensors":
        state_dict, metadata = read_safetensors(path)
        if METADATA_KEY not in metadata:
            return state_dict, config
        card = read_card(path, metadata[METADATA_KEY])
        if card.is_fused:
            raise InputError(f"{path} is of a fused model, which is for answering; take the weights it was made of")
        return state_dict, card.config
    official, trained_as = read_official(path)
    with naming(path):
        if not has_shapes_of(config, official):
            config = config_of(identify(official, f"{trained_as or ''} {Path(path).name}"))
        source = fitted(config, official)
        return from_official(official, source), source


def load_file(model: SReT, path: str | os.PathLike[str], config: ModelConfig) -> list[str]:
    """The weights of a file into a model: `read_source`, then `transfer`. Its errors name the file."""
    state_dict, source = read_source(path, config)
    with naming(path):
        return transfer(model, state_dict, source)


@torch.no_grad()
def transfer(model: SReT, state_dict: Mapping[str, Tensor], source: ModelConfig) -> list[str]:
    """Our state dict, of a model `source`, into a model with other passes, classes, channels or pictures.

    Returns what was reused, and how, a phrase for each part. Raises `InputError` if anything else differs.
    """
    target, expected = model.config, model.state_dict()
    if source.reversible != target.reversible:
        kinds = {True: "two streams", False: "one stream"}
        raise InputError(
            f"the weights are of a model of {kinds[source.reversible]}, and this one has {kinds[target.reversible]}: "
            f"another function; set reversible to {str(source.reversible).lower()}"
        )
    if len(source.stages) != len(target.stages):
        raise InputError(f"the weights are of {len(source.stages)} stages, and this model has {len(target.stages)}")
    for i, (before, after) in enumerate(zip(source.stages, target.stages, strict=True)):
        if (theirs := _blocks(before)) != (ours := _blocks(after)):
            raise InputError(f"the weights of stage {i + 1} are of {theirs}, and this model has {ours}")
    adapted = {key: value for key, value in state_dict.items() if not _is_walked(key, source)}
    for key, fresh in expected.items():
        if not (match := _KEY.fullmatch(key)):
            continue
        i, name = int(match[1]), match[4]
        before, after = source.stages[i], target.stages[i]
        taken = key
        if match[3] is not None:
            number = (2 * int(match[3]) + 1) * before.num_passes // (2 * after.num_passes)
            taken = key.replace(f".projections.{match[3]}.", f".projections.{number}.")
            if before.projection_ratio is None:
                adapted[key] = torch.zeros_like(fresh) if name == "beta" else fresh
                continue
        if taken not in state_dict:
            continue  # the check of keys will say so
        value = state_dict[taken]
        if match[3] is not None and name in HIDDEN_AXIS and _hidden_dim(before) != _hidden_dim(after):
            fc1, fc2 = (state_dict.get(taken.removesuffix(name) + weight) for weight in WEIGHTS)
            if fc1 is None or fc2 is None or len(fc1) != fc2.shape[-1]:
                continue
            value = _resized(name, value, fresh, fc1.norm(dim=1) * fc2.norm(dim=0))
        is_as_far = math.isclose(
            target.residual_factor(after) * after.num_passes, source.residual_factor(before) * before.num_passes
        )
        if not (target.learnable_residual or is_as_far):
            raise InputError(
                f"without learnable coefficients {after.num_passes} passes do not walk as far as {before.num_passes} "
                "did in the weights' model; set residual_scale to 'passes' in both, or learnable_residual to true"
            )
        factors = source.residual_factor(before), target.residual_factor(after)
        adapted[key] = _step(name, value, *factors, before.num_passes / after.num_passes)
    load_pretrained(model, adapted)
    return _report(source, target)


def _blocks(stage: StageConfig) -> str:
    """What has to be equal: weights of as many heads of another width fit, but are another function."""
    return f"{stage.num_blocks} block(s) of width {stage.embed_dim} and {stage.num_heads} head(s)"


def _is_walked(key: str, source: ModelConfig) -> bool:
    """Whether a key is of a block of `source`, or of a projection between its passes."""
    if not (match := _KEY.fullmatch(key)) or int(match[1]) >= len(source.stages):
        return False
    stage = source.stages[int(match[1])]
    return int(match[2]) < stage.num_blocks and int(match[3] or 0) < stage.num_passes


def _hidden_dim(stage: StageConfig) -> int:
    """Hidden channels of each projection; 0 if there are none."""
    return int(stage.embed_dim * (stage.projection_ratio or 0))


def _resized(name: str, value: Tensor, fresh: Tensor, importance: Tensor) -> Tensor:
    """A projection's weight with as many hidden channels as `fresh` has, which lends the new ones its values."""
    axis, now = HIDDEN_AXIS[name], len(importance)
    wanted = fresh.shape[axis]
    if wanted < now:
        return value.index_select(axis, importance.topk(wanted).indices.sort().values)
    added = fresh.narrow(axis, now, wanted - now).to(value)
    return torch.cat([value, torch.zeros_like(added) if name == WEIGHTS[1] else added], axis)


def _step(name: str, value: Tensor, s: float, s_new: float, share: float) -> Tensor:
    """A weight for steps of `share` times the length; what is no coefficient stays."""
    if name == "beta":
        return value * (share * s / s_new)
    if name == "alpha":
        factor = 1 + s * (value - 1)
        return 1 + (factor.sign() * factor.abs() ** share - 1) / s_new
    return value


def _report(source: ModelConfig, target: ModelConfig) -> list[str]:
    lines = []
    for i, (before, after) in enumerate(zip(source.stages, target.stages, strict=True)):
        passes = f"stage {i + 1}: {after.num_blocks} block(s) reused"
        if before.num_passes != after.num_passes:
            passes += (
                f", {before.num_passes} passes now {after.num_passes} of {before.num_passes / after.num_passes:.3g}"
            )
        if after.projection_ratio is None:
            passes += "; no projections"
        elif before.projection_ratio is None:
            passes += f"; {after.num_blocks * after.num_passes} projections afresh, silent at first"
        else:
            used = {(2 * k + 1) * before.num_passes // (2 * after.num_passes) for k in range(after.num_passes)}
            passes += f"; {after.num_blocks * after.num_passes} projections from {before.num_blocks * len(used)} of "
            passes += f"{before.num_blocks * before.num_passes}"
            if (few := _hidden_dim(before)) != (many := _hidden_dim(after)):
                passes += f", {few} hidden channels now {many}"
        lines.append(passes)
    if source.num_classes != target.num_classes:
        lines.append(f"classifier afresh: {source.num_classes} classes now {target.num_classes}")
    if source.grids()[0] != target.grids()[0]:
        (h, w), (height, width) = source.grids()[0], target.grids()[0]
        lines.append(f"position embedding resized from {h}x{w} tokens to {height}x{width}")
    if source.in_chans != target.in_chans:
        lines.append(f"first convolution adapted from {source.in_chans} channels to {target.in_chans}")
    return lines
