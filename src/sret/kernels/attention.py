"""Scaled dot-product attention, by the kernel that was measured fastest for the device and dtype.

    softmax(Q K^T / sqrt(D) + bias) V

Letters: S sequences, H heads, M tokens in a sequence, D channels of a head.
"""

from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sret.kernels.conditions import is_transformed
from sret.kernels.second_order import FUSED, first_order, refuse_graph

CHUNK_SCORES = 2**20  # attention scores per chunk: 2 MiB in bfloat16, which stay in cache


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of q, k and v, each (S, H, M, D) with any strides, -> (S, H, M, D), by PyTorch's fused kernel.

    `bias`, (S, 1, 1, M) of the same dtype, is added to the scores of each key.

    timm's switch `timm.layers.set_fused_attn(False)` selects the formula, which has second derivatives.

    Exception: training in half precision on CPUs. There the backward of the fused kernel was measured up to five times
    slower than matrix products (docs/performance.md), so these compute backward.
    """
    if not use_fused_attn():
        return formula(q, k, v, bias)
    is_slow = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if is_slow and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if bias is not None or torch.compiler.is_compiling() or is_transformed():
            return formula(q, k, v, bias)
        return _MatrixProductBackward.apply(q, k, v)
    x = scaled_dot_product_attention(q, k, v, bias)
    # Without this hook, torch names an operator instead of what would work. torch.func always asks for a graph.
    node = None if torch.compiler.is_compiling() or is_transformed() else x.grad_fn
    if node is not None and node.name().startswith("ScaledDotProduct"):  # torch's own formula has second derivatives
        x.register_hook(_refuse_graph)
    return x


def _refuse_graph(_: Tensor) -> None:
    refuse_graph(FUSED)


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in matrix products: (S, H, M, D) each -> (S, H, M, D)."""
    return _weights(q, k, bias) @ v


def _weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


class _MatrixProductBackward(torch.autograd.Function):
    """Forward by the fused kernel; backward by the formula, a few sequences at a time. Stores no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return scaled_dot_product_attention(q, k, v)

    @staticmethod
    @first_order(FUSED)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S, H, M, D = grad.shape
        # Memory order (S, M, H, D), as q, k and v have it, so that a view as (S, M, C) needs no copy.
        grads = tuple(grad.new_empty(S, M, H, D).transpose(1, 2) for _ in range(3))
        chunk = max(1, CHUNK_SCORES // (H * M * M))
        parts = zip(*(t.split(chunk) for t in (*ctx.saved_tensors, grad, *grads)), strict=True)
        for q, k, v, g, dq, dk, dv in parts:
            weights = _weights(q, k)
            dv.copy_(weights.transpose(-2, -1) @ g)
            scores = torch.ops.aten._softmax_backward_data(g @ v.transpose(-2, -1), weights, -1, weights.dtype)
            scores *= D**-0.5
            dq.copy_(scores @ k)
            dk.copy_(scores.transpose(-2, -1) @ q)
        return grads[0], grads[1], grads[2]
