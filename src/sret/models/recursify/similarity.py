"""Compares what blocks compute on sample images: groups of similar blocks, weights for a group, and distances.

    d(i, j) = |f_j(x_i) - f_i(x_i)|^2 / |f_i(x_i)|^2        x_i is what block i got from the images

Groups of neighbours are found by a dynamic programme: of all divisions into a number of groups it finds that with the
least sum of distances, where in each group one block runs in place of the others.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sret.errors import InputError
from sret.models.recursify.order import check_images, evaluating, fresh_copy, running, tensors
from sret.models.recursify.runs import find_runs
from sret.models.recursify.sharing import Base, tie


@dataclass(frozen=True)
class Call:
    """What a block got, and the first tensor that it returned."""

    args: Any
    kwargs: Any
    output: Tensor


@torch.no_grad()
def record(model: nn.Module, names: Sequence[str], images: Tensor) -> tuple[dict[str, Call], Tensor]:
    """The first call of each block in evaluation, and the first output of the model. (B, C, H, W) images."""
    model = fresh_copy(model)
    calls: dict[str, Call] = {}

    def keep(name: str) -> None:
        inputs: list[Any] = []  # copied before the call, which may change them

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[:] = inputs or copy.deepcopy([args, kwargs])

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(name, Call(inputs[0], inputs[1], tensors(output)[0].clone()))

        block = model.get_submodule(name)
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after, with_kwargs=True)

    for name in names:
        keep(name)
    with evaluating(model), running(model, images):
        return calls, tensors(model(images))[0]


@torch.no_grad()
def replaced_distance(blocks: Sequence[nn.Module], calls: Sequence[Call]) -> float:
    """The sum of d of blocks that run in place of those that were recorded."""
    total = 0.0
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(evaluating(block))
        for block, call in zip(blocks, calls, strict=True):
            args, kwargs = copy.deepcopy((call.args, call.kwargs))  # the block may change them
            total += relative_error(tensors(block(*args, **kwargs))[0], call.output) ** 2
    return total


def relative_error(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected|, of all numbers."""
    x, expected = x.double(), expected.double()
    return float((x - expected).norm() / expected.norm().clamp_min(1e-30))


def similar_groups(distances: Tensor, num_groups: int, is_first: bool = False) -> list[list[int]]:
    """Divides neighbours into groups with the least sum of distances.

    Args:
        distances: (N, N), d(i, j) of block j in place of block i.
        num_groups: at most N.
        is_first: whether the first block of a group stands for it, instead of the best one.
    """

    @cache
    def one_group(start: int, end: int) -> float:
        to = distances[start:end, start:end].sum(0)
        return float(to[0] if is_first else to.min())

    # Of the first blocks, by their number: the least sum, and where the groups end.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        end: (one_group(0, end), (end,)) for end in range(1, len(distances) + 1)
    }
    for groups in range(2, num_groups + 1):
        best = {
            end: min(
                (best[start][0] + one_group(start, end), (*best[start][1], end)) for start in range(groups - 1, end)
            )
            for end in range(groups, len(distances) + 1)
        }
    ends = best[len(distances)][1]
    return [list(range(start, end)) for start, end in zip((0, *ends), ends, strict=False)]


def unit_distances(get: Callable[[str], nn.Module], units: Sequence[Sequence[str]], calls: dict[str, Call]) -> Tensor:
    """(N, N): d(i, j) of the units of a run, whose blocks are replaced one at a time and added."""
    return torch.tensor(
        [
            [sum(replaced_distance([get(b)], [calls[a]]) for a, b in zip(i, j, strict=True)) for j in units]
            for i in units
        ],
        dtype=torch.double,
    )


def closest_base(blocks: Sequence[nn.Module], calls: Sequence[Call], rank: int) -> Base:
    """Which weights to share: those of one of the blocks, or the mean, whichever has the least sum of d."""

    def distance(base: Base) -> float:
        copies = copy.deepcopy(list(blocks))
        tie(copies, base, rank)
        return replaced_distance(copies, calls)

    candidates: list[Base] = [*range(len(blocks)), "mean"]
    return min(candidates, key=distance)


@dataclass(frozen=True)
class Distance:
    """Relative errors: of the output, and of what each block returns, by its name."""

    output: float
    blocks: dict[str, float]


def recursify_distance(model: nn.Module, original: nn.Module, images: Tensor) -> Distance:
    """How far a model of `recursify` is from the original, on images.

    Args:
        images: (B, C, H, W), as the models take them.

    Returns the relative error |y - y0| / |y0| of the output (the logits), and of the output of each block.

    Raises `InputError` if the model was not made of the original, or does not take the images.
    """
    check_images(original, images)
    names = [name for run in find_runs(original) for name in run.names]
    try:
        found, output = record(model, names, images)
    except AttributeError as error:
        raise InputError(f"{type(model).__name__} does not have the blocks of the original ({error})") from error
    expected, original_output = record(original, names, images)
    if output.shape != original_output.shape:
        raise InputError(f"outputs are {tuple(output.shape)}, but those of the original {tuple(original_output.shape)}")
    for name in names:
        if name in expected and found[name].output.shape != expected[name].output.shape:
            shapes = tuple(found[name].output.shape), tuple(expected[name].output.shape)
            raise InputError(f"{name} returns {shapes[0]}, but in the original {shapes[1]}")
    errors = {name: relative_error(found[name].output, expected[name].output) for name in names if name in expected}
    return Distance(relative_error(output, original_output), errors)
