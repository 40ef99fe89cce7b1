"""Passes that merge tokens between attention and MLP, with attention in proportion to the sizes of tokens.

    Y = softmax(Q K^T / sqrt(D) + log s) V,   s: how many tokens a key stands for

A token that stands for s equal tokens then gets the attention of all of them.
Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.
Deviation: at the end of a stage all tokens are restored, because what follows (pools, feature maps) needs the grid.
Letters: B batch, N tokens of the grid, K tokens that remain, G slices, M tokens in a slice, H heads, D = C / H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sret.kernels.attention import attend
from sret.kernels.linear import linear, norm_linear, scaled
from sret.kernels.slices import slice_lengths
from sret.layers.attention import AttentionResidual
from sret.layers.block import Block, one_pass
from sret.layers.merging.matching import Merge, find_merge, select
from sret.layers.permutation import Permutation, Permuter
from sret.layers.recursion import Recursion
from sret.layers.residual import weighted_sum


@dataclass(frozen=True)
class MergedTokens:
    """A sequence in which some tokens stand for several.

    Attributes:
        x: (B, K, C).
        sizes: (B, K, 1), how many tokens each stands for, float32 or float64; None while no token is merged.
        source: (B, N) int64, the row of (B K, C) that stands for each position of the grid; None while none is merged.
    """

    x: Tensor
    sizes: Tensor | None = None
    source: Tensor | None = None

    def merged(self, merge: Merge) -> "MergedTokens":
        """These tokens, some of them merged."""
        x, sizes = merge.apply(self.x, self.sizes)
        source = merge.source
        if self.source is not None:
            source = source.flatten().index_select(0, self.source.flatten()).view(self.source.shape)
        return MergedTokens(x, sizes, source)

    def unmerged(self) -> Tensor:
        """(B, N, C): each position of the grid gets the value of the token that stands for it."""
        return self.x if self.source is None else select(self.x, self.source)


def merging_passes(
    recursions: Sequence[Recursion], merge: Sequence[int], permuter: Permuter, x: Tensor, *, is_training: bool
) -> Tensor:
    """(B, N, C) -> (B, N, C): the recursions of a stage, with r tokens of each slice merged in each layer.

    Args:
        merge: r of each layer, in order; 0 for layers beyond its end.
    """
    tokens, layer = MergedTokens(x), 0
    for recursion in recursions:
        for i, (num_groups, projection) in enumerate(zip(recursion.groups, recursion.projections, strict=True)):
            if i < recursion.num_passes:
                N, device = tokens.x.shape[1], tokens.x.device
                is_permuted = recursion.is_permuted(i)
                permutation = permuter(N, num_groups, device, is_training=is_training) if is_permuted else None
                r = merge[layer] if layer < len(merge) else 0
                tokens = merging_pass(recursion.block, projection, tokens, num_groups, permutation, r)
            layer += 1
    return tokens.unmerged()


def merging_pass(
    block: Block, projection: nn.Module, tokens: MergedTokens, num_groups: int, permutation: Permutation | None, r: int
) -> MergedTokens:
    """One pass; r tokens of each slice are merged between attention and MLP."""
    if r == 0 and tokens.sizes is None:
        return MergedTokens(one_pass(block, projection, tokens.x, num_groups, permutation))
    order = None
    if permutation is not None:
        positions = torch.arange(tokens.x.shape[1], device=tokens.x.device)
        order = permutation.apply(positions[None, :, None]).flatten()
    y, keys = attention_residual(block.attn, tokens, num_groups, permutation)
    tokens = MergedTokens(y, tokens.sizes, tokens.source)
    if r:
        tokens = tokens.merged(find_merge(keys, num_groups, r, order))
    return MergedTokens(projection(block.mlp(tokens.x)), tokens.sizes, tokens.source)


def attention_residual(
    residual: AttentionResidual, tokens: MergedTokens, num_groups: int, permutation: Permutation | None
) -> tuple[Tensor, Tensor]:
    """The attention half of a block, (B, K, C), and the keys, sum of the heads, (B, K, D) in the order of slices."""
    attn, x, sizes = residual.branch, tokens.x, tokens.sizes
    is_plain = residual.has_plain_layers()
    y = x if permutation is None else permutation.apply(x)
    if sizes is not None:
        sizes = sizes if permutation is None else permutation.apply(sizes)
    qkv = norm_linear(y, residual.norm, attn.qkv.weight, attn.qkv.bias) if is_plain else attn.qkv(residual.norm(y))
    y = proportional_attention(qkv, attn.num_heads, num_groups, sizes)
    y = y if permutation is None else permutation.undo(y)
    factor = residual.branch_factor()
    y = linear(y, *scaled(attn.proj, factor)) if is_plain else attn.proj(y)
    if not is_plain and factor is not None:
        y = factor * y
    y, alpha = cast(Tensor, residual.drop_path(y)), residual.stream_factor()
    C = x.shape[2]
    keys = qkv.detach()[:, :, C : 2 * C].unflatten(2, (attn.num_heads, -1)).sum(2)
    return x + y if alpha is None else weighted_sum(x, alpha, y), keys


def proportional_attention(qkv: Tensor, num_heads: int, num_groups: int, sizes: Tensor | None) -> Tensor:
    """(B, K, 3C) and sizes (B, K, 1) -> (B, K, C): attention within slices of consecutive tokens."""
    C, start = qkv.shape[2] // 3, 0
    outputs: list[Tensor] = []
    bias = None if sizes is None else sizes.log().to(qkv.dtype)
    for slices, length in slice_lengths(qkv.shape[1], num_groups):
        part = slice(start, start + slices * length)
        start += slices * length
        q, k, v = (
            t.reshape(-1, length, num_heads, C // num_heads).transpose(1, 2)  # (B*G, H, M, D)
            for t in qkv[:, part].chunk(3, dim=-1)
        )
        part_bias = None if bias is None else bias[:, part].reshape(-1, 1, 1, length)  # (B*G, 1, 1, M)
        y = attend(q, k, v, part_bias).transpose(1, 2)
        outputs.append(y.reshape(qkv.shape[0], slices * length, C))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
