"""Sliced attention with a learnable residual in three Triton kernels, and its backward in three others.

    qkv = Wqkv LN(x) + b            norm and product
    a = softmax(q k^T / sqrt(D)) v  within each slice, whose tokens are read where the permutation puts them
    y = alpha x + keep (Wp a + bp)  product and residual

No token is copied for a permutation: the attention kernel reads and writes tokens in their order in the image. Scores
stay in registers; backward recomputes them. `keep` is the factor of stochastic depth, one a sample.
Letters: B batch, N tokens, C channels, G slices, M tokens in a slice, H heads, D channels of a head (DP: padded).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import pad

from sret.kernels.gpu.dispatch import is_interpreted
from sret.kernels.gpu.tiles import (
    BACKWARD,
    FORWARD,
    as_rows,
    channel_block,
    dot,
    launch_options,
    load_tile,
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

HEAD_MULTIPLE = 16  # channels of a head are padded to a multiple, so that loads are aligned
RASTER, STRIDED, INDEXED = 0, 1, 2  # orders of the tokens


@dataclass(frozen=True)
class Slices:
    """How many slices a sequence has, and which tokens are in each.

    Attributes:
        order: RASTER, consecutive tokens; STRIDED, slice g holds g, g + G, ...; INDEXED, position i holds `index[i]`.
        index: (N,) int64, for INDEXED.
    """

    num_groups: int
    order: int = RASTER
    index: Tensor | None = None


@dataclass(frozen=True)
class PackedAttention:
    """An attention's weights as the kernels read them: padded with zeros, heads apart, scaled by the coefficient.

    Attributes:
        norm_weight, norm_bias: (BC,) float32.
        qkv, proj: (H 3 DP, BC) and, transposed, (H DP, BC) float32; gradients flow through these.
        qkv_bias: (H 3 DP,) float32.
        proj_bias: (BC,) float32.
        qkv_cast, proj_cast: qkv and proj in the dtype of the products, without gradients.
        eps: of the norm.
        num_heads: H.
        head_dim: D.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    qkv_cast: Tensor
    proj_cast: Tensor
    eps: float
    num_heads: int
    head_dim: int

    @classmethod
    def of(
        cls,
        norm: nn.Module,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        factor: Tensor | float | None,
        dtype: torch.dtype,
    ) -> "PackedAttention":
        """Packs a LayerNorm and the layers of an attention; `factor` scales the output projection."""
        C, H, D = qkv.in_features, num_heads, qkv.in_features // num_heads
        more, more_head = channel_block(C) - C, padded(D, HEAD_MULTIPLE) - D
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = scaled(proj, factor)
        qkv_weight = qkv.weight.float().view(3, H, D, C).transpose(0, 1)
        qkv_weight = pad(qkv_weight, (0, more, 0, more_head)).flatten(0, 2)
        qkv_bias = pad(qkv.bias.float().view(3, H, D).transpose(0, 1), (0, more_head)).flatten()
        proj_weight = pad(weight.float().T.unflatten(0, (H, D)), (0, more, 0, more_head)).flatten(0, 1).contiguous()
        return cls(
            pad(norm.weight.float(), (0, more)),
            pad(norm.bias.float(), (0, more)),
            qkv_weight,
            qkv_bias,
            proj_weight,
            pad(bias.float(), (0, more)),
            qkv_weight.detach().to(dtype),
            proj_weight.detach().to(dtype),
            norm.eps,
            H,
            D,
        )


def attention_residual(
    x: Tensor, weights: PackedAttention, slices: Slices, alpha: Tensor | None, keep: Tensor | None
) -> Tensor:
    """(B, N, C) -> (B, N, C), in the dtype of x. alpha is (1,), keep (B,), both float32; None for 1."""
    w = weights
    qkv = _NormLinear.apply(x, w.norm_weight, w.norm_bias, w.qkv, w.qkv_bias, w.qkv_cast, w.eps)
    attended = _Attend.apply(qkv, x.shape[0], slices, w.num_heads, w.head_dim)
    return cast(Tensor, _ProjResidual.apply(x, alpha, keep, attended, w.proj, w.proj_bias, w.proj_cast))


# norm and product ----------------------------------------------------------------------------------------------------


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


class _NormLinear(torch.autograd.Function):
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


# attention -----------------------------------------------------------------------------------------------------------


def attend(qkv: Tensor, num_sequences: int, slices: Slices, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(B N, H 3 DP) -> (B N, H DP): attention in slices, and the log of its sums, (B N, H) float32, for backward."""
    R, H, DP = qkv.shape[0], num_heads, qkv.shape[1] // (3 * num_heads)
    out, log_sums = qkv.new_empty(R, H * DP), qkv.new_empty(R, H, dtype=torch.float32)
    N, G = R // num_sequences, slices.num_groups
    BM = _block(N, G, DP)
    _attend[(num_sequences * G, triton.cdiv(-(-N // G), BM), H)](
        qkv, slices.index, out, log_sums, N, G, head_dim**-0.5, H=H, DP=DP, BD=channel_block(DP), BM=BM,
        ORDER=slices.order, **launch_options(_warps(BM, channel_block(DP)), 2),
    )  # fmt: skip
    return out, log_sums


def _block(num_tokens: int, num_groups: int, head_dim: int) -> int:
    """Tokens of a block: the whole slice if it is short; fewer if their channels take many registers."""
    longest = 64 if head_dim <= 32 else 32
    return 16 if is_interpreted() else min(longest, channel_block(-(-num_tokens // num_groups)))


def _warps(block: int, head_block: int) -> int:
    """Warps of a program: one for 512 numbers of its tokens' q."""
    return max(1, block * head_block // 512)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_sequences: int, slices: Slices, num_heads: int, head_dim: int) -> Tensor:
        out, log_sums = attend(qkv, num_sequences, slices, num_heads, head_dim)
        ctx.save_for_backward(qkv, slices.index, out, log_sums)
        ctx.args = num_sequences, slices.num_groups, slices.order, num_heads, head_dim
        return out

    @staticmethod
    @first_order(TRITON)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, index, out, log_sums = ctx.saved_tensors
        num_sequences, G, order, H, head_dim = ctx.args
        grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
        R, DP = qkv.shape[0], qkv.shape[1] // (3 * H)
        N = R // num_sequences
        BM = _block(N, G, DP)
        _attend_backward[(num_sequences * G, triton.cdiv(-(-N // G), BM), H)](
            qkv, index, out, log_sums, grad, grad_qkv, N, G, head_dim**-0.5, H=H, DP=DP, BD=channel_block(DP), BM=BM,
            ORDER=order, **launch_options(_warps(BM, channel_block(DP)), 1),
        )  # fmt: skip
        return grad_qkv, None, None, None, None


@triton.jit
def _token_rows(index, sequence, group, positions, num_tokens, num_groups, length, ORDER: tl.constexpr):
    """The rows in memory of some positions of a slice. The first N mod G slices hold one more token."""
    offset = group * (num_tokens // num_groups) + tl.minimum(group, num_tokens % num_groups)
    if ORDER == 1:
        tokens = group + num_groups * positions
    elif ORDER == 2:
        tokens = tl.load(index + offset + positions, mask=positions < length, other=0).to(tl.int32)
    else:
        tokens = offset + positions
    return (sequence * num_tokens + tokens).to(tl.int64)


@triton.jit
def _head_tile(pointer, rows, columns, stride, inside, DP: tl.constexpr):
    """(BM, BD): channels of one head of some tokens; 0 outside of the slice and in padded channels."""
    return tl.load(
        pointer + rows[:, None] * stride + columns[None, :],
        mask=inside[:, None] & (columns < DP)[None, :],
        other=0.0,
    )


@triton.jit
def _attend(
    qkv, index, out, log_sums, num_tokens, num_groups, scale,
    H: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    sequence, group, head = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups, tl.program_id(2)
    length = num_tokens // num_groups + (group < num_tokens % num_groups).to(tl.int32)
    columns, stride = tl.arange(0, BD), 3 * H * DP
    qkv += head * 3 * DP

    positions = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = _token_rows(index, sequence, group, positions, num_tokens, num_groups, length, ORDER)
    q = _head_tile(qkv, rows, columns, stride, positions < length, DP)
    highest = tl.full((BM,), -float("inf"), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(0, length, BM):
        keys = start + tl.arange(0, BM)
        key_rows = _token_rows(index, sequence, group, keys, num_tokens, num_groups, length, ORDER)
        k = _head_tile(qkv + DP, key_rows, columns, stride, keys < length, DP)
        v = _head_tile(qkv + 2 * DP, key_rows, columns, stride, keys < length, DP)
        scores = tl.where((keys < length)[None, :], dot(q, tl.trans(k)) * scale, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, correction = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        sums = sums * correction + tl.sum(weights, 1)
        total = total * correction[:, None] + dot(weights.to(v.dtype), v)
        highest = higher
    inside = positions < length
    tl.store(
        out + head * DP + rows[:, None] * (H * DP) + columns[None, :],
        (total / sums[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (columns < DP)[None, :],
    )
    tl.store(log_sums + rows * H + head, highest + tl.log(sums), mask=inside)


@triton.jit
def _attend_backward(
    qkv, index, out, log_sums, grad, grad_qkv, num_tokens, num_groups, scale,
    H: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """A program computes the gradients of k and v of its block of tokens, in a loop over all q, then those of its q."""
    sequence, group, head = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups, tl.program_id(2)
    length = num_tokens // num_groups + (group < num_tokens % num_groups).to(tl.int32)
    columns, stride, out_stride = tl.arange(0, BD), 3 * H * DP, H * DP
    qkv += head * 3 * DP
    grad_qkv += head * 3 * DP
    out += head * DP
    grad += head * DP
    log_sums += head
    dtype = qkv.dtype.element_ty

    mine = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = mine < length
    rows = _token_rows(index, sequence, group, mine, num_tokens, num_groups, length, ORDER)
    store_mask = inside[:, None] & (columns < DP)[None, :]
    places = grad_qkv + rows[:, None] * stride + columns[None, :]

    k = _head_tile(qkv + DP, rows, columns, stride, inside, DP)
    v = _head_tile(qkv + 2 * DP, rows, columns, stride, inside, DP)
    grad_k, grad_v = tl.zeros((BM, BD), tl.float32), tl.zeros((BM, BD), tl.float32)
    for start in range(0, length, BM):
        others = start + tl.arange(0, BM)
        known = others < length
        other_rows = _token_rows(index, sequence, group, others, num_tokens, num_groups, length, ORDER)
        q = _head_tile(qkv, other_rows, columns, stride, known, DP)
        grad_out = _head_tile(grad, other_rows, columns, out_stride, known, DP)
        result = _head_tile(out, other_rows, columns, out_stride, known, DP)
        along = tl.sum(grad_out.to(tl.float32) * result.to(tl.float32), 1)
        log_sum = tl.load(log_sums + other_rows * H, mask=known, other=float("inf"))
        weights = tl.exp(dot(k, tl.trans(q)) * scale - log_sum[None, :])  # (keys, queries)
        grad_v += dot(weights.to(dtype), grad_out)
        grad_scores = weights * (dot(v, tl.trans(grad_out)) - along[None, :])
        grad_k += dot(grad_scores.to(dtype), q)
    tl.store(places + DP, (grad_k * scale).to(dtype), mask=store_mask)
    tl.store(places + 2 * DP, grad_v.to(dtype), mask=store_mask)

    q = _head_tile(qkv, rows, columns, stride, inside, DP)
    grad_out = _head_tile(grad, rows, columns, out_stride, inside, DP)
    result = _head_tile(out, rows, columns, out_stride, inside, DP)
    along = tl.sum(grad_out.to(tl.float32) * result.to(tl.float32), 1)
    log_sum = tl.load(log_sums + rows * H, mask=inside, other=float("inf"))
    grad_q = tl.zeros((BM, BD), tl.float32)
    for start in range(0, length, BM):
        others = start + tl.arange(0, BM)
        known = others < length
        other_rows = _token_rows(index, sequence, group, others, num_tokens, num_groups, length, ORDER)
        k = _head_tile(qkv + DP, other_rows, columns, stride, known, DP)
        v = _head_tile(qkv + 2 * DP, other_rows, columns, stride, known, DP)
        scores = tl.where(known[None, :], dot(q, tl.trans(k)) * scale, -float("inf"))
        weights = tl.exp(scores - log_sum[:, None])
        grad_scores = weights * (dot(grad_out, tl.trans(v)) - along[:, None])
        grad_q += dot(grad_scores.to(dtype), k)
    tl.store(places, (grad_q * scale).to(dtype), mask=store_mask)


# product and residual ------------------------------------------------------------------------------------------------


class _ProjResidual(torch.autograd.Function):
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
