"""Conditions on which the choice of a kernel depends: function transforms, tracing, autocast, hooks."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) or `torch.jit.trace` is active; they do not support every kernel."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.jit.is_tracing()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of x; None if autocast is off."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def has_hooks(*modules: nn.Module) -> bool:
    """Whether one of these modules has a hook, or a replaced `forward`, so that it must be called as a module."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in m.__dict__ or any(getattr(m, kind) for kind in kinds) for m in modules)
