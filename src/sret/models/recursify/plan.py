"""Which blocks of a model the options of `recursify` concern."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sret.errors import InputError
from sret.models.config import MAX_DEPTH
from sret.models.recursify.order import check_images, check_order, fresh_copy
from sret.models.recursify.runs import Run, find_runs
from sret.models.recursify.sharing import check_own_weights, check_parameters, check_rank, groups_of
from sret.models.recursify.similarity import record, similar_groups, unit_distances
from sret.models.timm.config import Init, Sharing

Plan = dict[Run, list[list[int]]]  # the units of each run that share their weights


def make_plan(model: nn.Module, sharing: Sharing, images: Tensor | None = None) -> Plan:
    """The runs of a model to change, and their groups. Raises `InputError` if the model does not have such."""
    if not isinstance(model, nn.Module):
        raise InputError(f"recursify takes a module, not {type(model).__name__}")
    runs = _chosen_runs(model, sharing.parts)
    if images is not None:
        check_images(model, images)
        check_order(model, runs, images)
    _check_depth(runs, sharing)
    if sharing.passes > 1:
        check_parameters(model, [name for run in runs for name in run.names])
        check_own_weights(model, [name for run in runs for name in run.names])
    if sharing.rank:
        check_rank(sharing.rank, [model.get_submodule(name) for run in runs for name in run.units[0]])
    if images is None and (name := sharing.needs_images):
        raise InputError(f"{name} needs images: a few, as the model takes them, in a tensor (B, C, H, W)")
    groups = _groups(runs, sharing)
    if sharing.share == "similar":
        groups = _similar(model, runs, [len(of_run) for of_run in groups], sharing, images)
    return dict(zip(runs, groups, strict=True))


def found_groups(model: nn.Module, sharing: Sharing, images: Tensor) -> Sharing:
    """The same options with the `group_sizes` that `recursify` finds from these images, so that none are needed again.

    init="closest" becomes "first": this is for models whose weights are then loaded.
    """
    init: Init = "first" if sharing.init == "closest" else sharing.init
    if sharing.share != "similar" or sharing.group_sizes:
        return replace(sharing, init=init)
    plan = make_plan(model, sharing, images)
    return replace(sharing, init=init, group_sizes=tuple(len(group) for groups in plan.values() for group in groups))


def _similar(
    model: nn.Module, runs: Sequence[Run], counts: Sequence[int], sharing: Sharing, images: Tensor | None
) -> list[list[list[int]]]:
    """Groups of similar neighbours, as many in each run as `counts`, or those of `group_sizes`."""
    if sharing.group_sizes:
        starts = list(accumulate(sharing.group_sizes, initial=0))
        ends = list(accumulate((len(run.units) for run in runs), initial=0))
        if starts[-1] != ends[-1] or not set(ends) <= set(starts):
            sizes = [len(run.units) for run in runs]
            raise InputError(f"group_sizes are {sharing.group_sizes}; they must add up to {sizes}, run by run")
        pairs = list(pairwise(starts))
        return [[list(range(a - s, b - s)) for a, b in pairs if s <= a < e] for s, e in pairwise(ends)]
    assert images is not None
    calls, _ = record(model, [name for run in runs for name in run.names], images)
    net = fresh_copy(model)
    return [
        similar_groups(unit_distances(net.get_submodule, run.units, calls), count, sharing.init == "first")
        for run, count in zip(runs, counts, strict=True)
    ]


def _chosen_runs(model: nn.Module, parts: Sequence[str]) -> list[Run]:
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise InputError(f"{lazy[0]} has no shape yet; run the model once first")
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


def _check_depth(runs: Sequence[Run], sharing: Sharing) -> None:
    depth = (1 + sharing.extra_passes) * sum(len(run.names) for run in runs)
    if depth > MAX_DEPTH:
        raise InputError(
            f"with extra_passes={sharing.extra_passes} blocks would run {depth:,} times; at most {MAX_DEPTH:,} are "
            "possible"
        )


def _groups(runs: Sequence[Run], sharing: Sharing) -> list[list[list[int]]]:
    """The units of each run that share weights. Raises `InputError` if a run cannot be divided."""
    groups = []
    for run in runs:
        try:
            groups.append(groups_of(len(run.units), sharing.passes, sharing.share))
        except ValueError as error:
            others = [other.name for other in runs if other.name != run.name and _can_divide(other, sharing)]
            hint = f", or leave it out: parts={tuple(dict.fromkeys(others))}" if others else ""
            raise InputError(f"{run}: {error}{hint}") from error
    return groups


def _can_divide(run: Run, sharing: Sharing) -> bool:
    """Whether the units of a run can be divided into groups of `passes`."""
    try:
        groups_of(len(run.units), sharing.passes, sharing.share)
    except ValueError:
        return False
    return True
