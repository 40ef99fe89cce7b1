"""The paper's parts, one idea a file. They import torch and timm's layers, and nothing of ours above them."""

from sret.layers.attention import AttentionResidual, SlicedAttention
from sret.layers.block import Block
from sret.layers.mlp import MlpResidual
from sret.layers.permute import IndexPermutation, Permutation, Permuter, StridedPermutation, replay
from sret.layers.position import PositionEmbedding
from sret.layers.projection import NonLinearProjection
from sret.layers.recursion import Recursion
from sret.layers.residual import LearnableResidual
from sret.layers.stem import ConvPool, ConvStem

__all__ = [
    "AttentionResidual",
    "Block",
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
    "SlicedAttention",
    "StridedPermutation",
    "replay",
]
