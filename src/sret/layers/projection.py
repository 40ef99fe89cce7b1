"""Non-linear projection (NLL) after a pass: makes the repeated passes of a block differ.

    x <- b1 x + b2 MLP(LN(x))

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, non-linear projection layer.
Each pass has its own projection.
"""

from sret.layers.mlp import MlpResidual
from sret.layers.residual import AS_PUBLISHED, Coefficients


class NonLinearProjection(MlpResidual):
    """(B, N, C) -> (B, N, C), with int(C x ratio) hidden channels and an exact GELU."""

    def __init__(self, dim: int, ratio: float = 1.0, coefficients: Coefficients = AS_PUBLISHED) -> None:
        super().__init__(dim, ratio, coefficients=coefficients)
