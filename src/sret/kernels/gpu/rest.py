"""The rest of a pass after attention in one Triton kernel, without gradients.

    x <- alpha x + Wp a + bp;   x <- alpha' x + MLP(LN(x));   x <- alpha'' x + projection's MLP(LN(x))

A row of the stream is read and written once; all between stays in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sret.kernels.gpu.attention import PackedAttention
from sret.kernels.gpu.mlp import PackedMlp
from sret.kernels.gpu.norm_linear import norm_linear
from sret.kernels.gpu.proj_residual import proj_tile
from sret.kernels.gpu.slices import Slices, attend
from sret.kernels.gpu.tiles import REST, as_rows, load_tile, mlp_tile, norm_tile, residual_tile, store_tile, tiles_for

Mlp = tuple[PackedMlp, Tensor | None]  # with alpha


def whole_pass(
    x: Tensor, attention: tuple[PackedAttention, Tensor | None], slices: Slices, mlp: Mlp, projection: Mlp | None
) -> Tensor:
    """(B, N, C) -> (B, N, C): a pass in three kernels. Each packed layer comes with its alpha, None for 1."""
    rows = as_rows(x)
    w = attention[0]
    qkv = norm_linear(rows, w.norm_weight, w.norm_bias, w.qkv_cast, w.qkv_bias, w.eps)
    attended, _ = attend(qkv, x.shape[0], slices, w.num_heads, w.head_dim)
    y = torch.empty_like(rows)
    (R, C), (A, BC) = rows.shape, w.proj_cast.shape
    tiles = tiles_for(REST, BC)
    last, last_alpha = projection or mlp
    _rest[(triton.cdiv(R, tiles.BM),)](
        rows, attended, w.proj_cast, w.proj_bias, attention[1], *_arguments(mlp[0]), mlp[1],
        *_arguments(last), last_alpha, y, R, C, mlp[0].eps, last.eps,
        A=A, HIDDEN=mlp[0].w1.shape[0], LAST_HIDDEN=last.w1.shape[0], BM=tiles.BM, BC=BC, BH=tiles.BH,
        HAS_ALPHA=attention[1] is not None, HAS_MLP_ALPHA=mlp[1] is not None, HAS_LAST_ALPHA=last_alpha is not None,
        HAS_LAST=projection is not None,
        **tiles.options,
    )  # fmt: skip
    return y.view(x.shape)


def _arguments(weights: PackedMlp) -> tuple[Tensor, ...]:
    w = weights
    return w.norm_weight, w.norm_bias, w.w1_cast, w.b1, w.w2_cast, w.b2


@triton.jit
def _mlp_residual_tile(
    stream, norm_weight, norm_bias, w1, b1, w2, b2, alpha, num_channels, eps,
    HIDDEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, HAS_ALPHA: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BC)
    normed = norm_tile(stream, norm_weight, norm_bias, columns, num_channels, eps)
    branch = mlp_tile(normed.to(w1.dtype.element_ty), w1, b1, w2, BM, BC, BH, HIDDEN)
    branch += tl.load(b2 + columns)[None, :]
    return residual_tile(stream, branch, alpha, alpha, columns, 0, 1, HAS_ALPHA, False)


@triton.jit
def _rest(
    x, attended, proj, proj_bias, alpha,
    norm_weight, norm_bias, w1, b1, w2, b2, mlp_alpha,
    last_norm_weight, last_norm_bias, last_w1, last_b1, last_w2, last_b2, last_alpha,
    y, num_rows, num_channels, eps, last_eps,
    A: tl.constexpr, HIDDEN: tl.constexpr, LAST_HIDDEN: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_MLP_ALPHA: tl.constexpr, HAS_LAST_ALPHA: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    branch = proj_tile(attended, proj, rows, num_rows, A, BM, BC, BH) + tl.load(proj_bias + columns)[None, :]
    stream = load_tile(x, rows, columns, num_rows, num_channels, num_channels)
    stream = residual_tile(stream, branch, alpha, alpha, rows, num_rows, 1, HAS_ALPHA, False)
    stream = _mlp_residual_tile(
        stream, norm_weight, norm_bias, w1, b1, w2, b2, mlp_alpha, num_channels, eps,
        HIDDEN, BM, BC, BH, HAS_MLP_ALPHA,
    )  # fmt: skip
    if HAS_LAST:
        stream = _mlp_residual_tile(
            stream, last_norm_weight, last_norm_bias, last_w1, last_b1, last_w2, last_b2, last_alpha,
            num_channels, last_eps, LAST_HIDDEN, BM, BC, BH, HAS_LAST_ALPHA,
        )  # fmt: skip
    store_tile(y, stream, rows, columns, num_rows, num_channels, num_channels)
