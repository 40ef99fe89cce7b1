"""Bipartite soft matching inside slices: which tokens are merged, the merged tokens, and the inverse.

The tokens of a slice alternate between sets A and B. Every token of A has one partner, the most similar token of B.
The r tokens of A that are most similar to their partner are merged into it; x is the mean weighted by the sizes s:

    s_b <- s_b + sum s_a,   x_b <- (s_b x_b + sum s_a x_a) / (s_b + sum s_a)     over the tokens a merged into b

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.
Deviations: matching stays inside slices, with the same r in each, so that slices stay equal. The tokens that remain
keep their order, because slices are cut from the raster order. There is no class token to protect.
Letters: B batch, N tokens, K tokens that remain, R = N - K, G slices, M tokens in a slice, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sret.errors import InputError
from sret.kernels.slices import slice_lengths


@dataclass(frozen=True)
class Merge:
    """Which tokens of a batch become one; every image has its own choice.

    Tokens are named by rows, of (B, N, C) -> (B N, C) before the merge and of (B K, C) after it: rows are selected and
    added faster than along another axis.

    Attributes:
        kept: (B, K) int64, rows before the merge of the tokens that remain, ascending.
        gone: (B, R) int64, rows before the merge of the tokens that are merged into others.
        into: (B, R) int64, rows after the merge of the tokens that they are merged into.
        source: (B, N) int64, for each token, the row after the merge that holds it.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    source: Tensor

    def apply(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) and sizes (B, N, 1) -> (B, K, C) and (B, K, 1): means weighted by the sizes, and their sums."""
        rows = torch.cat((x * sizes, sizes), 2).flatten(0, 1)  # sizes are float32 or float64
        kept, gone = (rows.index_select(0, places.flatten()) for places in (self.kept, self.gone))
        sums = kept.index_add_(0, self.into.flatten(), gone)
        means, sizes = sums.view(*self.kept.shape, x.shape[2] + 1).split([x.shape[2], 1], 2)
        return (means / sizes).to(x.dtype), sizes

    def undo(self, x: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C): each token gets the value of the token that holds it."""
        return select(x, self.source)


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
        pairs: list[Tensor] = []
        start = 0
        for slices, length in cuts:
            part = keys[:, start : start + slices * length].unflatten(1, (slices, length))
            first = torch.arange(start, start + slices * length, length, device=device)  # token of each slice
            pairs.append((match(part, r) + first[:, None]).flatten(2))
            start += slices * length
        positions = pairs[0] if len(pairs) == 1 else torch.cat(pairs, 2)  # (2, B, R)
        if order is not None:
            positions = order[positions]
        images = torch.arange(0, B * N, N, device=device)[:, None]
        gone, partners = (positions + images).unbind()
        is_kept = torch.ones(B * N, dtype=torch.bool, device=device).index_fill_(0, gone.flatten(), False)
        index = is_kept.cumsum(0) - 1  # of a kept token among the kept ones
        into, K = index.index_select(0, partners.flatten()), N - positions.shape[2]
        num_kept = B * K
        # All tokens that are not kept write to one more place, which is cut off.
        place = torch.where(is_kept, index, num_kept)
        kept = torch.empty(num_kept + 1, dtype=torch.int64, device=device)
        kept = kept.scatter_(0, place, torch.arange(B * N, device=device))[:num_kept]
        source = index.index_copy_(0, gone.flatten(), into)
        return Merge(kept.view(B, K), gone, into.view(gone.shape), source.view(B, N))


def match(keys: Tensor, r: int) -> Tensor:
    """(B, G, M, D) -> (2, B, G, r): positions in each slice of the tokens to merge, and of their partners."""
    keys = normalize(keys, dim=-1)
    a, b = keys[:, :, ::2], keys[:, :, 1::2]
    scores, partners = (a @ b.transpose(-2, -1)).max(dim=-1)  # (B, G, ceil(M/2))
    chosen = scores.topk(r, dim=-1).indices
    return torch.stack((2 * chosen, 2 * partners.gather(-1, chosen) + 1))


def select(x: Tensor, rows: Tensor) -> Tensor:
    """(B, K, C) and (B, N) int64 -> (B, N, C): these rows of (B K, C)."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[2])
