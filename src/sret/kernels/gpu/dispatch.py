"""Decides whether a residual runs in Triton kernels, and says why not.

Everything that is unknown takes the plain formula of `sret.layers`: other devices, adapters, hooks, function
transforms, compiled and exported code. The kernels were not yet measured on a GPU, so they are off until the
environment has `SRET_TRITON=1`.
"""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sret.kernels.conditions import autocast_dtype, is_transformed

MIN_CAPABILITY = (8, 0)  # bfloat16 products
MAX_CHANNELS = 512
MAX_HEAD_CHANNELS = 128
DTYPES = (torch.bfloat16, torch.float16)  # of products; in float32 they do not run on tensor cores

_is_enabled = os.environ.get("SRET_TRITON", "") == "1"
Packed = TypeVar("Packed")


@contextmanager
def triton_kernels(is_enabled: bool) -> Iterator[None]:
    """Within this context passes use the Triton kernels where they can, or the plain formula."""
    global _is_enabled
    outer, _is_enabled = _is_enabled, is_enabled
    try:
        yield
    finally:
        _is_enabled = outer


def off() -> str | None:
    """How to turn the kernels on, or None if they are on."""
    return None if _is_enabled else "the Triton kernels are off; SRET_TRITON=1 turns them on"


def refusal(x: Tensor, weight: Tensor, num_channels: int, num_heads: int | None = None) -> str | None:
    """Why the kernels of no device can compute a residual of x, (B, N, `num_channels`), or None if they can.

    `num_heads` is that of an attention; None for a branch without heads.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return "compiled, exported and transformed code uses the plain formula"
    if type(x) not in (Tensor, nn.Parameter):
        return f"a {type(x).__name__} is not a plain tensor"
    dtype = compute_dtype(x, weight)
    if dtype not in DTYPES and not (is_interpreted() and dtype == torch.float32):
        return f"there is no kernel for products in {dtype}, but for bfloat16 and float16"
    if num_channels > MAX_CHANNELS:
        return f"there is no kernel for more than {MAX_CHANNELS} channels"
    if num_heads is not None and num_channels // num_heads > MAX_HEAD_CHANNELS:
        return f"there is no kernel for heads of more than {MAX_HEAD_CHANNELS} channels"
    if x.numel() == 0:
        return "the tensor is empty"
    return None


@lru_cache
def device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if is_interpreted():
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "the kernels need a GPU of compute capability {}.{}, this one has {}.{}".format(
            *MIN_CAPABILITY, *capability
        )
    return None


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, in Python, for tests (`TRITON_INTERPRET=1` before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of matrix products: that of autocast, or else of the weights."""
    return autocast_dtype(x) or weight.dtype


# packed weights ------------------------------------------------------------------------------------------------------

_frozen: WeakKeyDictionary[nn.Module, tuple[Hashable, Any]] = WeakKeyDictionary()
_current: dict[tuple[nn.Module, Hashable], Any] | None = None


def shared_packing() -> AbstractContextManager[None]:
    """A context in which weights are packed once for all passes; autograd then sums the gradients of packed weights."""
    return _shared_packing() if off() is None and not torch.compiler.is_compiling() else nullcontext()


@contextmanager
def _shared_packing() -> Iterator[None]:
    global _current
    outer, _current = _current, {}
    try:
        yield
    finally:
        _current = outer


def packed(module: nn.Module, dtype: torch.dtype, pack: Callable[[], Packed], is_constant: bool) -> Packed:
    """What `pack` makes of the weights of `module` for products in `dtype`; made anew when a weight has changed.

    `is_constant` says that the weights stay as they are, so that a CUDA graph may contain packed ones.
    """
    is_differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if is_differentiable or (is_captured and not is_constant):
        # In a CUDA graph the packed weights must be computed by the graph, so that replays see changed weights.
        if _current is None:
            return pack()
        key = module, (dtype, is_differentiable)
        if key not in _current:
            _current[key] = pack()
        return _current[key]
    state = (dtype, *((p.data_ptr(), p._version if not p.is_inference() else 0, p.dtype) for p in module.parameters()))
    found = _frozen.get(module)
    if found is None or found[0] != state:
        with torch.no_grad():
            found = state, pack()
        if not is_captured:  # what a graph computes is there only after its first replay
            _frozen[module] = found
    return found[1]
