"""Scaled dot-product attention: which kernel computes it.

    softmax(Q K^T / sqrt(D)) V

Letters: S sequences, H heads, M tokens in a sequence, D channels of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from sret.kernels.conditions import is_transformed

SCORES_AT_A_TIME = 2**20  # 2 MiB in bfloat16: they stay in cache


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(S, H, M, D) each, any views -> (S, H, M, D), by PyTorch's fused kernel.

    But for training in half precision on CPUs, where that kernel's backward was measured up to five times slower than
    the formula in matrix products (docs/performance.md).
    """
    is_slow = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if is_slow and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if torch.compiler.is_compiling() or is_transformed():
            return formula(q, k, v)
        return _MatrixProductBackward.apply(q, k, v)
    return scaled_dot_product_attention(q, k, v)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(S, H, M, D) each -> (S, H, M, D), written out."""
    return _weights(q, k) @ v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


class _MatrixProductBackward(torch.autograd.Function):
    """The fused kernel forward; backward by the formula, a few sequences at a time. Stores no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S, H, M, D = grad.shape
        # Tokens before heads, as what they are gradients of: to be seen as (S, M, C) they need no copy.
        grads = tuple(grad.new_empty(S, M, H, D).transpose(1, 2) for _ in range(3))
        at_a_time = max(1, SCORES_AT_A_TIME // (H * M * M))
        parts = zip(*(t.split(at_a_time) for t in (*ctx.saved_tensors, grad, *grads)), strict=True)
        for q, k, v, g, dq, dk, dv in parts:
            weights = _weights(q, k)
            dv.copy_(weights.transpose(-2, -1) @ g)
            scores = torch.ops.aten._softmax_backward_data(g @ v.transpose(-2, -1), weights, -1, weights.dtype)
            scores *= D**-0.5
            dq.copy_(scores @ k)
            dk.copy_(scores.transpose(-2, -1) @ q)
        return grads[0], grads[1], grads[2]
