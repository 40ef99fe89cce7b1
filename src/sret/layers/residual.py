"""The learnable residual: how much of the stream stays, and how much of the branch enters, is learned.

    y = alpha x + beta f(norm(x)),   alpha = beta = 1 at the start

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, learnable residual coefficients.
"""

from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sret.layers.context import is_transformed
from sret.layers.linear import is_plain


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
        y = self.drop_path(self.scaled_branch(x, *args))
        return x + y if self.alpha is None else weighted_sum(x, self.alpha, y)

    def scaled_branch(self, x: Tensor, *args: Any) -> Tensor:
        """beta f(norm(x)). A subclass that knows f multiplies its last weights instead, which are fewer."""
        y = self.branch(self.norm(x), *args)
        return y if self.beta is None else self.beta * y

    def first_layer(self) -> nn.Module | None:
        """The linear layer that f begins with, if a subclass knows it."""
        return None

    def last_layer(self) -> nn.Module | None:
        """The linear layer that f ends with, if a subclass knows it."""
        return None

    @torch.no_grad()
    def fold(self) -> None:
        """Makes beta a part of the branch's last layer, if that is known."""
        last = self.last_layer()
        if self.beta is not None and last is not None and is_plain(last):
            for parameter in last.parameters():
                parameter.mul_(self.beta)
            self.beta = None


def weighted_sum(x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """alpha x + y, for alpha of shape (1,), in one pass over memory."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed():
        return cast(Tensor, _WeightedSum.apply(x, alpha, y))
    return torch.addcmul(y, x, alpha)


class _WeightedSum(torch.autograd.Function):
    """As autograd's own, but that alpha's gradient is a dot product: it stores no product of activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.y_dtype = y.dtype
        return torch.addcmul(y, x, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        x, alpha = ctx.saved_tensors
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = torch.dot(grad.flatten(), x.to(grad.dtype).flatten()).view(1).to(alpha.dtype)
        return grad * alpha, grad_alpha, grad.to(ctx.y_dtype)
