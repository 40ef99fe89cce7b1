"""Token merging for trained models: a copy that merges tokens inside slices, without retraining.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sret.errors import InputError
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.ranges import is_whole


def merge_tokens(model: SReT, r: int | Sequence[int | Sequence[int]]) -> SReT:
    """A copy of the model with the same weights, which merges r tokens of each slice between attention and MLP.

    Args:
        r: one number for every pass of every block. Or an entry for each stage: a number for all its passes, or a
            sequence with a number for each, in the order in which they run; shorter ones are filled with zeros. 0 is
            the model without merging, bit for bit.

    Sets `StageConfig.merge`, so a weights file of the copy merges too. Raises `InputError` for more than half of the
    tokens of a slice, and for a model that cannot merge tokens.
    """
    if not isinstance(model, SReT):
        raise InputError(f"only models of sret can merge tokens, not {type(model).__name__}")
    config = merging_config(model.config, r)
    merging = copy.deepcopy(model)
    merging.set_merge(config)
    return merging


def merging_config(config: ModelConfig, r: int | Sequence[int | Sequence[int]]) -> ModelConfig:
    """The configuration with other `merge` fields; `r` and errors as in `merge_tokens`."""
    stages = config.stages
    if is_whole(r):
        entries: list[int | Sequence[int]] = [r] * len(stages)
    elif isinstance(r, list | tuple) and len(r) == len(stages):
        entries = list(r)
    else:
        raise InputError(f"r is {r!r}; give a number of tokens, or one for each of the {len(stages)} stages")
    merges: list[tuple[Any, ...]] = [
        tuple(entry) if isinstance(entry, list | tuple) else (entry,) * stage.depth
        for entry, stage in zip(entries, stages, strict=True)
    ]
    try:
        return _with_merges(config, merges)
    except InputError as error:
        if not is_whole(r) or r < 1 or config.reversible or config.memory != "none" or config.exits == "passes":
            raise
        most = _largest(config, r)
        raise InputError(f"{error}. In all passes at most {most} would work, or give an entry for each stage") from None


def _with_merges(config: ModelConfig, merges: Sequence[tuple[int, ...]]) -> ModelConfig:
    stages = (replace(stage, merge=merge) for stage, merge in zip(config.stages, merges, strict=True))
    return replace(config, stages=tuple(stages))


def _largest(config: ModelConfig, below: int) -> int:
    """The largest r that every pass can merge; `below` is one that does not work."""
    works, fails = 0, below
    while fails - works > 1:
        middle = (works + fails) // 2
        try:
            _with_merges(config, [(middle,) * stage.depth for stage in config.stages])
            works = middle
        except InputError:
            fails = middle
    return works
