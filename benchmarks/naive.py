"""Computes a model with the authors' arithmetic. Fast paths are compared with it, in outputs and in time.

It has the formulas of the paper and of the authors' release, and the weights of a `SReT`. Attention is two matrix
products and a softmax, permutations are gathers, both coefficients are multiplied with activations, BatchNorm is a
layer, and feature maps have PyTorch's default layout.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, relu

from sret import SReT
from sret.kernels.slices import slice_lengths
from sret.layers import Block, LearnableResidual, Permutation, Recursion, SlicedAttention
from sret.layers.mlp import Mlp
from sret.models.stage import Stage


class Naive(nn.Module):
    """The same function as `model`, with the same weights, for models with one stream; in any mode and size."""

    def __init__(self, model: SReT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        model = self.model
        stem = model.stem
        for conv, bn in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2), (stem.conv3, stem.bn3)):
            x = relu(bn(conv2d(x, conv.weight.contiguous(), conv.bias, conv.stride, conv.padding)))
        x = x + model.pos_embed._resized((x.shape[-2], x.shape[-1]))
        for stage in model.stages:
            assert isinstance(stage, Stage)
            x = self._stage(stage, x)
        return model.head(model.norm(x.mean((2, 3))))

    def _stage(self, stage: Stage, x: Tensor) -> Tensor:
        x = stage.pool(x)
        H, W = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2).contiguous()
        for recursion in stage.recursions:
            assert isinstance(recursion, Recursion)
            for i, (num_groups, projection) in enumerate(zip(recursion.groups, recursion.projections, strict=True)):
                permutation = None
                if recursion.is_permuted(i):
                    permutation = self.model.permuter(H * W, num_groups, x.device, is_training=stage.training)
                x = _pass(recursion.block, x, num_groups, permutation)
                x = _residual(projection, x, _mlp(projection, x)) if isinstance(projection, LearnableResidual) else x
        return x.transpose(1, 2).reshape(x.shape[0], -1, H, W).contiguous()


def _pass(block: Block, x: Tensor, num_groups: int, permutation: Permutation | None) -> Tensor:
    attn = block.attn.branch
    y = block.attn.norm(x)
    if permutation is not None:
        y = permutation.apply(y)
    y = _attention(attn, y, num_groups)
    if permutation is not None:
        y = permutation.undo(y)
    x = _residual(block.attn, x, attn.proj(y))
    return _residual(block.mlp, x, _mlp(block.mlp, x))


def _attention(attn: SlicedAttention, x: Tensor, num_groups: int) -> Tensor:
    C, H = x.shape[-1], attn.num_heads
    attended = []
    for slices, length, tokens in _cuts(x, num_groups):
        qkv = attn.qkv(tokens).reshape(-1, slices, length, 3, H, C // H).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.contiguous().unbind(0)  # each (B, G, H, M, D)
        weights = (q @ k.transpose(-2, -1) * (C // H) ** -0.5).softmax(dim=-1)
        attended.append((weights @ v).transpose(2, 3).reshape(-1, slices * length, C))
    return torch.cat(attended, dim=1) if len(attended) > 1 else attended[0]


def _cuts(x: Tensor, num_groups: int) -> Iterator[tuple[int, int, Tensor]]:
    """The groups of slices of equal length: number of slices, their length, their tokens."""
    cuts: Sequence[tuple[int, int]] = slice_lengths(x.shape[1], num_groups)
    parts = x.split([slices * length for slices, length in cuts], dim=1)
    for (slices, length), part in zip(cuts, parts, strict=True):
        yield slices, length, part


def _mlp(residual: LearnableResidual, x: Tensor) -> Tensor:
    mlp = residual.branch
    assert isinstance(mlp, Mlp)
    return mlp.fc2(gelu(mlp.fc1(residual.norm(x))))


def _residual(residual: LearnableResidual, x: Tensor, y: Tensor) -> Tensor:
    s, alpha = residual.scale, 1.0 if residual.alpha is None else residual.alpha
    beta = 1.0 if residual.beta is None else residual.beta
    if s == 1:
        return alpha * x + beta * residual.drop_path(y)
    return (1 + s * (alpha - 1)) * x + s * beta * residual.drop_path(y)
