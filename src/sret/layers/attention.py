"""Sliced self-attention: each token attends only inside its own slice of the sequence.

    Y = concat_g softmax(Q_g K_g^T / sqrt(D)) V_g,   g = 1..G

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, sliced group self-attention.
Deviations: the token permutation is an argument, since this module draws no random numbers. The authors' release is
for 224-pixel images; where G does not divide N, the first N mod G slices hold one token more here, so that nothing is
padded or masked.
Letters: B batch, N tokens, C channels, G slices, M tokens in a slice, H heads, D = C / H.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sret.errors import InputError
from sret.layers.permute import Permutation


def slice_lengths(num_tokens: int, num_groups: int) -> list[tuple[int, int]]:
    """How `num_tokens` are cut into `num_groups` slices: `[(slices, tokens in each), ...]`, one or two entries.

    Lengths differ by one token at most, the longer slices come first. Raises `InputError` if a slice would be empty.
    """
    if not 1 <= num_groups <= num_tokens:
        raise InputError(
            f"{num_tokens} token(s) cannot form {num_groups} slices; try at most {num_tokens}, or a larger image"
        )
    length, longer = divmod(num_tokens, num_groups)
    cuts = [(longer, length + 1), (num_groups - longer, length)]
    return [cut for cut in cuts if cut[0]]


class SlicedAttention(nn.Module):
    """Multi-head self-attention within slices; one slice is plain self-attention.

    The number of slices belongs to the call, not to the module: a recursion applies one set of weights with
    different slices in each pass.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"{dim} channels cannot form {num_heads} equal heads; make dim a multiple of num_heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_groups: int = 1, permutation: Permutation | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C). With a permutation, tokens are reordered before slicing and put back afterwards.

        Raises `InputError` if there are more slices than tokens.
        """
        cuts = slice_lengths(x.shape[1], num_groups)
        if permutation is not None:
            x = permutation.apply(x)
        parts = self.qkv(x).split([slices * length for slices, length in cuts], dim=1)
        attended = [self._attend(part, slices) for part, (slices, _) in zip(parts, cuts, strict=True)]
        x = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
        if permutation is not None:
            x = permutation.undo(x)
        return self.proj(x)

    def _attend(self, qkv: Tensor, num_groups: int) -> Tensor:
        """(B, G*M, 3C) -> (B, G*M, C): a slice becomes a batch row, so fused kernels still apply."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        H = self.num_heads
        qkv = qkv.reshape(B * num_groups, N // num_groups, 3, H, C // H)  # (B*G, M, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B*G, H, M, D)
        y = scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(B, N, C)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
