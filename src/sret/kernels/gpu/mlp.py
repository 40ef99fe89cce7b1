"""MLP with a learnable residual in one Triton kernel, and its backward in another one.

    y = alpha x + keep (W2 GELU(W1 LN(x) + b1) + b2)

The hidden activations stay in registers. Backward recomputes them, and writes them once for the gradients of the
weights, which are matrix products of all rows. `keep` is the factor of stochastic depth, one a sample.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import pad

from sret.kernels.gpu.tiles import (
    BACKWARD,
    FORWARD,
    as_rows,
    channel_block,
    dot,
    gaussian_cdf,
    gelu_slope,
    load_tile,
    mlp_tile,
    norm_tile,
    normalize,
    normalize_backward,
    padded,
    residual_tile,
    store_tile,
    tiles_for,
    weight_gradient,
)
from sret.kernels.linear import scaled
from sret.kernels.second_order import TRITON, first_order

HIDDEN_MULTIPLE = 64  # hidden channels are padded to a multiple of every BH


@dataclass(frozen=True)
class PackedMlp:
    """An MLP's weights as the kernels read them: padded with zeros, scaled by the branch's coefficient.

    Attributes:
        norm_weight, norm_bias: (BC,) float32.
        w1, w2: W1 and W2^T, (HIDDEN, BC) float32; gradients flow through these.
        b1: (HIDDEN,) float32.
        b2: (BC,) float32.
        w1_cast, w2_cast: w1 and w2 in the dtype of the products, without gradients.
        eps: of the norm.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w1_cast: Tensor
    w2_cast: Tensor
    eps: float

    @classmethod
    def of(
        cls, norm: nn.Module, fc1: nn.Linear, fc2: nn.Linear, factor: Tensor | float | None, dtype: torch.dtype
    ) -> "PackedMlp":
        """Packs a LayerNorm and the layers of an MLP; `factor` scales the second layer."""
        dim, hidden = fc1.in_features, fc1.out_features
        more, more_hidden = channel_block(dim) - dim, padded(hidden, HIDDEN_MULTIPLE) - hidden
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = scaled(fc2, factor)
        w1 = pad(fc1.weight.float(), (0, more, 0, more_hidden))
        w2 = pad(weight.float().T, (0, more, 0, more_hidden)).contiguous()
        return cls(
            pad(norm.weight.float(), (0, more)),
            pad(norm.bias.float(), (0, more)),
            w1,
            pad(fc1.bias.float(), (0, more_hidden)),
            w2,
            pad(bias.float(), (0, more)),
            w1.detach().to(dtype),
            w2.detach().to(dtype),
            norm.eps,
        )


def mlp_residual(x: Tensor, weights: PackedMlp, alpha: Tensor | None, keep: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, N, C), in the dtype of x. alpha is (1,), keep (B,), both float32; None for 1."""
    w = weights
    return cast(
        Tensor,
        _MlpResidual.apply(
            x, alpha, keep, w.norm_weight, w.norm_bias, w.w1, w.b1, w.w2, w.b2, w.w1_cast, w.w2_cast, w.eps
        ),
    )


class _MlpResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor | None,
        keep: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w1_cast: Tensor,
        w2_cast: Tensor,
        eps: float,
    ) -> Tensor:
        rows = as_rows(x)
        y = torch.empty_like(rows)
        R, C = rows.shape
        HIDDEN, BC = w1_cast.shape
        tiles = tiles_for(FORWARD, BC)
        _forward[(triton.cdiv(R, tiles.BM),)](
            rows, alpha, keep, norm_weight, norm_bias, w1_cast, b1, w2_cast, b2, y, R, C, x.shape[1], eps,
            HIDDEN=HIDDEN, BM=tiles.BM, BC=BC, BH=tiles.BH, HAS_ALPHA=alpha is not None, HAS_KEEP=keep is not None,
            **tiles.options,
        )  # fmt: skip
        ctx.save_for_backward(rows, alpha, keep, norm_weight, norm_bias, b1, w1_cast, w2_cast)
        ctx.shape, ctx.eps = x.shape, eps
        return y.view(x.shape)

    @staticmethod
    @first_order(TRITON)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, alpha, keep, norm_weight, norm_bias, b1, w1, w2 = ctx.saved_tensors
        grad = as_rows(grad)
        R, C = rows.shape
        HIDDEN, BC = w1.shape
        tiles = tiles_for(BACKWARD, BC)
        programs = triton.cdiv(R, tiles.BM)
        grad_x = torch.empty_like(rows)
        normed, grad_branch = (torch.empty(R, BC, dtype=w1.dtype, device=rows.device) for _ in range(2))
        hidden, grad_hidden = (torch.empty(R, HIDDEN, dtype=w1.dtype, device=rows.device) for _ in range(2))
        sums = torch.empty(programs, HIDDEN + 3 * BC + 1, device=rows.device)
        _backward[(programs,)](
            rows, grad, alpha, keep, norm_weight, norm_bias, w1, b1, w2,
            grad_x, normed, grad_branch, hidden, grad_hidden, sums, R, C, ctx.shape[1], ctx.eps,
            HIDDEN=HIDDEN, BM=tiles.BM, BC=BC, BH=tiles.BH, HAS_ALPHA=alpha is not None, HAS_KEEP=keep is not None,
            **tiles.options,
        )  # fmt: skip
        grad_b1, grad_b2, grad_norm_weight, grad_norm_bias, grad_alpha = sums.sum(0).split([HIDDEN, BC, BC, BC, 1])
        return (
            grad_x.view(ctx.shape),
            None if alpha is None else grad_alpha,
            None,
            grad_norm_weight,
            grad_norm_bias,
            weight_gradient(grad_hidden, normed),
            grad_b1,
            weight_gradient(hidden, grad_branch),
            grad_b2,
            None,
            None,
            None,
        )


@triton.jit
def _forward(
    x, alpha, keep, norm_weight, norm_bias, w1, b1, w2, b2, y, num_rows, num_channels, num_tokens, eps,
    HIDDEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
    normed = norm_tile(stream, norm_weight, norm_bias, columns, num_channels, eps)
    branch = mlp_tile(normed.to(w1.dtype.element_ty), w1, b1, w2, BM, BC, BH, HIDDEN)
    branch += tl.load(b2 + columns)[None, :]
    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)  # loaded again: fewer registers
    out = residual_tile(stream, branch, alpha, keep, rows, num_rows, num_tokens, HAS_ALPHA, HAS_KEEP)
    store_tile(y, out, rows, columns, num_rows, num_channels, num_channels)


@triton.jit
def _backward(
    x, grad, alpha, keep, norm_weight, norm_bias, w1, b1, w2,
    grad_x, normed_out, grad_branch_out, hidden_out, grad_hidden_out, sums, num_rows, num_channels, num_tokens, eps,
    HIDDEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """Besides the gradient of x: what the weight gradients are products of, and this program's part of all sums."""
    program = tl.program_id(0)
    rows, columns = program * BM + tl.arange(0, BM), tl.arange(0, BC)
    sums += program.to(tl.int64) * (HIDDEN + 3 * BC + 1)
    dtype = w1.dtype.element_ty

    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
    normalized, rstd = normalize(stream, columns, num_channels, eps)
    scale = tl.load(norm_weight + columns)[None, :]
    normed = (normalized * scale + tl.load(norm_bias + columns)[None, :]).to(dtype)
    store_tile(normed_out, normed, rows, columns, num_rows, BC, BC)

    grad_branch = load_tile(grad, rows, columns, num_rows, num_channels, num_channels)
    if HAS_KEEP:
        grad_branch *= tl.load(keep + rows // num_tokens, mask=rows < num_rows, other=0.0)[:, None]
    tl.store(sums + HIDDEN + columns, tl.sum(grad_branch, 0))
    grad_branch = grad_branch.to(dtype)
    store_tile(grad_branch_out, grad_branch, rows, columns, num_rows, BC, BC)

    grad_normed = tl.zeros((BM, BC), tl.float32)
    for start in range(0, HIDDEN, BH):
        block = start + tl.arange(0, BH)
        weights = block[:, None] * BC + columns[None, :]
        w1_block = tl.load(w1 + weights)
        pre = dot(normed, tl.trans(w1_block)) + tl.load(b1 + block)[None, :]
        cdf = gaussian_cdf(pre)
        store_tile(hidden_out, pre * cdf, rows, block, num_rows, HIDDEN, HIDDEN)
        grad_hidden = dot(grad_branch, tl.trans(tl.load(w2 + weights))) * gelu_slope(pre, cdf)
        tl.store(sums + block, tl.sum(grad_hidden, 0))
        store_tile(grad_hidden_out, grad_hidden, rows, block, num_rows, HIDDEN, HIDDEN)
        grad_normed += dot(grad_hidden.to(dtype), w1_block)

    sums += HIDDEN + BC
    tl.store(sums + columns, tl.sum(grad_normed * normalized, 0))
    tl.store(sums + BC + columns, tl.sum(grad_normed, 0))
    through_norm = normalize_backward(grad_normed * scale, normalized, rstd, num_channels)
    grad_stream = load_tile(grad, rows, columns, num_rows, num_channels, num_channels)  # loaded again: fewer registers
    if HAS_ALPHA:
        tl.store(sums + 2 * BC, tl.sum(tl.sum(grad_stream * stream, 1), 0))
        grad_stream *= tl.load(alpha)
    store_tile(grad_x, grad_stream + through_norm, rows, columns, num_rows, num_channels, num_channels)
