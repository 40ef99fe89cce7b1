"""Adapts weights to a model with another number of passes, classes, channels or another image size.

The R passes of a block are treated as R equal steps. A model with R' passes covers the same distance in R' steps:

- Blocks are copied: their weights do not depend on the number of passes.
- Pass i of R' gets the projection from the same relative position, number floor((i + 1/2) R / R').
- Coefficients become those of a step that is R / R' times as long: s' beta' = s beta R / R', and the factor of the
  stream is raised to the power of R / R' (a negative one keeps its sign).
- If the source has no projections, or projections with another number of hidden channels, the new ones add nothing at
  first: their second layer is zero.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import le

import torch
from torch import Tensor, nn

from sret.checkpoints.card import Card, as_sret
from sret.checkpoints.fit import EXITS, check_fit, load_pretrained
from sret.checkpoints.resolve import read_source
from sret.errors import InputError, InputWarning, error_prefix, plural
from sret.models.config import MAX_DEPTH, ModelConfig
from sret.models.sret import SReT
from sret.models.stage_config import StageConfig
from sret.ranges import is_whole

_KEY = re.compile(r"stages\.(\d+)\.recursions\.\d+\.(?:block\.attn|block\.mlp|projections\.(\d+))\.(.*)")
_COEFFICIENTS = ("alpha", "beta")
_SECOND_LAYER = ("branch.fc2.weight", "branch.fc2.bias")


def transfer_file(model: SReT, source: str | os.PathLike[str]) -> list[str]:
    """Loads the weights of a file or published name into a model: `read_source`, then `transfer`. Errors name it."""
    state_dict, config = read_source(source, model.config)
    with error_prefix(source):
        return transfer(model, state_dict, config)


@torch.no_grad()
def transfer(model: SReT, state_dict: Mapping[str, Tensor], source: ModelConfig) -> list[str]:
    """Loads our state dict of a model `source` into one with other passes, projections, classes, channels or images.

    Slices and the stem's stride, which do not change the weights, may also differ.
    Returns what was reused, one phrase for each part. Raises `InputError` if the weights do not fit `source`, or if the
    models differ in anything else.
    """
    target = model.config
    with torch.device("meta"):
        check_fit(state_dict, SReT(source))
    _check_models(source, target)
    learned = [key for key, value in state_dict.items() if _is_learned(key, value)]
    if learned and not target.learnable_residual:
        raise InputError(
            f"the weights have a learned {learned[0]}, but this model's coefficients are fixed; "
            "set learnable_residual to true"
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
            taken = key.replace(
                f".projections.{match[2]}.", f".projections.{_pass_before(int(match[2]), before, after)}."
            )
        if name in _COEFFICIENTS:
            factors = source.residual_factor(before), target.residual_factor(after)
            value = state_dict.get(taken, torch.ones(1))
            adapted[key] = _step(name, value, *factors, before.num_passes / after.num_passes)
        else:
            adapted[key] = state_dict[taken]
    if _exits(source) != _exits(target):
        adapted = {key: value for key, value in adapted.items() if not key.startswith(EXITS)}
    load_pretrained(model, adapted)
    return _report(source, target)


def with_passes(model: nn.Module, card: Card, passes: int | Sequence[int] | None) -> tuple[nn.Module, Card]:
    """The model with other passes, and a card that tells its cost.

    Args:
        passes: as in `SReT.set_passes`, which is used where the model has so many; None changes nothing. More passes
            are those of `transfer`, each of them a shorter step; exits after passes are then left out. A policy for
            early exit that does not fit the passes is left out too.

    Warns if the weights were not trained for that number of passes. Raises `InputError` as `transfer` does, for more
    passes of a fused model, and for more layers than a model may have.
    """
    if passes is None:
        return model, card
    with error_prefix("passes"):
        model, ours = as_sret(model), card.sret_config
    most = model.config.passes_by_stage(None)
    numbers = tuple(passes) if isinstance(passes, Sequence) else (passes,) * len(most)
    if not all(is_whole(number) and number >= 1 for number in numbers):
        raise InputError(f"passes is {passes!r}; give a whole number >= 1, or one for each stage")
    wanted = tuple(map(int, numbers))
    if isinstance(passes, Sequence):
        has_them = len(wanted) != len(most) or all(map(le, wanted, most))
    else:
        has_them = wanted[0] <= max(most)
    if has_them:  # or none can have them, as the error says
        model.set_passes(passes)
        if model.passes != most and not card.training.get("recipe", {}).get("pass_weights"):
            warnings.warn(
                f"the weights were trained with all passes, {_shown(most)}; with {_shown(model.passes)} they are less "
                "accurate (training with pass_weights makes each number usable)",
                InputWarning,
                stacklevel=2,
            )
        config, policy = ours.first_passes(passes), card.exit_policy
        if policy is not None and not policy.fits(config.num_exits + 1):
            text = f"the {policy.criterion} policy for early exit does not fit these passes and is left out"
            warnings.warn(f"{text}; a threshold is then one of confidence", InputWarning, stacklevel=2)
            policy = None
        return model, replace(card, config=config, exit_policy=policy)
    card.check_unfused("the file")
    depth = sum(stage.num_blocks * number for stage, number in zip(ours.stages, wanted, strict=True))
    if depth > MAX_DEPTH:
        limit = MAX_DEPTH // sum(stage.num_blocks for stage in ours.stages)
        raise InputError(
            f"passes is {_shown(wanted)}, which makes {depth:,} layers; a model has up to {MAX_DEPTH:,}, as with "
            f"{limit:,} passes in every stage"
        )
    stages = tuple(stage.with_passes(n) for stage, n in zip(ours.stages, wanted, strict=True))
    config, also = replace(ours, stages=stages), ""
    if ours.exits == "passes":  # the classifiers after added passes would be untrained
        config, card, also = replace(config, exits="none"), replace(card, exit_policy=None), "; exits are left out"
    elif card.exit_policy is not None:
        also = "; the stored threshold for early exit was chosen without them"
    longer = SReT(config).eval()
    transfer(longer, model.state_dict(), ours)
    longer.pretrained_cfg = longer.default_cfg = model.pretrained_cfg
    warnings.warn(
        f"the weights were trained with {_shown(most)} passes; {_shown(wanted)} are untrained{also}",
        InputWarning,
        stacklevel=2,
    )
    return longer, replace(card, config=config)


def _shown(passes: tuple[int, ...]) -> str:
    """The passes of each stage, or one number if they are equal."""
    return str(passes[0]) if len(set(passes)) == 1 else str(passes)


def _check_models(source: ModelConfig, target: ModelConfig) -> None:
    """Raises `InputError` if the target model would compute another function with the weights of the source."""
    if source.reversible != target.reversible:
        kinds = {True: "two streams", False: "one stream"}
        raise InputError(
            f"the weights are for a model with {kinds[source.reversible]}, but this one has "
            f"{kinds[target.reversible]}; set reversible to {str(source.reversible).lower()}"
        )
    if len(source.stages) != len(target.stages):
        raise InputError(f"the weights are for {len(source.stages)} stages, but this model has {len(target.stages)}")
    for i, (before, after) in enumerate(zip(source.stages, target.stages, strict=True)):
        if (theirs := _blocks(before)) != (ours := _blocks(after)):
            raise InputError(f"the weights of stage {i + 1} are for {theirs}, but this model has {ours}")
        given, wanted = source.residual_factor(before), target.residual_factor(after)
        is_equal = math.isclose(given * before.num_passes, wanted * after.num_passes)
        if not (target.learnable_residual or is_equal):
            raise InputError(
                f"stage {i + 1}: without learnable coefficients, {after.num_passes} passes scaled by {wanted:.3g} are "
                f"not equal to the {before.num_passes} passes scaled by {given:.3g} of the weights; set residual_scale "
                "to 'passes' in both models, or learnable_residual to true"
            )


def _blocks(stage: StageConfig) -> str:
    """What must be equal; weights for another number of heads would fit, but compute another function."""
    blocks, heads = plural("block", stage.num_blocks), plural("head", stage.num_heads)
    return f"{stage.num_blocks} {blocks} of width {stage.embed_dim} and {stage.num_heads} {heads}"


def _is_learned(key: str, value: Tensor) -> bool:
    return key.rpartition(".")[2] in _COEFFICIENTS and bool((value != 1).any())


def _step(name: str, value: Tensor, s: float, s_new: float, length: float) -> Tensor:
    """The coefficient of a step that is `length` times as long."""
    value = value.double()  # exact for a step of equal length, after rounding
    if name == "beta":
        return value * (length * s / s_new)
    factor = 1 + s * (value - 1)
    return 1 + (factor.sign() * factor.abs() ** length - 1) / s_new


def _pass_before(pass_index: int, before: StageConfig, after: StageConfig) -> int:
    """The pass of `before` whose projection a pass of `after` gets: the one at the same relative position."""
    return (2 * pass_index + 1) * before.num_passes // (2 * after.num_passes)


def _exits(config: ModelConfig) -> tuple[str, int, int]:
    """What must be equal for the classifiers of exits to be reused."""
    return config.exits, config.num_exits, config.num_classes


def _hidden_dim(stage: StageConfig) -> int:
    """Hidden channels of each projection; 0 if there are none."""
    return int(stage.embed_dim * (stage.projection_ratio or 0))


def _report(source: ModelConfig, target: ModelConfig) -> list[str]:
    lines = []
    for i, (before, after) in enumerate(zip(source.stages, target.stages, strict=True)):
        passes = f"stage {i + 1}: {after.num_blocks} {plural('block', after.num_blocks)} reused"
        if before.num_passes != after.num_passes:
            length = before.num_passes / after.num_passes
            passes += f", {before.num_passes} passes become {after.num_passes} of length {length:.3g}"
        if after.projection_ratio is None:
            dropped = before.num_blocks * before.num_passes if before.projection_ratio else 0
            passes += f"; {dropped} projections left out" if dropped else "; no projections"
        elif (then := _hidden_dim(before)) != (now := _hidden_dim(after)):
            widths = f" ({now} hidden channels instead of {then})" if then else ""
            passes += f"; {after.num_blocks * after.num_passes} new projections{widths}, adding nothing at first"
        else:
            used = {_pass_before(i, before, after) for i in range(after.num_passes)}
            passes += f"; {after.num_blocks * after.num_passes} projections from {before.num_blocks * len(used)} of "
            passes += f"{before.num_blocks * before.num_passes}"
        lines.append(passes)
    if source.num_classes != target.num_classes:
        lines.append(f"new classifier: {target.num_classes} classes instead of {source.num_classes}")
    if target.exits != "none" and _exits(source) != _exits(target):
        lines.append(f"{target.num_exits} new classifiers for exits")
    if source.stem_stride != target.stem_stride:
        lines.append(f"stem stride: {target.stem_stride} pixels instead of {source.stem_stride}")
    if source.grids()[0] != target.grids()[0]:
        (h, w), (height, width) = source.grids()[0], target.grids()[0]
        lines.append(f"position embedding resized from {h}x{w} tokens to {height}x{width}")
    if source.in_chans != target.in_chans:
        lines.append(f"first convolution adapted from {source.in_chans} channels to {target.in_chans}")
    return lines
