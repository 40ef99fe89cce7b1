"""Learnable residual: learned coefficients scale the stream and the branch.

    y = alpha x + beta f(norm(x)),   alpha = beta = 1 at the start

In deep recursions a factor s, such as 1 / passes, makes the coefficients those of the whole recursion:

    y = (1 + s (alpha - 1)) x + s beta f(norm(x))

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, learnable residual coefficients.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sret.kernels.conditions import has_hooks
from sret.kernels.gpu import dispatch
from sret.kernels.linear import is_plain, is_recomputed


@dataclass(frozen=True)
class Coefficients:
    """Which coefficients a residual has.

    Attributes:
        is_learnable: `False` fixes both at 1 and removes them from the parameters (the ablation).
        is_stream_learnable: `False` fixes alpha alone; reversible recursions need this.
        scale: s, by which a pass changes the stream; 1 as published.
    """

    is_learnable: bool = True
    is_stream_learnable: bool = True
    scale: float = 1.0


AS_PUBLISHED = Coefficients()


class LearnableResidual(nn.Module):
    """A pre-norm residual branch with two scalar coefficients.

    Args:
        branch: f, called with the normalised stream and any further arguments of `forward`.
        norm: applied before the branch; none by default.
        drop_prob: stochastic depth, the probability of dropping the branch of a sample in training.
        coefficients: which of them are learnable, and s.
    """

    def __init__(
        self,
        branch: nn.Module,
        norm: nn.Module | None = None,
        drop_prob: float = 0.0,
        coefficients: Coefficients = AS_PUBLISHED,
    ) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.branch = branch
        self.drop_path = DropPath(drop_prob) if drop_prob else nn.Identity()
        # Shape (1,), not (): sharding (FSDP) does not support scalar parameters.
        has_alpha = coefficients.is_learnable and coefficients.is_stream_learnable
        self.alpha = nn.Parameter(torch.ones(1)) if has_alpha else None
        self.beta = nn.Parameter(torch.ones(1)) if coefficients.is_learnable else None
        self.scale = coefficients.scale
        self.is_folded = False

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); further arguments go to the branch."""
        y, alpha = self.change(x, *args), self.stream_factor()
        return x + y if alpha is None else weighted_sum(x, alpha, y)

    def change(self, x: Tensor, *args: Any) -> Tensor:
        """What is added to the stream: the branch with its coefficient, dropped for some samples in training."""
        return cast(Tensor, self.drop_path(self.scaled_branch(x, *args)))

    def scaled_branch(self, x: Tensor, *args: Any) -> Tensor:
        """s beta f(norm(x)). Subclasses scale the weights of f's last layer instead, which is cheaper."""
        y, beta = self.branch(self.norm(x), *args), self.branch_factor()
        return y if beta is None else beta * y

    def stream_factor(self) -> Tensor | None:
        """1 + s (alpha - 1), of shape (1,); None for 1."""
        if self.alpha is None or self.scale == 1:
            return self.alpha
        return 1 + self.scale * (self.alpha - 1)

    def branch_factor(self) -> Tensor | float | None:
        """s beta, of shape (1,), or s alone; None for 1."""
        if self.scale == 1:
            return self.beta
        return self.scale if self.beta is None else self.scale * self.beta

    def triton_refusal(self, x: Tensor) -> str | None:
        """Why the Triton kernels cannot compute this residual of x, or None if they can."""
        return dispatch.off() or dispatch.device_refusal(x.device) or self.weights_refusal() or self.size_refusal(x)

    def size_refusal(self, x: Tensor) -> str | None:
        """Why the Triton kernels cannot compute a branch of this size, or None if they can."""
        return "there is no kernel for this branch"

    def weights_refusal(self) -> str | None:
        """Why the Triton kernels cannot read the weights, or None if they can."""
        if not self.has_plain_layers():
            return "its layers are adapted or have hooks"
        if type(self.norm) is not nn.LayerNorm or self.norm.weight is None or self.norm.bias is None:
            return f"its norm is a {type(self.norm).__name__}, not a plain LayerNorm"
        if type(self.drop_path) not in (DropPath, nn.Identity) or has_hooks(self.drop_path):
            return "its stochastic depth is replaced or has hooks"
        return None

    def has_plain_layers(self) -> bool:
        """Whether all layers of the branch are plain and have no hooks, so that their weights may be used directly."""
        return False

    def triton_factors(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """For the Triton kernels: the stream's factor, (1,), and the branch's in training, (B,), both float32."""
        alpha = self.stream_factor()
        is_dropped = self.training and isinstance(self.drop_path, DropPath)
        keep = self.drop_path(torch.ones(x.shape[0], device=x.device)) if is_dropped else None
        return None if alpha is None else alpha.float(), keep

    def last_layer(self) -> nn.Module | None:
        """The linear layer that f ends with, if a subclass knows it."""
        return None

    @torch.no_grad()
    def fold(self) -> None:
        """Folds the branch's coefficient into the branch's last layer, and s into alpha, if that layer is plain.

        The weights must not change any more.
        """
        self.is_folded = True
        last, alpha, beta = self.last_layer(), self.stream_factor(), self.branch_factor()
        if beta is None or last is None or not is_plain(last):
            return
        for parameter in last.parameters():
            parameter.mul_(beta)
        if self.alpha is not None and alpha is not None:
            self.alpha.copy_(alpha)
        self.beta, self.scale = None, 1.0


def weighted_sum(x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """alpha x + y, for alpha of shape (1,), in one kernel."""
    if is_recomputed(x):
        return cast(Tensor, _WeightedSum.apply(x, alpha, y))
    return torch.addcmul(y, x, alpha)


class _WeightedSum(torch.autograd.Function):
    """As autograd would do it, except that alpha's gradient is a dot product, without storing grad * x."""

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
