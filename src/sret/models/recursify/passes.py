"""Lets a block of any model run more than once, and weights what each run changes.

    x <- x + a_0 (f(x) - x)                   the block's own run; a_0 is 1, or learned
    x <- x + g_k d (f(x) - x),  k = 1 ... K   the extra passes; g_k begins at 0, d is 1 or 1 / (K + 1)

So a model computes at the start what it computed before. A block keeps its class's attributes and the names of its
parameters: its class is replaced by a subclass, as torch's parametrizations do.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sret.errors import InputError


def add_passes(block: nn.Module, extra_passes: int, has_scale: bool, is_damped: bool) -> None:
    """Changes a block in place.

    Args:
        extra_passes: K.
        has_scale: whether a_0 is learned.
        is_damped: whether d is 1 / (K + 1).
    """
    first = next(block.parameters())
    block.__class__ = _repeated(type(block))  # type: ignore[arg-type]  # mypy takes classes for not hashable
    block.register_parameter("pass_scale", nn.Parameter(first.new_ones(1)) if has_scale else None)
    block.register_parameter("pass_gates", nn.Parameter(first.new_zeros(extra_passes)) if extra_passes else None)
    setattr(block, "pass_damping", 1 / (extra_passes + 1) if is_damped else 1.0)  # noqa: B010  # typed as a tensor


@cache
def _repeated(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward runs that of `base` several times."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = base.forward(self, *args, **kwargs)
        place = _place_of_stream(base, args, y)
        if self.pass_scale is not None:
            y = torch.lerp(args[place], y, self.pass_scale.to(y.dtype))
        for k in range(0 if self.pass_gates is None else len(self.pass_gates)):
            again = base.forward(self, *args[:place], y, *args[place + 1 :], **kwargs)
            y = torch.lerp(y, again, (self.pass_damping * self.pass_gates[k]).to(y.dtype))
        return y

    return type(f"Repeated{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def _place_of_stream(base: type[nn.Module], args: Sequence[Any], y: Any) -> int:
    """Which argument a block changes: the first tensor of the shape of its output; CaiT's last blocks have the second.

    Raises `InputError` if there is none.
    """
    for place, x in enumerate(args):
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
            return place
    found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    raise InputError(f"a {base.__name__} cannot run again: its output, {found}, has not the shape of an argument")
