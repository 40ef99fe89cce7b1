"""Slow, obvious oracles: the formulas written out, without the package's layers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sret.layers import Recursion, SlicedAttention
from sret.layers.permutation import Permutation


def slice_ids(num_tokens: int, num_groups: int) -> Tensor:
    """(N,): which slice a token is in; the first N mod G slices hold one token more."""
    length, longer = divmod(num_tokens, num_groups)
    return torch.cat([torch.full((length + (g < longer),), g) for g in range(num_groups)])


def masked_attention(attn: SlicedAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """Full attention over (B, N, C) in which token i may attend to token j where `allowed[i, j]`, (N, N) bool."""
    B, N, C = x.shape
    H = attn.num_heads
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / (C // H) ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(B, N, C)
    return F.linear(y, attn.proj.weight, attn.proj.bias)


def fixed_permutation(num_tokens: int) -> list[int]:
    """The evaluation permutation in Python's integers: positions in the order of a hash of their number from 1."""

    def mixed(key: int) -> int:
        for _ in range(2):
            key = ((key ^ (key >> 16)) * 0x45D9F3B) % 2**32
        return key ^ (key >> 16)

    return sorted(range(num_tokens), key=lambda i: mixed(i + 1))


class Unrolled(nn.Module):
    """A recursion with a copy of its block per pass, of the same values: what sharing is compared with."""

    def __init__(self, recursion: Recursion) -> None:
        super().__init__()
        self.groups = recursion.groups
        self.copies = nn.ModuleList(copy.deepcopy(recursion.block) for _ in recursion.groups)
        self.projections = copy.deepcopy(recursion.projections)

    def forward(self, x: Tensor, permutations: Sequence[Permutation | None]) -> Tensor:
        for i, permutation in enumerate(permutations):
            x = self.projections[i](self.copies[i](x, self.groups[i], permutation))
        return x


def official_forward(
    weights: dict[str, Tensor],
    image: Tensor,
    depths: Sequence[int],
    heads: Sequence[int],
    groups: Sequence[tuple[int, int]],
    permutations: Sequence[Tensor],
) -> Tensor:
    """Evaluation of a two-pass model straight from a state dict under the authors' names.

    Args:
        depths: layers per stage; groups: slices of the first and second pass per stage.
        permutations: (N,) indices in the order of use.
    """
    queue = list(permutations)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    def attention(x: Tensor, name: str, num_heads: int, num_groups: int, index: Tensor | None) -> Tensor:
        _, N, C = x.shape
        order = torch.arange(N) if index is None else index
        y = torch.empty_like(x)
        for members in order.split(N // num_groups):  # one slice after the other
            q, k, v = (
                t.unflatten(-1, (num_heads, -1)).transpose(1, 2)
                for t in linear(x[:, members], f"{name}.qkv").chunk(3, dim=-1)
            )
            w = (q @ k.transpose(-2, -1) / (C // num_heads) ** 0.5).softmax(dim=-1)
            y[:, members] = (w @ v).transpose(1, 2).flatten(2)
        return linear(y, f"{name}.proj")

    x = image
    for i in (1, 2, 3):
        x = F.conv2d(x, weights[f"patch_embed.conv{i}.weight"], weights[f"patch_embed.conv{i}.bias"], 2, 1)
        bn = {k: weights[f"patch_embed.bn{i}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        x = F.relu(F.batch_norm(x, **bn))
    x = x + weights["pos_embed"]
    for stage, (depth, num_heads, stage_groups) in enumerate(zip(depths, heads, groups, strict=True)):
        if stage:
            name = f"pools.{stage - 1}.conv"
            x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1, groups=x.shape[1])
        H, W = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        for layer in range(depth):
            name, pass_ = f"transformers.{stage}.blocks.{2 * layer}", layer % 2
            a = [weights[f"{name}.coefficient{i}.bias"] for i in (1, 2, 3, 4)]
            num_groups = stage_groups[pass_]
            index = queue.pop(0) if pass_ and num_groups > 1 else None
            x = a[0] * x + a[1] * attention(norm(x, f"{name}.norm1"), f"{name}.attn", num_heads, num_groups, index)
            x = a[2] * x + a[3] * mlp(norm(x, f"{name}.norm2"), f"{name}.mlp")
            name = f"transformers.{stage}.blocks.{2 * layer + 1}"
            b = [weights[f"{name}.coefficient{i}.bias"] for i in (1, 2)]
            x = b[0] * x + b[1] * mlp(norm(x, f"{name}.norm1"), f"{name}.mlp")
        x = x.transpose(1, 2).unflatten(2, (H, W))
    assert not queue
    return linear(norm(x.mean((2, 3)), "norm"), "head")


def two_streams(recursion: Recursion, x: Tensor, permutations: Sequence[Permutation | None]) -> Tensor:
    """The reversible recursion written out: changes in the order of passes, to either stream by turns."""
    changes = []
    for i, permutation in enumerate(permutations):
        attn, mlp, projection = recursion.block.attn, recursion.block.mlp, recursion.projections[i]
        changes.append(
            lambda t, r=attn, g=recursion.groups[i], p=permutation: r.scale * r.beta * r.branch(r.norm(t), g, p)
        )
        for residual in (mlp, projection):
            if not isinstance(residual, nn.Identity):
                changes.append(lambda t, r=residual: r.scale * r.beta * r.branch(r.norm(t)))
    first, second = x, x
    for change in changes:
        first, second = second, first + change(second)
    return (first + second) / 2
