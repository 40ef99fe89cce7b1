"""Sliced self-attention: each token attends only inside its own slice of the sequence.

    Y = concat_g softmax(Q_g K_g^T / sqrt(D)) V_g,   g = 1..G

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, sliced group self-attention.
Deviations: the token permutation is an argument, since this module draws no random numbers. If G does not divide N
(never at the authors' 224 pixels), the first N mod G slices hold one more token, without padding or masks.
Letters: B batch, N tokens, C channels, G slices, M tokens in a slice, H heads, D = C / H.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sret.errors import InputError
from sret.kernels.attention import attend
from sret.kernels.conditions import has_hooks
from sret.kernels.gpu import dispatch
from sret.kernels.linear import LAYER_NORM_EPS, is_plain, linear, norm_linear, scaled
from sret.kernels.slices import slice_lengths
from sret.layers.permutation import IndexPermutation, Permutation, StridedPermutation
from sret.layers.residual import AS_PUBLISHED, Coefficients, LearnableResidual

if TYPE_CHECKING:
    from sret.kernels.gpu.attention import PackedAttention
    from sret.kernels.gpu.slices import Slices


class SlicedAttention(nn.Module):
    """Multi-head self-attention within slices; one slice is plain self-attention.

    The number of slices is an argument of the call, because a recursion applies the same weights with different slices
    in each pass.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"{dim} channels cannot form {num_heads} equal heads; make dim a multiple of num_heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_groups: int = 1, permutation: Permutation | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C). A permutation reorders the tokens before slicing; its inverse restores the order.

        Raises `InputError` if there are more slices than tokens.
        """
        return self.between(self.qkv, self.proj, x, num_groups, permutation)

    def between(
        self,
        qkv: Callable[[Tensor], Tensor],
        proj: Callable[[Tensor], Tensor],
        x: Tensor,
        num_groups: int,
        permutation: Permutation | None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C): attention between `qkv`, (B, N, C) -> (B, N, 3C), and `proj`, (B, N, C) -> same.

        Callers can pass functions that compute the two layers faster.
        """
        if permutation is not None:
            x = permutation.apply(x)
        x = self.within_slices(qkv(x), num_groups)
        if permutation is not None:
            x = permutation.undo(x)
        return proj(x)

    def within_slices(self, qkv: Tensor, num_groups: int) -> Tensor:
        """(B, N, 3C) -> (B, N, C): attention within `num_groups` slices of consecutive tokens."""
        cuts = slice_lengths(qkv.shape[1], num_groups)
        if len(cuts) == 1:
            return self._equal_slices(qkv, num_groups)
        parts = qkv.split([slices * length for slices, length in cuts], dim=1)
        return torch.cat([self._equal_slices(part, cut[0]) for part, cut in zip(parts, cuts, strict=True)], dim=1)

    def _equal_slices(self, qkv: Tensor, num_groups: int) -> Tensor:
        """(B, G*M, 3C) -> (B, G*M, C): a slice becomes a batch row, so that one kernel computes all."""
        B, N, C, H, G = *qkv.shape[:2], qkv.shape[2] // 3, self.num_heads, num_groups
        # q, k and v apart first, heads after: OpenVINO 2026.4 gives wrong outputs if one view does both.
        q, k, v = (t.reshape(B * G, N // G, H, C // H).transpose(1, 2) for t in qkv.chunk(3, dim=-1))  # (B*G, H, M, D)
        return attend(q, k, v).transpose(1, 2).reshape(B, N, C)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class AttentionResidual(LearnableResidual):
    """y = alpha x + beta SlicedAttention(LN(x)), (B, N, C) -> (B, N, C)."""

    branch: SlicedAttention

    def __init__(
        self, dim: int, num_heads: int, drop_prob: float = 0.0, coefficients: Coefficients = AS_PUBLISHED
    ) -> None:
        norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        super().__init__(SlicedAttention(dim, num_heads), norm, drop_prob, coefficients)

    def forward(self, x: Tensor, num_groups: int = 1, permutation: Permutation | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), as `SlicedAttention`."""
        if self.triton_refusal(x) is not None:
            return super().forward(x, num_groups, permutation)
        from sret.kernels.gpu.attention import attention_residual

        slices = triton_slices(x, num_groups, permutation)
        return attention_residual(x, self.packed(x), slices, *self.triton_factors(x))

    def size_refusal(self, x: Tensor) -> str | None:
        """Why the Triton kernels cannot compute a branch of this size, or None if they can."""
        attn = self.branch
        return dispatch.refusal(x, attn.qkv.weight, attn.qkv.in_features, attn.num_heads)

    def packed(self, x: Tensor) -> "PackedAttention":
        """The weights as the Triton kernels read them."""
        from sret.kernels.gpu.attention import PackedAttention

        attn, dtype = self.branch, dispatch.compute_dtype(x, self.branch.qkv.weight)
        return dispatch.packed(
            self,
            dtype,
            lambda: PackedAttention.of(self.norm, attn.qkv, attn.proj, attn.num_heads, self.branch_factor(), dtype),
            is_constant=self.is_folded,
        )

    def scaled_branch(self, x: Tensor, num_groups: int = 1, permutation: Permutation | None = None) -> Tensor:
        """s beta SlicedAttention(LN(x)), by scaling the last layer's weights; a strided permutation is a view."""
        attn = self.branch
        if not self.has_plain_layers():
            return super().scaled_branch(x, num_groups, permutation)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        last = scaled(attn.proj, self.branch_factor())
        is_even = x.shape[1] % num_groups == 0
        if permutation == StridedPermutation(num_groups) and is_even and not torch.compiler.is_exporting():
            y = strided_attention(lambda *p: norm_linear(x, self.norm, *p), weight, bias, attn.num_heads, num_groups)
            return linear(y, *last)
        return attn.between(
            lambda y: norm_linear(y, self.norm, weight, bias), lambda y: linear(y, *last), x, num_groups, permutation
        )

    def has_plain_layers(self) -> bool:
        """Whether all layers of the branch are plain and have no hooks, so that their weights may be used directly."""
        attn = self.branch
        return (
            type(attn) is SlicedAttention
            and is_plain(attn.qkv, attn.proj)
            and not has_hooks(self.norm, attn, attn.qkv, attn.proj)
        )

    def last_layer(self) -> nn.Module:
        return self.branch.proj


def triton_slices(x: Tensor, num_groups: int, permutation: Permutation | None) -> "Slices":
    """The slices of x, (B, N, C), as the Triton kernels take them. Raises `InputError` for more slices than tokens."""
    from sret.kernels.gpu.slices import INDEXED, RASTER, STRIDED, Slices

    slice_lengths(x.shape[1], num_groups)
    if permutation is None or num_groups == 1:
        return Slices(num_groups, RASTER)
    if permutation == StridedPermutation(num_groups):
        return Slices(num_groups, STRIDED)
    tokens = torch.arange(x.shape[1], device=x.device)[None, :, None]
    index = permutation.index if isinstance(permutation, IndexPermutation) else permutation.apply(tokens).flatten()
    return Slices(num_groups, INDEXED, index)


def strided_attention(
    product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, bias: Tensor, num_heads: int, num_groups: int
) -> Tensor:
    """Attention in strided slices, (B, N, C): slice g holds tokens g, g + G, ... Nothing is copied.

    Slices and heads share one axis of a view. This needs q, k and v of a head next to each other, while the qkv layer
    has all of q first, then k, then v. So its rows are reordered here: there are far fewer weights than activations.

    Args:
        product: computes the (B, N, 3C) output of a linear layer from its weight (3C, C) and bias (3C,).
    """
    H, G = num_heads, num_groups
    weight, bias = (t.unflatten(0, (3, H, -1)).transpose(0, 1).flatten(0, 2) for t in (weight, bias))
    qkv = product(weight, bias)
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (t.transpose(1, 2) for t in qkv.view(B, N // G, G * H, 3, C // H).unbind(3))  # each (B, G*H, M, D)
    return attend(q, k, v).transpose(1, 2).reshape(B, N, C)
