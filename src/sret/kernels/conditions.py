"""The circumstances in which a layer is called, on which the choice of a kernel depends."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) is at work, which knows formulas and not every kernel or layout."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products of x in; None where it is off."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def is_listened_to(*modules: nn.Module) -> bool:
    """Whether somebody waits for one of these modules to be called: a hook, or a `forward` put over its own."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in m.__dict__ or any(getattr(m, kind) for kind in kinds) for m in modules)
