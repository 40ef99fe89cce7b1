"""Makes a recursive model of any vision transformer: blocks share their weights, or run more than once.

The body of the model is found by its structure (`sret.models.recursify.runs`). Blocks keep their places and names, so
features, checkpointing of gradients, parameter groups and exporters of the model's library work as before.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import nn

from sret.errors import InputError, did_you_mean
from sret.models.recursify.passes import add_passes
from sret.models.recursify.runs import Run, find_runs
from sret.models.recursify.sharing import Init, Share, check_own_weights, check_rank, groups_of, tie
from sret.models.recursify.slicing import Slicing, slice_attention
from sret.ranges import NonNegativeInt, PositiveInt, check_fields, check_number

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a model is made recursive. The default changes nothing.

    Attributes:
        passes: how often the weights of a kept block are used: `passes` = 2 halves the weights of the blocks.
        extra_passes: so many more runs of every block, each with a gate that begins at 0, so that a trained model
            computes the same at the start.
        share: which blocks share weights. "sequence": neighbours (block 1, 1, 2, 2); "cycle": the sequence again
            (1, 2, 1, 2); "middle": neighbours, but the first and the last block keep their own.
        init: the shared weights are those of the first of them, or their mean.
        rank: each pass corrects the shared matrices by one of this rank, and has biases, norms and other vectors of its
            own; 0 shares everything.
        slices: how many slices the patch tokens have in each pass, one number for each of the `passes`; 1 is attention
            between all tokens. The first pass slices neighbours, later ones take every G-th token. Class and register
            tokens belong to every slice. By default nothing is sliced.
        scale: each run of a block changes its input by a learned factor, which begins at 1.
        projection: each run of a block is followed by a non-linear projection (NLL) of its own, at first the identity;
            for streams with channels last.
        damping: multiplies the gates of the extra passes by 1 / (extra_passes + 1).
        parts: names of the containers of blocks to change, such as "blocks"; by default all runs of equal blocks.
    """

    passes: PositiveInt = 1
    extra_passes: NonNegativeInt = 0
    share: Share = "sequence"
    init: Init = "first"
    rank: NonNegativeInt = 0
    slices: tuple[int, ...] = ()
    scale: bool = False
    projection: bool = False
    damping: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("parts", "slices"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        check_fields(self)
        self._check_effect()
        for num_groups in self.slices:
            check_number("slices", num_groups, PositiveInt)
        if self.slices and len(self.slices) != self.passes:
            raise InputError(f"slices are {self.slices}; give one number for each pass, and passes is {self.passes}")

    def _check_effect(self) -> None:
        """Raises `InputError` for an option that would have no effect."""
        default = Sharing.__dataclass_fields__
        needs = {"share": "passes", "init": "passes", "rank": "passes", "damping": "extra_passes"}
        for name, other in needs.items():
            if getattr(self, name) != default[name].default and getattr(self, other) == default[other].default:
                raise InputError(f"{name} has no effect without {other}")


def recursify(model: Model, **options: object) -> Model:
    """A copy of a model in which blocks share weights or run more than once.

    Args:
        model: any module with equal blocks in sequence: a vision transformer of timm, an `nn.TransformerEncoder`, ...
        options: `passes`, `extra_passes`, `share`, `init`, `rank`, `slices`, `scale`, `projection`, `damping`, `parts`;
            see `Sharing`.

    Shared parameters are the same object in all places, so optimizers and `parameters()` see them once.
    `safetensors.torch.save_model` writes them once.

    Raises `InputError` for a model without equal blocks or whose blocks share weights already, for passes that do not
    divide the blocks, for a rank above the width, and for options without effect.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"recursify takes a module, not {type(model).__name__}")
    names = [field.name for field in fields(Sharing)]
    for name in options.keys() - names:
        raise InputError(f"recursify has no option {name!r}{did_you_mean(name, names)}")
    sharing = Sharing(**options)  # type: ignore[arg-type]
    model = copy.deepcopy(model)
    runs = _chosen_runs(model, sharing.parts)
    if sharing.passes > 1:
        check_own_weights(model, [name for run in runs for unit in run.units for name in unit])
    if sharing.rank:
        check_rank(sharing.rank, [model.get_submodule(name) for run in runs for name in run.units[0]])
    groups = _groups(runs, sharing)
    for run, of_run in zip(runs, groups, strict=True):
        for group in of_run:
            for position in range(len(run.units[0])):
                blocks = [model.get_submodule(run.units[unit][position]) for unit in group]
                if len(blocks) > 1:
                    tie(blocks, sharing.init, sharing.rank)
                for i, (block, num_groups) in enumerate(zip(blocks, sharing.slices, strict=False)):
                    if num_groups > 1:
                        slice_attention(block, Slicing(num_groups, getattr(model, "num_prefix_tokens", 0), i > 0))
    if sharing.extra_passes or sharing.scale or sharing.projection:
        for run in runs:
            for unit in run.units:
                for name in unit:
                    block = model.get_submodule(name)
                    add_passes(block, sharing.extra_passes, sharing.scale, sharing.damping, sharing.projection)
    return model


def _chosen_runs(model: nn.Module, parts: Sequence[str]) -> list[Run]:
    runs = find_runs(model)
    if not runs:
        raise InputError(
            f"{type(model).__name__} has no sequence of equal blocks, so nothing can be shared or repeated"
        )
    names = [run.name for run in runs]
    if unknown := [part for part in parts if part not in names]:
        raise InputError(
            f"parts: there is no container {unknown[0]!r} of equal blocks; there is {', '.join(dict.fromkeys(names))}"
        )
    return [run for run in runs if not parts or run.name in parts]


def _groups(runs: Sequence[Run], sharing: Sharing) -> list[list[list[int]]]:
    """The units of each run that share weights. Raises `InputError` if a run cannot be divided."""
    groups = []
    for run in runs:
        try:
            groups.append(groups_of(len(run.units), sharing.passes, sharing.share))
        except ValueError as error:
            others = [other.name for other in runs if other.name != run.name]
            hint = f", or leave it out: parts={tuple(dict.fromkeys(others))}" if others else ""
            raise InputError(f"{run}: {error}{hint}") from error
    return groups
