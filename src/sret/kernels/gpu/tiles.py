"""Tiles of the Triton kernels: their sizes, and the computations that several kernels share.

A program holds BM rows of the stream in registers, with all their channels, C padded to BC, a power of two. Statistics
and sums are in float32, products in the dtype of the weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sret.kernels.gpu.dispatch import is_interpreted


@dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel: BM rows, blocks of BH hidden channels; warps of a program, stages of its loop's pipeline."""

    BM: int
    BH: int
    num_warps: int
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        return launch_options(self.num_warps, self.num_stages)


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Options of a launch. Fused multiply-adds are Triton's default, and said here so that it stays so."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


# By BC. Chosen so that nothing spills when compiled for sm_80 and sm_90 (tests/test_triton_compile.py), not by time.
FORWARD = {
    16: Tiles(64, 32, 4),
    32: Tiles(64, 64, 4),
    64: Tiles(64, 64, 4),
    128: Tiles(64, 64, 8),
    256: Tiles(32, 32, 8),
    512: Tiles(32, 32, 8),
}
REST = {**FORWARD, 512: Tiles(16, 32, 8)}
BACKWARD = {
    16: Tiles(64, 32, 4),
    32: Tiles(64, 32, 4),
    64: Tiles(64, 32, 4),
    128: Tiles(64, 32, 8),
    256: Tiles(32, 32, 8),
    512: Tiles(16, 16, 8),
}


def tiles_for(table: dict[int, Tiles], channel_block: int) -> Tiles:
    """The tiles for these channels; in the interpreter small ones, so that small tests have several."""
    return Tiles(16, 16, 1, 1) if is_interpreted() else table[channel_block]


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def channel_block(num_channels: int) -> int:
    """BC: the next power of two, at least 16, the least that a product on tensor cores takes."""
    return max(16, triton.next_power_of_2(num_channels))


@triton.jit
def load_tile(pointer, rows, columns, num_rows, num_columns, stride):
    """(BM, BC) float32: a tile of a row-major matrix; 0 beyond its edges."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def store_tile(pointer, tile, rows, columns, num_rows, num_columns, stride):
    """Stores the part of a tile that lies within a row-major matrix, in the matrix's dtype."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(
        pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :],
        tile.to(pointer.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def normalize(x, columns, num_channels, eps):
    """The rows of x with mean 0 and variance 1, 0 in padded columns, and 1 / the standard deviation of each."""
    mean = tl.sum(x, 1) / num_channels
    centred = tl.where((columns < num_channels)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / num_channels + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def norm_tile(x, weight, bias, columns, num_channels, eps):
    """(BM, BC) float32: LN(x), 0 in padded columns, whose weights are 0."""
    normalized, _ = normalize(x, columns, num_channels, eps)
    return normalized * tl.load(weight + columns)[None, :] + tl.load(bias + columns)[None, :]


@triton.jit
def normalize_backward(grad, normalized, rstd, num_channels):
    """The gradient of x from that of `normalize(x)`; right only in columns that are not padded."""
    mean = tl.sum(grad, 1) / num_channels
    along = tl.sum(grad * normalized, 1) / num_channels
    return (grad - mean[:, None] - normalized * along[:, None]) * rstd[:, None]


@triton.jit
def dot(a, b):
    """a @ b with float32 sums; products of float32 are exact, not TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def gaussian_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x):
    return x * gaussian_cdf(x)


@triton.jit
def gelu_slope(x, cdf):
    return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def mlp_tile(normed, w1, b1, w2, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, HIDDEN: tl.constexpr):
    """(BM, BC) float32: W2 GELU(W1 normed + b1), for w1 and w2^T of (HIDDEN, BC)."""
    columns = tl.arange(0, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(0, HIDDEN, BH):
        hidden = start + tl.arange(0, BH)
        weights = hidden[:, None] * BC + columns[None, :]
        pre = dot(normed, tl.trans(tl.load(w1 + weights))) + tl.load(b1 + hidden)[None, :]
        total += dot(gelu(pre).to(normed.dtype), tl.load(w2 + weights))
    return total


@triton.jit
def residual_tile(x, branch, alpha, keep, rows, num_rows, num_tokens, HAS_ALPHA: tl.constexpr, HAS_KEEP: tl.constexpr):
    """alpha x + keep branch, for one `keep` a sample; without them alpha and keep are 1."""
    if HAS_KEEP:
        branch *= tl.load(keep + rows // num_tokens, mask=rows < num_rows, other=0.0)[:, None]
    if HAS_ALPHA:
        x *= tl.load(alpha)
    return x + branch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B N, C), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(rows, C') and (rows, C) -> (C', C) float32: grad^T x, summed in float32."""
    if grad.is_cuda and grad.dtype != torch.float32:
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return grad.float().T @ x.float()
