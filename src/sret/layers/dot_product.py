"""Scaled dot-product attention: which kernel computes it.

    softmax(Q K^T / sqrt(D)) V

Letters: S sequences, H heads, M tokens in a sequence, D channels of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

SCORES_AT_A_TIME = 2**20  # 2 MiB in bfloat16: they stay in cache


def attend(qkv: Tensor) -> Tensor:
    """(3, S, H, M, D), any view -> (S, H, M, D), by PyTorch's fused kernel.

    But for training in half precision on CPUs, where that kernel's backward was measured up to five times slower than
    the formula in matrix products (docs/performance.md).
    """
    is_slow = qkv.device.type == "cpu" and qkv.dtype in (torch.bfloat16, torch.float16)
    if is_slow and torch.is_grad_enabled() and qkv.requires_grad:
        return formula(qkv) if torch.compiler.is_compiling() else _MatrixProductBackward.apply(qkv)
    q, k, v = qkv.unbind(0)
    return scaled_dot_product_attention(q, k, v)


def formula(qkv: Tensor) -> Tensor:
    """(3, S, H, M, D) -> (S, H, M, D), written out."""
    q, k, v = qkv.unbind(0)
    return _weights(q, k) @ v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


class _MatrixProductBackward(torch.autograd.Function):
    """The fused kernel forward; backward by the formula, a few sequences at a time. Stores no scores."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        q, k, v = qkv.unbind(0)
        return scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        _, _, H, M, D = qkv.shape
        at_a_time = max(1, SCORES_AT_A_TIME // (H * M * M))
        # In the memory layout of qkv, so that the product before it can use it as it is.
        grad_qkv = torch.empty_like(qkv)
        for (q, k, v), g, (dq, dk, dv) in zip(
            qkv.split(at_a_time, dim=1), grad.split(at_a_time), grad_qkv.split(at_a_time, dim=1), strict=True
        ):
            weights = _weights(q, k)
            dv.copy_(weights.transpose(-2, -1) @ g)
            scores = torch.ops.aten._softmax_backward_data(g @ v.transpose(-2, -1), weights, -1, weights.dtype)
            scores *= D**-0.5
            dq.copy_(scores @ k)
            dk.copy_(scores.transpose(-2, -1) @ q)
        return grad_qkv
