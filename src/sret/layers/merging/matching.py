"""Bipartite soft matching inside slices: which tokens are merged, and the merged tokens.

The tokens of a slice alternate between sets A and B. Every token of A has one partner, the most similar token of B.
The r tokens of A that are most similar to their partner are merged into it; x is the mean weighted by the sizes s:

    s_b <- s_b + sum s_a,   x_b <- (s_b x_b + sum s_a x_a) / (s_b + sum s_a)     over the tokens a merged into b

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.
Deviations: matching stays inside slices, with the same r in each, so that slices stay equal. The tokens that remain
keep their order, because slices are cut from the raster order. There is no class token to protect.
Letters: B batch, N tokens, K tokens that remain, G slices, M tokens in a slice, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from sret.errors import InputError
from sret.kernels.slices import slice_lengths


@dataclass(frozen=True)
class Merge:
    """Which tokens of a batch become one; every image has its own choice. Those that remain keep their order.

    Attributes:
        source: (B, N) int64, for each token the row of (B K, C) that holds it: rows are selected and added faster than
            along another axis.
        num_tokens: K.
    """

    source: Tensor
    num_tokens: int

    def apply(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, C) and sizes (B, N, 1) -> (B, K, C) and (B, K, 1): means weighted by the sizes, and their sums.

        Sizes are float32 or float64; None for ones.
        """
        (B, _, C), K = x.shape, self.num_tokens
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = pad(x.to(dtype), (0, 1), value=1) if sizes is None else torch.cat((x * sizes, sizes), 2)
        sums = rows.new_zeros(B * K, C + 1).index_add_(0, self.source.flatten(), rows.flatten(0, 1))
        means, sizes = sums.view(B, K, C + 1).split([C, 1], 2)
        return (means / sizes).to(x.dtype), sizes


def find_merge(keys: Tensor, num_groups: int, r: int, order: Tensor | None = None) -> Merge:
    """The merge of the r most similar pairs of each slice; no gradient flows through the choice.

    Args:
        keys: (B, N, D), what similarity (the cosine) is computed from, in the order in which slices are cut.
        num_groups: slices, cut as by `slice_lengths`.
        r: tokens to merge in each slice, at most half of the tokens of a slice.
        order: (N,) int64, the position of each token before a permutation; None if there was none.

    Raises `InputError` if r is larger than half a slice.
    """
    (B, N), device = keys.shape[:2], keys.device
    cuts = slice_lengths(N, num_groups)
    if not 1 <= r <= cuts[-1][1] // 2:
        raise InputError(f"{r} of {cuts[-1][1]} tokens of a slice cannot be merged; use 1 to {cuts[-1][1] // 2}")
    with torch.no_grad():
        found: list[tuple[Tensor, Tensor]] = []
        start = 0
        for slices, length in cuts:
            end = start + slices * length
            found.append(match(keys[:, start:end].unflatten(1, (slices, length)), r, start))
            start = end
        gone, partners = found[0] if len(found) == 1 else (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        if order is not None:
            gone, partners = order[gone], order[partners]
        images = torch.arange(0, B * N, N, device=device)[:, None]
        gone, partners = (gone + images).flatten(), (partners + images).flatten()
        is_kept = torch.ones(B * N, dtype=torch.int64, device=device).scatter_(0, gone, 0)
        rows = is_kept.cumsum(0).sub_(1)  # of a token that is kept, after the merge
        rows.scatter_(0, gone, rows.index_select(0, partners))
        return Merge(rows.view(B, N), N - r * num_groups)


def match(keys: Tensor, r: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """(B, G, M, D) -> (B, G r) twice: the tokens to merge, and their partners; the first of all tokens is `start`."""
    keys = normalize(keys, dim=-1)
    a, b = keys[:, :, ::2], keys[:, :, 1::2]
    scores, partners = (a @ b.transpose(-2, -1)).max(dim=-1)  # (B, G, ceil(M/2))
    chosen = scores.topk(r, dim=-1).indices
    G, M = keys.shape[1:3]
    first = torch.arange(start, start + G * M, M, device=keys.device)[:, None]
    gone = first.add(chosen, alpha=2)
    return gone.flatten(1), (first + 1).add(partners.gather(-1, chosen), alpha=2).flatten(1)


def select(x: Tensor, rows: Tensor) -> Tensor:
    """(B, K, C) and (B, N) int64 -> (B, N, C): these rows of (B K, C)."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[2])
