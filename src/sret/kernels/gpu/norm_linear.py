"""LayerNorm and a product in one Triton kernel, `qkv = Wqkv LN(x) + b`, and its backward in another one.

Letters: B batch, N tokens, C channels, H heads, D channels of a head (DP: padded).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sret.kernels.gpu.tiles import (
    BACKWARD,
    FORWARD,
    as_rows,
    dot,
    load_tile,
    norm_tile,
    normalize,
    normalize_backward,
    store_tile,
    tiles_for,
    weight_gradient,
)
from sret.kernels.second_order import TRITON, first_order


def norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(B N, C) -> (B N, H 3 DP): the first product of attention, without a gradient."""
    (R, C), (K, BC) = x.shape, weight.shape
    y = x.new_empty(R, K, dtype=weight.dtype)
    tiles = tiles_for(FORWARD, BC)
    _norm_linear[(triton.cdiv(R, tiles.BM),)](
        x, norm_weight, norm_bias, weight, bias, y, R, C, eps,
        K=K, BM=tiles.BM, BC=BC, BK=tiles.BH, **tiles.options,
    )  # fmt: skip
    return y


class NormLinear(torch.autograd.Function):
    """`norm_linear` of (B, N, C), with gradients; the weight comes in float32 and in the dtype of the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_cast: Tensor,
        eps: float,
    ) -> Tensor:
        rows = as_rows(x)
        ctx.save_for_backward(rows, norm_weight, norm_bias, weight_cast)
        ctx.shape, ctx.eps = x.shape, eps
        return norm_linear(rows, norm_weight, norm_bias, weight_cast, bias, eps)

    @staticmethod
    @first_order(TRITON)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, norm_weight, norm_bias, weight = ctx.saved_tensors
        (R, C), (K, BC) = rows.shape, weight.shape
        tiles = tiles_for(BACKWARD, BC)
        programs = triton.cdiv(R, tiles.BM)
        grad_x, normed = torch.empty_like(rows), torch.empty(R, BC, dtype=weight.dtype, device=rows.device)
        sums = torch.empty(programs, K + 2 * BC, device=rows.device)
        _norm_linear_backward[(programs,)](
            rows, grad, norm_weight, norm_bias, weight, grad_x, normed, sums, R, C, ctx.eps,
            K=K, BM=tiles.BM, BC=BC, BK=tiles.BH, **tiles.options,
        )  # fmt: skip
        grad_bias, grad_norm_weight, grad_norm_bias = sums.sum(0).split([K, BC, BC])
        grad_weight = weight_gradient(grad, normed)
        return grad_x.view(ctx.shape), grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None


@triton.jit
def _norm_linear(
    x, norm_weight, norm_bias, weight, bias, y, num_rows, num_channels, eps,
    K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
    normed = norm_tile(stream, norm_weight, norm_bias, columns, num_channels, eps)
    normed = normed.to(weight.dtype.element_ty)
    for start in range(0, K, BK):
        block = start + tl.arange(0, BK)
        inside = block < K
        weights = tl.load(weight + block[:, None] * BC + columns[None, :], mask=inside[:, None], other=0.0)
        out = dot(normed, tl.trans(weights)) + tl.load(bias + block, mask=inside, other=0.0)[None, :]
        store_tile(y, out, rows, block, num_rows, K, K)


@triton.jit
def _norm_linear_backward(
    x, grad, norm_weight, norm_bias, weight, grad_x, normed_out, sums, num_rows, num_channels, eps,
    K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows, columns = program * BM + tl.arange(0, BM), tl.arange(0, BC)
    sums += program.to(tl.int64) * (K + 2 * BC)
    dtype = weight.dtype.element_ty
    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
    normalized, rstd = normalize(stream, columns, num_channels, eps)
    scale = tl.load(norm_weight + columns)[None, :]
    normed = normalized * scale + tl.load(norm_bias + columns)[None, :]
    store_tile(normed_out, normed, rows, columns, num_rows, BC, BC)
    grad_normed = tl.zeros((BM, BC), tl.float32)
    for start in range(0, K, BK):
        block = start + tl.arange(0, BK)
        inside = block < K
        grad_block = load_tile(grad, rows, block, num_rows, K, K)
        tl.store(sums + block, tl.sum(grad_block, 0), mask=inside)
        weights = tl.load(weight + block[:, None] * BC + columns[None, :], mask=inside[:, None], other=0.0)
        grad_normed += dot(grad_block.to(dtype), weights)
    tl.store(sums + K + columns, tl.sum(grad_normed * normalized, 0))
    tl.store(sums + K + BC + columns, tl.sum(grad_normed, 0))
    out = normalize_backward(grad_normed * scale, normalized, rstd, num_channels)
    store_tile(grad_x, out, rows, columns, num_rows, num_channels, num_channels)
