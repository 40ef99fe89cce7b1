"""MLP with a learnable residual: the second half of a block, and the whole of a projection.

y = alpha x + beta MLP(LN(x)),   MLP(x) = W2 GELU(W1 x + b1) + b2
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from sret.kernels.conditions import has_hooks
from sret.kernels.gpu import dispatch
from sret.kernels.linear import (
    LAYER_NORM_EPS,
    gelu_linear,
    is_plain,
    linear,
    linear_gelu,
    norm_linear,
    scaled,
)
from sret.layers.residual import AS_PUBLISHED, Coefficients, LearnableResidual

if TYPE_CHECKING:
    from sret.kernels.gpu.mlp import PackedMlp


class Mlp(nn.Module):
    """(..., C) -> (..., C): two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class MlpResidual(LearnableResidual):
    """(B, N, C) -> (B, N, C), with int(C x ratio) hidden channels."""

    branch: Mlp

    def __init__(
        self, dim: int, ratio: float, drop_prob: float = 0.0, coefficients: Coefficients = AS_PUBLISHED
    ) -> None:
        norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        super().__init__(Mlp(dim, int(dim * ratio)), norm, drop_prob, coefficients)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.triton_refusal(x) is not None:
            return super().forward(x)
        from sret.kernels.gpu.mlp import mlp_residual

        return mlp_residual(x, self.packed(x), *self.triton_factors(x))

    def size_refusal(self, x: Tensor) -> str | None:
        """Why the Triton kernels cannot compute a branch of this size, or None if they can."""
        return dispatch.refusal(x, self.branch.fc1.weight, self.branch.fc1.in_features)

    def packed(self, x: Tensor) -> "PackedMlp":
        """The weights as the Triton kernels read them."""
        from sret.kernels.gpu.mlp import PackedMlp

        mlp, dtype = self.branch, dispatch.compute_dtype(x, self.branch.fc1.weight)
        return dispatch.packed(
            self,
            dtype,
            lambda: PackedMlp.of(self.norm, mlp.fc1, mlp.fc2, self.branch_factor(), dtype),
            is_constant=self.is_folded,
        )

    def scaled_branch(self, x: Tensor) -> Tensor:
        """s beta MLP(LN(x)), by scaling the second layer's weights."""
        mlp = self.branch
        if not self.has_plain_layers():
            return super().scaled_branch(x)
        weight, bias = scaled(mlp.fc2, self.branch_factor())
        if torch.is_grad_enabled():
            return gelu_linear(norm_linear(x, self.norm, mlp.fc1.weight, mlp.fc1.bias), weight, bias)
        return linear(linear_gelu(self.norm(x), mlp.fc1.weight, mlp.fc1.bias), weight, bias)

    def has_plain_layers(self) -> bool:
        """Whether all layers of the branch are plain and have no hooks, so that their weights may be used directly."""
        mlp = self.branch
        return type(mlp) is Mlp and is_plain(mlp.fc1, mlp.fc2) and not has_hooks(self.norm, mlp, mlp.fc1, mlp.fc2)

    def last_layer(self) -> nn.Module:
        return self.branch.fc2
