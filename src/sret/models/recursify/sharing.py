"""Ties the weights of blocks, and corrects each pass by matrices of low rank.

    W_i = W + A_i B_i        W of the shared block, A_i (out, r), B_i (r, in) of pass i

A_i B_i is the best approximation of rank r of the difference between the weights of block i and the shared ones, by
their singular values. Vectors (biases, norms, scales) are then of their own in each pass: they are small.

Sources: relaxed recursive transformers, arXiv:2410.20672 (corrections of low rank by singular values).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sret.errors import InputError
from sret.models.timm.config import Share

Base = int | Literal["mean"]  # the weights to share: those of a block, by its place in the group, or the mean


def groups_of(num_units: int, passes: int, share: Share) -> list[list[int]]:
    """The units of a run that share their weights: a list of groups, whose first unit is the earliest.

    Raises `ValueError` with the reason if the units cannot be divided.
    """
    own = 1 if share == "middle" and passes > 1 else 0  # units at each end that keep their weights
    shared = num_units - 2 * own
    if shared < passes or shared % passes:
        possible = [n for n in range(2, shared + 1) if shared % n == 0]
        advice = f"passes can be {' or '.join(map(str, possible))}" if possible else "only passes=1 is possible"
        which = f"the {max(0, shared)} between the first and the last" if own else str(shared)
        raise ValueError(f"passes={passes} does not divide {which}; {advice}")
    blocks = shared // passes
    if share == "cycle":
        groups = [list(range(first, shared, blocks)) for first in range(blocks)]
    else:
        groups = [list(range(own + passes * i, own + passes * (i + 1))) for i in range(blocks)]
    return [[0], *groups, [num_units - 1]] if own else groups


def check_own_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raises `InputError` if a block has a parameter that is used elsewhere in the model too."""
    places: dict[int, list[str]] = {}
    for place, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(place)
    for name in names:
        prefix = f"{name}." if name else ""
        for parameter in model.get_submodule(name).parameters():
            used = places[id(parameter)]
            if outside := [place for place in used if not place.startswith(prefix)]:
                own = next(place for place in used if place.startswith(prefix))
                raise InputError(f"{own} and {outside[0]} are one weight already; give a model whose blocks share none")


def check_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Raises `InputError` if a block has weights that are no parameters, as quantized layers do."""
    for name in names:
        block = model.get_submodule(name)
        known = {key for key, _ in (*block.named_parameters(remove_duplicate=False), *block.named_buffers())}
        other = [key for key in block.state_dict() if key not in known and not key.endswith("_extra_state")]
        if other:
            raise InputError(f"{name}.{other[0]} is no parameter, so it cannot be shared; share before quantizing")


def check_rank(rank: int, blocks: Sequence[nn.Module]) -> None:
    """Raises `InputError` for a rank above the width."""
    sizes = [min(matrix_shape(p)) for block in blocks for p in block.parameters() if p.ndim >= 2]
    if rank > (most := max(sizes, default=0)):
        raise InputError(f"rank is {rank}, but the largest matrix of the blocks has rank {most}; use at most {most}")


@torch.no_grad()
def tie(blocks: Sequence[nn.Module], base: Base, rank: int) -> None:
    """Replaces the parameters of all blocks by shared ones, in place.

    Args:
        blocks: equal blocks, with parameters of their own.
        base: the shared weights are those of the block with this index, or the mean of all.
        rank: of each pass's correction of a matrix; 0 for none.

    Raises `InputError` if a weight is frozen in some of the blocks, or if one to correct is not finite.
    """
    made: dict[int, nn.Parameter] = {}  # a block may use one weight in several places
    for name, first in list(blocks[0].named_parameters(remove_duplicate=False)):
        owners = [(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for block in blocks]
        weights = [getattr(owner, leaf) for owner, leaf in owners]
        if len({weight.requires_grad for weight in weights}) > 1:
            raise InputError(f"{name} is frozen in some of the blocks that would share it; freeze the new model")
        if rank and first.ndim < 2:
            continue
        values = [weight.detach().clone() for weight in weights]
        start = torch.stack(values).mean(0) if base == "mean" else values[base]
        shared = made.setdefault(id(first), nn.Parameter(start, requires_grad=first.requires_grad))
        for (owner, leaf), value in zip(owners, values, strict=True):
            setattr(owner, leaf, shared)
            if rank:
                if not value.is_meta and not value.isfinite().all():
                    raise InputError(f"{name} of a block has values that are not finite")
                correction = LowRank(value - start, rank)
                parametrize.register_parametrization(owner, leaf, correction, unsafe=True)
                parametrizations: nn.ModuleDict = owner.parametrizations  # type: ignore[assignment]
                parametrizations[leaf].original = shared


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """(out, in) of a tensor that is corrected as a matrix: leading axes of one element are left out."""
    shape = list(x.shape)
    while len(shape) > 2 and shape[0] == 1:
        del shape[0]
    return shape[0], math.prod(shape[1:])


class LowRank(nn.Module):
    """W -> W + A B, which begins as the best approximation of a difference.

    Where the difference has no more directions, A has one of length 1 and B is 0, so that both can learn.

    Args:
        difference: of the shape of W; a tensor of more than two axes is taken as (first, all others).
        rank: r; less if the matrix is smaller.
    """

    def __init__(self, difference: Tensor, rank: int) -> None:
        super().__init__()
        u, s, v = _singular(difference.detach().reshape(matrix_shape(difference)).double())
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        is_empty = s <= 1e-6 * s.max()
        self.left = nn.Parameter((u * torch.where(is_empty, 1.0, s.sqrt())).to(difference.dtype))
        self.right = nn.Parameter((v * torch.where(is_empty, 0.0, s.sqrt())[:, None]).to(difference.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The corrected weight, of the same shape."""
        return weight + (self.left @ self.right).view(weight.shape)


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors and values of the singular value decomposition; of a matrix of zeros, at once, unit vectors."""
    if matrix.is_meta or matrix.any():
        return torch.linalg.svd(matrix, full_matrices=False)
    (height, width), size = matrix.shape, min(matrix.shape)
    return torch.eye(height, size).to(matrix), matrix.new_zeros(size), torch.eye(size, width).to(matrix)
