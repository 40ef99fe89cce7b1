"""Restricts the attention of another model's blocks to slices of the tokens.

    a patch token attends to the prefix tokens (class, registers) and to the patch tokens of its slice;
    a prefix token attends to all tokens

The model's own attention module computes everything else: q, k and v, their norms, rotary embeddings, biases of
positions and the output projection. Only its call of `scaled_dot_product_attention` is replaced, so the result is that
of the same attention with a mask, without the products that the mask would throw away.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sret.errors import InputError
from sret.kernels.slices import slice_lengths
from sret.models.recursify.subclass import subclass


@dataclass(frozen=True)
class Slicing:
    """How the tokens of a sequence are sliced.

    Attributes:
        num_groups: G, slices of the patch tokens.
        num_prefix_tokens: P, tokens at the beginning of the sequence that belong to every slice.
        is_strided: slice g has the patch tokens g, g + G, g + 2G, ... instead of neighbours.
    """

    num_groups: int
    num_prefix_tokens: int = 0
    is_strided: bool = False


def check_sliceable(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a block. Raises `InputError` if it has none that can be sliced."""
    found = [module for module in block.modules() if hasattr(module, "fused_attn")]
    if not found or hasattr(block, "window_size"):  # attention in windows
        raise InputError(
            f"the attention of a {type(block).__name__} cannot be sliced: only timm's attention between all tokens can"
        )
    for module in found:
        if hasattr(module, "slicing"):
            raise InputError(
                f"the attention of the {type(block).__name__}s is sliced already; start from the model without"
            )
        if "forward" in vars(module) or not module.fused_attn:
            raise InputError(
                f"a {type(module).__name__} cannot be sliced: it does not call PyTorch's scaled_dot_product_attention"
            )
    return found


def slice_attention(block: nn.Module, slicing: Slicing) -> None:
    """Changes the attention of a block in place.

    Raises `InputError` for a block without attention of all tokens, or whose attention is not a single call of
    `scaled_dot_product_attention`.
    """
    for module in check_sliceable(block):
        module.__class__ = _sliced(type(module))  # type: ignore[arg-type]  # mypy takes classes for not hashable
        vars(module)["slicing"] = slicing


@cache
def _sliced(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward computes the attention of `base` in slices."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with _InSlices(self.slicing):
            return base.forward(self, *args, **kwargs)

    return subclass(base, "Sliced", forward, _sliced)


class _InSlices(TorchFunctionMode):
    """Within this context `scaled_dot_product_attention` is computed in slices."""

    def __init__(self, slicing: Slicing) -> None:
        super().__init__()
        self.slicing = slicing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return attention_in_slices(self.slicing, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention_in_slices(
    slicing: Slicing,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """(B, H, N, D) -> (B, H, N, D), as `scaled_dot_product_attention`. A mask is (..., N, N), added or boolean.

    Raises `InputError` for causal attention, for keys of other tokens than the queries, and for too few tokens.
    """
    B, _, N, _ = q.shape
    if is_causal or k.shape[2] != N:
        raise InputError("attention that is causal, or has other keys than queries, cannot be sliced")
    attend: Any = partial(scaled_dot_product_attention, dropout_p=dropout_p, **options)
    P, G = slicing.num_prefix_tokens, slicing.num_groups
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(B, -1, N, N)
    tokens = torch.arange(P, N, device=q.device)
    parts, places = [], []
    if P:
        mask = None if attn_mask is None else attn_mask[..., :P, :]
        parts.append(attend(q[:, :, :P], k, v, attn_mask=mask))
        places.append(torch.arange(P, device=q.device))
    if slicing.is_strided:
        tokens = torch.cat([tokens[g::G] for g in range(G)])
    start = 0
    for count, length in slice_lengths(N - P, G):
        own = tokens[start : start + count * length].view(count, length)  # (G, n)
        start += count * length
        seen = torch.cat([torch.arange(P, device=q.device).expand(count, P), own], 1)  # (G, P + n)
        mask = None
        if attn_mask is not None:
            mask = attn_mask[:, :, own[:, :, None], seen[:, None, :]]  # (B, H, G, n, P + n)
            mask = mask.transpose(1, 2).flatten(0, 1)
        q_own, k_seen, v_seen = (
            x[:, :, index].transpose(1, 2).flatten(0, 1) for x, index in ((q, own), (k, seen), (v, seen))
        )
        out = attend(q_own, k_seen, v_seen, attn_mask=mask)  # (B G, H, n, D)
        parts.append(out.unflatten(0, (B, count)).transpose(1, 2).flatten(2, 3))
        places.append(own.flatten())
    out = torch.cat(parts, 2)
    if not slicing.is_strided:
        return out
    order = torch.cat(places)
    return out[:, :, torch.empty_like(order).scatter_(0, order, torch.arange(N, device=q.device))]
