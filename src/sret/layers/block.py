"""Transformer block: sliced attention, then an MLP. The passes of a recursion share its weights.

    x <- a1 x + a2 SlicedAttention(LN(x))
    x <- a3 x + a4 MLP(LN(x))

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297.
"""

from torch import Tensor, nn

from sret.layers.attention import AttentionResidual
from sret.layers.mlp import MlpResidual
from sret.layers.permutation import Permutation
from sret.layers.residual import AS_PUBLISHED, Coefficients


class Block(nn.Module):
    """Attention and MLP, with learnable residuals; `drop_prob` is the stochastic-depth rate, the same in all passes."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_prob: float = 0.0,
        coefficients: Coefficients = AS_PUBLISHED,
    ) -> None:
        super().__init__()
        self.attn = AttentionResidual(dim, num_heads, drop_prob, coefficients)
        self.mlp = MlpResidual(dim, mlp_ratio, drop_prob, coefficients)

    def forward(self, x: Tensor, num_groups: int = 1, permutation: Permutation | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C): one pass."""
        x = self.attn(x, num_groups, permutation)
        return self.mlp(x)


def one_pass(
    block: Block, projection: nn.Module, x: Tensor, num_groups: int, permutation: Permutation | None
) -> Tensor:
    """(B, N, C) -> (B, N, C): the block, then the projection of this pass."""
    return projection(block(x, num_groups, permutation))
