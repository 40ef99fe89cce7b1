"""Moves the weights of one model into another of more or fewer passes.

A block applied R times is taken for a path that R steps divide. In R' passes the same path is walked in other steps:

- Blocks are taken as they are: their weights do not know how often they are applied.
- Pass i of R' takes the projection that stood at the same share of the way, number floor((i + 1/2) R / R').
- Coefficients are made those of a step R / R' times as long: s' beta' = s beta R / R', and the factor of the stream to
  the power of R / R' (a negative one keeps its sign).
- Where the source has no projections, or projections with another number of hidden channels, they are new, and add
  nothing at first: their second layer is zero.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sret.checkpoints.card import METADATA_KEY, read_card
from sret.checkpoints.files import EXPORTED_SUFFIXES, StateDict, read_safetensors
from sret.checkpoints.official import check_fit, fitted, from_official, has_shapes_of, load_pretrained, read_official
from sret.checkpoints.resolve import find_file
from sret.errors import InputError, error_prefix
from sret.models.config import ModelConfig, StageConfig
from sret.models.sret import SReT
from sret.models.variants import PUBLISHED, config_of

_KEY = re.compile(r"stages\.(\d+)\.recursions\.\d+\.(?:block\.attn|block\.mlp|projections\.(\d+))\.(.*)")
_COEFFICIENTS = ("alpha", "beta")
_SECOND_LAYER = ("branch.fc2.weight", "branch.fc2.bias")


def read_source(source: str | os.PathLike[str], config: ModelConfig) -> tuple[StateDict, ModelConfig]:
    """Our state dict of a file of ours or of the authors', or of a published name, and its model's configuration.

    `config`, of the model that shall have them, stands in for what the file does not say: a file of ours without its
    metadata, or one that was trained with the authors' code and fits no published model.
    Raises `InputError` if the file cannot be read safely, or is of no model.
    """
    if Path(source).is_dir():
        best = Path(source) / "best.safetensors"
        raise InputError(f"{source} is a folder; name a file of weights in it, such as {best}")
    if Path(source).suffix in EXPORTED_SUFFIXES:
        raise InputError(f"{source} is an exported model, for inference only; take the weights it was made of")
    path, variant = find_file(source)
    if path.suffix == ".safetensors":
        state_dict, metadata = read_safetensors(path)
        if METADATA_KEY not in metadata:
            with error_prefix(path):
                return state_dict, fitted(config, state_dict)
        card = read_card(path, metadata[METADATA_KEY])
        if card.is_fused:
            raise InputError(f"{path} is of a fused model, for inference only; take the weights it was made of")
        return state_dict, card.config
    official, _ = read_official(path)
    if "stem.conv1.weight" in official:
        raise InputError(
            f"{path} holds weights of sret, but not as a weights file; take a run's best.safetensors, or what "
            "safetensors.torch.save_file makes of them"
        )
    with error_prefix(path):
        if variant is not None:
            published: ModelConfig | None = config_of(variant)
        else:
            published = next((known for known in PUBLISHED.values() if has_shapes_of(known, official)), None)
        found = fitted(published or replace(config, residual_scale="one"), official)
        return from_official(official, found), found


def transfer_file(model: SReT, source: str | os.PathLike[str]) -> list[str]:
    """The weights of a file or published name into a model: `read_source`, then `transfer`. Its errors name it."""
    state_dict, config = read_source(source, model.config)
    with error_prefix(source):
        return transfer(model, state_dict, config)


@torch.no_grad()
def transfer(model: SReT, state_dict: Mapping[str, Tensor], source: ModelConfig) -> list[str]:
    """Our state dict, of a model `source`, into one of other passes, projections, classes, channels or images.

    Returns what was reused, and how, a phrase for each part. Raises `InputError` if the weights are not those of
    `source`, or if models differ in more than that and what leaves no trace in weights: slices, the stem's stride.
    """
    target = model.config
    with torch.device("meta"):
        check_fit(state_dict, SReT(source))
    _check_models(source, target)
    learned = [key for key, value in state_dict.items() if _is_learned(key, value)]
    if learned and not target.learnable_residual:
        raise InputError(
            f"the weights have learned {learned[0]}, and this model cannot; set learnable_residual to true"
        )
    adapted = {key: value for key, value in state_dict.items() if not _KEY.fullmatch(key)}
    for key, fresh in model.state_dict().items():
        if not (match := _KEY.fullmatch(key)):
            continue
        i, name, taken = int(match[1]), match[3], key
        before, after = source.stages[i], target.stages[i]
        if match[2] is not None:
            if _hidden_dim(before) != _hidden_dim(after):
                adapted[key] = torch.zeros_like(fresh) if name in _SECOND_LAYER else fresh
                continue
            number = (2 * int(match[2]) + 1) * before.num_passes // (2 * after.num_passes)
            taken = key.replace(f".projections.{match[2]}.", f".projections.{number}.")
        if name in _COEFFICIENTS:
            factors = source.residual_factor(before), target.residual_factor(after)
            value = state_dict.get(taken, torch.ones(1))
            adapted[key] = _step(name, value, *factors, before.num_passes / after.num_passes)
        else:
            adapted[key] = state_dict[taken]
    load_pretrained(model, adapted)
    return _report(source, target)


def _check_models(source: ModelConfig, target: ModelConfig) -> None:
    """Raises `InputError` if one's weights would be another function in the other."""
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
        walked, wanted = source.residual_factor(before), target.residual_factor(after)
        is_as_far = math.isclose(walked * before.num_passes, wanted * after.num_passes)
        if not (target.learnable_residual or is_as_far):
            raise InputError(
                f"stage {i + 1}: without learnable coefficients {after.num_passes} passes by {wanted:.3g} do not go as "
                f"far as {before.num_passes} by {walked:.3g} did; set residual_scale to 'passes' in both models, or "
                "learnable_residual to true"
            )


def _blocks(stage: StageConfig) -> str:
    """What has to be equal: weights of as many heads of another width fit, but are another function."""
    return f"{stage.num_blocks} block(s) of width {stage.embed_dim} and {stage.num_heads} head(s)"


def _is_learned(key: str, value: Tensor) -> bool:
    return key.rpartition(".")[2] in _COEFFICIENTS and bool((value != 1).any())


def _step(name: str, value: Tensor, s: float, s_new: float, share: float) -> Tensor:
    """A coefficient for steps of `share` times the length."""
    value = value.double()  # so that an equal step leaves it as it is, after rounding
    if name == "beta":
        return value * (share * s / s_new)
    factor = 1 + s * (value - 1)
    return 1 + (factor.sign() * factor.abs() ** share - 1) / s_new


def _hidden_dim(stage: StageConfig) -> int:
    """Hidden channels of each projection; 0 if there are none."""
    return int(stage.embed_dim * (stage.projection_ratio or 0))


def _report(source: ModelConfig, target: ModelConfig) -> list[str]:
    lines = []
    for i, (before, after) in enumerate(zip(source.stages, target.stages, strict=True)):
        passes = f"stage {i + 1}: {after.num_blocks} block(s) reused"
        if before.num_passes != after.num_passes:
            passes += (
                f", {before.num_passes} passes now {after.num_passes} of {before.num_passes / after.num_passes:.3g}"
            )
        if after.projection_ratio is None:
            dropped = before.num_blocks * before.num_passes if before.projection_ratio else 0
            passes += f"; {dropped} projections left out" if dropped else "; no projections"
        elif (then := _hidden_dim(before)) != (now := _hidden_dim(after)):
            widths = f" ({then} hidden channels now {now})" if then else ""
            passes += f"; {after.num_blocks * after.num_passes} projections afresh{widths}, adding nothing at first"
        else:
            used = {(2 * k + 1) * before.num_passes // (2 * after.num_passes) for k in range(after.num_passes)}
            passes += f"; {after.num_blocks * after.num_passes} projections from {before.num_blocks * len(used)} of "
            passes += f"{before.num_blocks * before.num_passes}"
        lines.append(passes)
    if source.num_classes != target.num_classes:
        lines.append(f"classifier afresh: {source.num_classes} classes now {target.num_classes}")
    if source.stem_stride != target.stem_stride:
        lines.append(f"stem stride of {source.stem_stride} pixels now {target.stem_stride}")
    if source.grids()[0] != target.grids()[0]:
        (h, w), (height, width) = source.grids()[0], target.grids()[0]
        lines.append(f"position embedding resized from {h}x{w} tokens to {height}x{width}")
    if source.in_chans != target.in_chans:
        lines.append(f"first convolution adapted from {source.in_chans} channels to {target.in_chans}")
    return lines
