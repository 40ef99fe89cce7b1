"""Second derivatives (`create_graph=True`): backward passes that have none say what to use instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FUSED = "fused attention has no second derivatives (create_graph=True); call timm.layers.set_fused_attn(False) before"
TRITON = "the Triton kernels have no second derivatives (create_graph=True); unset SRET_TRITON"
RECOMPUTED = "recomputed passes have no second derivatives (create_graph=True); use memory 'none'"

Backward = Callable[..., tuple[Any, ...]]


def first_order(advice: str) -> Callable[[Backward], Backward]:
    """For the backward of an autograd function: as `once_differentiable`, but raises an error with `advice`."""

    def decorate(backward: Backward) -> Backward:
        once = once_differentiable(backward)

        def checked(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            refuse_graph(advice)
            return once(ctx, *grads)

        return checked

    return decorate


def refuse_graph(advice: str) -> None:
    """Raises `RuntimeError` with `advice` if backward is asked for a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(advice)
