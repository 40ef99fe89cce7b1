"""Sliced attention with a learnable residual in three Triton kernels, and its backward in three others.

    qkv = Wqkv LN(x) + b            norm and product
    a = softmax(q k^T / sqrt(D)) v  within each slice, whose tokens are read where the permutation puts them
    y = alpha x + keep (Wp a + bp)  product and residual

`keep` is the factor of stochastic depth, one a sample.
Letters: B batch, N tokens, C channels, H heads, D channels of a head (DP: padded).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sret.kernels.gpu.norm_linear import NormLinear
from sret.kernels.gpu.proj_residual import ProjResidual
from sret.kernels.gpu.slices import Attend, Slices
from sret.kernels.gpu.tiles import (
    channel_block,
    padded,
)
from sret.kernels.linear import scaled

HEAD_MULTIPLE = 16  # channels of a head are padded to a multiple, so that loads are aligned


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
    qkv = NormLinear.apply(x, w.norm_weight, w.norm_bias, w.qkv, w.qkv_bias, w.qkv_cast, w.eps)
    attended = Attend.apply(qkv, x.shape[0], slices, w.num_heads, w.head_dim)
    return cast(Tensor, ProjResidual.apply(x, alpha, keep, attended, w.proj, w.proj_bias, w.proj_cast))
