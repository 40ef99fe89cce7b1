"""Lets a block of any model run more than once, and weights what each run changes.

    x <- x + a_0 (f(x) - x)                   the block's own run; a_0 is 1, or learned
    x <- x + g_k d (f(x) - x),  k = 1 ... K   the extra passes; g_k begins at 0, d is 1 or 1 / (K + 1)

    x <- NLL(x)                               after each run, if wanted: a projection of its own, at first the identity

So a model computes at the start what it computed before. A block keeps its class's attributes and the names of its
parameters: its class is replaced by a subclass, as torch's parametrizations do.

Of a block that returns a tuple, the first element is x, and the others are those of its own run.

In extra passes BatchNorm uses its running statistics, in training too: they are those of the block's own run. So a run
that is repeated for gradients (activation checkpointing) must not update them again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sret.errors import InputError
from sret.layers.projection import NonLinearProjection
from sret.models.recursify.subclass import subclass
from sret.models.timm.config import Scale


def add_passes(
    block: nn.Module, extra_passes: int, scale: Scale = "none", is_damped: bool = False, has_projection: bool = False
) -> None:
    """Changes a block in place.

    Args:
        extra_passes: K.
        scale: whether a_0 is learned, as a scalar or as a vector with a factor for each channel of the block's first
            LayerNorm or, without any, its last BatchNorm.
        is_damped: whether d is 1 / (K + 1).
        has_projection: whether each run is followed by a non-linear projection; its width is that of the block's first
            LayerNorm.

    Raises `InputError` for a block whose own `forward` was replaced, as some tools do with hooks, for projections of
    a block without LayerNorm, and for a vector without either norm.
    """
    if "forward" in vars(block):
        raise InputError(
            f"the forward of a {type(block).__name__} was replaced, which hides extra passes; undo it first"
        )
    if hasattr(block, "pass_gates"):
        raise InputError("the blocks have extra passes or scales already; start from the model without them")
    first, size = next(block.parameters()), scale_size(block, scale)
    block.__class__ = _repeated(type(block))  # type: ignore[arg-type]  # mypy takes classes for not hashable
    block.register_parameter("pass_scale", nn.Parameter(first.new_ones(size)) if size else None)
    block.register_parameter("pass_gates", nn.Parameter(first.new_zeros(extra_passes)) if extra_passes else None)
    if has_projection:
        block.add_module("pass_projections", _projections(block, 1 + extra_passes))
    else:
        vars(block)["pass_projections"] = None  # no entry among the modules: an nn.Sequential would call it
    vars(block)["pass_damping"] = 1 / (extra_passes + 1) if is_damped else 1.0


@cache
def _repeated(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward runs that of `base` several times."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}

        def run() -> Any:
            return base.forward(self, *(inputs[i] for i in range(len(args))), **{name: inputs[name] for name in kwargs})

        with _no_updates(self, self.pass_gates is not None and _is_in_backward()):
            y, others = _stream_of(run())
        place = _place_of_stream(base, inputs, y)
        if self.pass_scale is not None:
            y = _between(inputs[place], y, _for_channels(self.pass_scale, y))
        y = self.pass_projections[0](y) if self.pass_projections else y
        with _fixed_statistics(self):
            for k in range(0 if self.pass_gates is None else len(self.pass_gates)):
                inputs[place] = y
                y = _between(y, _stream_of(run())[0], self.pass_damping * self.pass_gates[k])
                y = self.pass_projections[k + 1](y) if self.pass_projections else y
        return y if others is None else (y, *others)

    return subclass(base, "Repeated", forward, _repeated)


def _stream_of(output: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """The stream, and the other values if a block returns a tuple: its first element is then the stream."""
    return (output[0], output[1:]) if isinstance(output, tuple) and output else (output, None)


class StreamProjection(NonLinearProjection):
    """(B, ..., C) -> (B, ..., C): a non-linear projection that begins as the identity.

    Raises `InputError` for a tensor with another number of channels in its last axis.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.dim = dim
        nn.init.zeros_(self.branch.fc2.weight)
        nn.init.zeros_(self.branch.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C)."""
        check_stream(x.shape, self.dim)
        return super().forward(x.flatten(1, -2)).view(x.shape)


def scale_size(block: nn.Module, scale: Scale) -> int:
    """Numbers of a learned a_0. Raises `InputError` for a vector if the block has no norm that tells its channels."""
    if scale != "vector":
        return int(scale == "scalar")
    if norms := [module for module in block.modules() if isinstance(module, nn.LayerNorm)]:
        return norms[0].normalized_shape[-1]  # the norm of the input
    if batch_norms := [module for module in block.modules() if isinstance(module, _BatchNorm)]:
        return batch_norms[-1].num_features  # the norm of the output: the first may be that of wider, inner channels
    raise InputError(f'a {type(block).__name__} has no LayerNorm or BatchNorm; use scale="scalar"')


def _for_channels(scale: Tensor, x: Tensor) -> Tensor:
    """A factor for each channel, in the shape that multiplies (B, ..., C) or (B, C, H, W)."""
    size = len(scale)
    is_last, is_first = x.shape[-1] == size, x.ndim == 4 and x.shape[1] == size
    if size == 1 or (is_last and not is_first):
        return scale
    if is_first and not is_last:
        return scale[:, None, None]
    raise InputError(
        f"the channels of {tuple(x.shape)} are not clear, with a vector of {size}; use images of another size, or "
        'scale="scalar"'
    )


def stream_width(block: nn.Module) -> int:
    """Channels of the stream, from the block's first LayerNorm. Raises `InputError` if it cannot have projections."""
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
    if not norms or isinstance(block, nn.Sequential):
        raise InputError(f"a {type(block).__name__} cannot have projections: it has no LayerNorm, or is a sequence")
    return norms[0].normalized_shape[-1]


def check_stream(shape: tuple[int, ...], width: int) -> None:
    """Raises `InputError` unless a block's output of this shape can have projections of this width."""
    if len(shape) < 3 or shape[-1] != width:
        raise InputError(
            f"a projection takes a stream with {width} channels last, not {tuple(shape)}; leave projection out"
        )


def _projections(block: nn.Module, count: int) -> nn.ModuleList:
    first, width = next(block.parameters()), stream_width(block)
    return nn.ModuleList(StreamProjection(width) for _ in range(count)).to(first)


def _between(x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """x + share (y - x), in the dtype of y: under autocast the dtypes may differ."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return torch.lerp(x.to(dtype), y.to(dtype), share.to(dtype)).to(y.dtype)


@contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    """Within this context BatchNorm in the block uses its running statistics and does not update them."""
    changed = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


@contextmanager
def _no_updates(block: nn.Module, is_repeated: bool) -> Iterator[None]:
    """Within this context BatchNorm in training uses the statistics of its batch, and keeps its running ones."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and is_repeated]
    changed = [(module, module.momentum, module.num_batches_tracked) for module in norms]
    for module in norms:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, momentum, count in changed:
            module.momentum, module.num_batches_tracked = momentum, count


def _is_in_backward() -> bool:
    """Whether autograd is computing gradients now: activation checkpointing then runs a module again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _place_of_stream(base: type[nn.Module], inputs: Mapping[int | str, Any], y: Any) -> int | str:
    """Which argument a block changes: the first tensor of the shape of its output; CaiT's last blocks have the second.

    Raises `InputError` if there is none.
    """
    for place, x in inputs.items():
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
            return place
    found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    raise InputError(
        f"a {base.__name__} cannot run again: its output, {found}, does not have the shape of an argument; choose "
        "other blocks with parts, or leave extra_passes and scale out"
    )
