"""The layers of the paper, one per file."""

from sret.layers.attention import AttentionResidual, SlicedAttention
from sret.layers.block import Block
from sret.layers.mlp import MlpResidual
from sret.layers.permutation import IndexPermutation, Permutation, Permuter, StridedPermutation, replay
from sret.layers.position import PositionEmbedding
from sret.layers.projection import NonLinearProjection
from sret.layers.recursion import Recursion
from sret.layers.residual import Coefficients, LearnableResidual
from sret.layers.reversible import ReversibleRecursion
from sret.layers.stem import ConvPool, ConvStem

__all__ = [
    "AttentionResidual",
    "Block",
    "Coefficients",
    "ConvPool",
    "ConvStem",
    "IndexPermutation",
    "LearnableResidual",
    "MlpResidual",
    "NonLinearProjection",
    "Permutation",
    "Permuter",
    "PositionEmbedding",
    "Recursion",
    "ReversibleRecursion",
    "SlicedAttention",
    "StridedPermutation",
    "replay",
]
