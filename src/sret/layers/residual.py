"""The learnable residual: how much of the stream stays, and how much of the branch enters, is learned.

    y = alpha x + beta f(norm(x)),   alpha = beta = 1 at the start

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, learnable residual coefficients.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class LearnableResidual(nn.Module):
    """A pre-norm residual branch with two scalar coefficients.

    Args:
        branch: f, called with the normalised stream and any further arguments of `forward`.
        norm: applied before the branch; none by default.
        drop_prob: stochastic depth, the probability of dropping the branch of a sample in training.
        is_learnable: `False` fixes both coefficients at 1 and removes them from the parameters (the ablation).
    """

    def __init__(
        self, branch: nn.Module, norm: nn.Module | None = None, drop_prob: float = 0.0, is_learnable: bool = True
    ) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.branch = branch
        self.drop_path = DropPath(drop_prob) if drop_prob else nn.Identity()
        # Shape (1,), not (): engines that shard parameters refuse scalars.
        self.alpha = nn.Parameter(torch.ones(1)) if is_learnable else None
        self.beta = nn.Parameter(torch.ones(1)) if is_learnable else None

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); further arguments go to the branch."""
        y = self.drop_path(self.branch(self.norm(x), *args))
        if self.alpha is None or self.beta is None:
            return x + y
        return self.alpha * x + self.beta * y
