"""Transformer block: sliced attention, then an MLP. The passes of a recursion share its weights.

    x <- a1 x + a2 SlicedAttention(LN(x))
    x <- a3 x + a4 MLP(LN(x))

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297.
"""

import torch
from torch import Tensor, nn

from sret.kernels.conditions import has_hooks
from sret.layers.attention import AttentionResidual, triton_slices
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
    if not torch.is_grad_enabled() and runs_in_three_kernels(block, projection, x):
        from sret.kernels.gpu.rest import whole_pass

        attn, mlp = block.attn, block.mlp
        last = (projection.packed(x), projection.triton_factors(x)[0]) if isinstance(projection, MlpResidual) else None
        return whole_pass(
            x,
            (attn.packed(x), attn.triton_factors(x)[0]),
            triton_slices(x, num_groups, permutation),
            (mlp.packed(x), mlp.triton_factors(x)[0]),
            last,
        )
    return projection(block(x, num_groups, permutation))


def runs_in_three_kernels(block: Block, projection: nn.Module, x: Tensor) -> bool:
    """Whether the Triton kernels for a whole pass, which have no backward, can compute this one."""
    return (
        block.attn.triton_refusal(x) is None
        and block.mlp.triton_refusal(x) is None
        and (
            type(projection) is nn.Identity
            or (isinstance(projection, MlpResidual) and projection.triton_refusal(x) is None)
        )
        and not block.training
        and type(block) is Block
        and not has_hooks(block, block.attn, block.mlp, projection)
    )
