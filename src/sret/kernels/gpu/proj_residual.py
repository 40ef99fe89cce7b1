"""Output projection of attention and residual in one Triton kernel, `y = alpha x + keep (Wp a + bp)`, and its backward.

`keep` is the factor of stochastic depth, one a sample.
Letters: B batch, N tokens, C channels, H heads, DP padded channels of a head.
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
    residual_tile,
    store_tile,
    tiles_for,
    weight_gradient,
)
from sret.kernels.second_order import TRITON, first_order


class ProjResidual(torch.autograd.Function):
    """(B, N, C) and (B N, H DP) -> (B, N, C); the weight comes in float32 and in the dtype of the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor | None,
        keep: Tensor | None,
        attended: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_cast: Tensor,
    ) -> Tensor:
        rows = as_rows(x)
        y = torch.empty_like(rows)
        (R, C), (A, BC) = rows.shape, weight_cast.shape
        tiles = tiles_for(FORWARD, BC)
        _proj_residual[(triton.cdiv(R, tiles.BM),)](
            rows, alpha, keep, attended, weight_cast, bias, y, R, C, x.shape[1],
            A=A, BM=tiles.BM, BC=BC, BA=tiles.BH, HAS_ALPHA=alpha is not None, HAS_KEEP=keep is not None,
            **tiles.options,
        )  # fmt: skip
        ctx.save_for_backward(rows, alpha, keep, attended, weight_cast)
        ctx.shape = x.shape
        return y.view(x.shape)

    @staticmethod
    @first_order(TRITON)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, alpha, keep, attended, weight = ctx.saved_tensors
        grad = as_rows(grad)
        (R, C), (A, BC) = rows.shape, weight.shape
        tiles = tiles_for(BACKWARD, BC)
        programs = triton.cdiv(R, tiles.BM)
        grad_x, grad_attended = torch.empty_like(rows), torch.empty_like(attended)
        grad_branch = torch.empty(R, BC, dtype=weight.dtype, device=rows.device)
        sums = torch.empty(programs, BC + 1, device=rows.device)
        _proj_residual_backward[(programs,)](
            rows, grad, alpha, keep, weight, grad_x, grad_attended, grad_branch, sums, R, C, ctx.shape[1],
            A=A, BM=tiles.BM, BC=BC, BA=tiles.BH, HAS_ALPHA=alpha is not None, HAS_KEEP=keep is not None,
            **tiles.options,
        )  # fmt: skip
        grad_bias, grad_alpha = sums.sum(0).split([BC, 1])
        grad_weight = weight_gradient(attended, grad_branch)
        return (
            grad_x.view(ctx.shape),
            None if alpha is None else grad_alpha,
            None,
            grad_attended,
            grad_weight,
            grad_bias,
            None,
        )


@triton.jit
def proj_tile(
    attended, weight, rows, num_rows, A: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr
):  # fmt: skip
    """(BM, BC) float32: the output projection of attention without its bias."""
    columns = tl.arange(0, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(0, A, BA):
        block = start + tl.arange(0, BA)
        inside = block < A
        a = tl.load(
            attended + rows.to(tl.int64)[:, None] * A + block[None, :],
            mask=(rows < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        weights = tl.load(weight + block[:, None] * BC + columns[None, :], mask=inside[:, None], other=0.0)
        total += dot(a, weights)
    return total


@triton.jit
def _proj_residual(
    x, alpha, keep, attended, weight, bias, y, num_rows, num_channels, num_tokens,
    A: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    branch = proj_tile(attended, weight, rows, num_rows, A, BM, BC, BA) + tl.load(bias + columns)[None, :]
    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
    out = residual_tile(stream, branch, alpha, keep, rows, num_rows, num_tokens, HAS_ALPHA, HAS_KEEP)
    store_tile(y, out, rows, columns, num_rows, num_channels, num_channels)


@triton.jit
def _proj_residual_backward(
    x, grad, alpha, keep, weight, grad_x, grad_attended, grad_branch_out, sums, num_rows, num_channels, num_tokens,
    A: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows, columns = program * BM + tl.arange(0, BM), tl.arange(0, BC)
    sums += program.to(tl.int64) * (BC + 1)
    grad_stream = load_tile(grad, rows, columns, num_rows, num_channels, num_channels)
    grad_branch = grad_stream
    if HAS_KEEP:
        grad_branch *= tl.load(keep + rows // num_tokens, mask=rows < num_rows, other=0.0)[:, None]
    tl.store(sums + columns, tl.sum(grad_branch, 0))
    if HAS_ALPHA:
        stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
        tl.store(sums + BC, tl.sum(tl.sum(grad_stream * stream, 1), 0))
        grad_stream *= tl.load(alpha)
    store_tile(grad_x, grad_stream, rows, columns, num_rows, num_channels, num_channels)
    grad_branch = grad_branch.to(weight.dtype.element_ty)
    store_tile(grad_branch_out, grad_branch, rows, columns, num_rows, BC, BC)
    for start in range(0, A, BA):
        block = start + tl.arange(0, BA)
        weights = tl.load(weight + block[:, None] * BC + columns[None, :], mask=(block < A)[:, None], other=0.0)
        store_tile(grad_attended, dot(grad_branch, tl.trans(weights)), rows, block, num_rows, A, A)
