"""Attention within slices in one Triton kernel, which reads tokens where the permutation puts them, and its backward.

    a = softmax(q k^T / sqrt(D)) v

No token is copied for a permutation: the kernel reads and writes tokens in their order in the image. Scores stay in
registers; backward recomputes them.
Letters: B batch, N tokens, G slices, M tokens in a slice, H heads, D channels of a head (DP: padded).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sret.kernels.gpu.dispatch import is_interpreted
from sret.kernels.gpu.tiles import (
    channel_block,
    dot,
    launch_options,
)
from sret.kernels.second_order import TRITON, first_order

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


class Attend(torch.autograd.Function):
    """`attend` with gradients."""

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
