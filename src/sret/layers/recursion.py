"""Recursion: one block applied R times, each pass followed by a projection of its own.

    for r = 1..R:   x <- projection_r(block(x; groups_r, permutation_r))

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297. The authors' code is right only
for R = 2; here `groups` has one entry per pass, and its length is R.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sret.errors import InputError
from sret.kernels.checkpointing import CheckpointPolicy
from sret.kernels.recompute import Chain, is_replayable, recomputed, without_gradient
from sret.layers.block import Block, one_pass
from sret.layers.permutation import Permutation

# The share of what backward needs of a compiled pass that is stored; what is cheap is computed again instead. At 0.5 a
# step of `sret_t` was measured to take 0.7 of the memory that it takes at 1, and no more time (bfloat16: a tenth).
STORED = 0.5
# Graphs of a pass: with and without gradients, in training and evaluation, for a few sizes of a batch.
VARIANTS = 8


class Recursion(nn.Module):
    """A shared block, the number of slices of each pass, and a projection after each pass.

    Args:
        block: the shared weights, held once.
        groups: slices per pass; its length is the number of passes.
        projections: one module per pass; `nn.Identity()` leaves a projection out (the ablation).

    Attributes:
        policy: what backward keeps.
    """

    def __init__(self, block: Block, groups: Sequence[int], projections: Sequence[nn.Module]) -> None:
        super().__init__()
        if not groups or len(groups) != len(projections):
            raise InputError(f"{len(groups)} passes (at least one) need as many projections, not {len(projections)}")
        self.block = block
        self.groups = tuple(groups)
        self.projections = nn.ModuleList(projections)
        self.policy = CheckpointPolicy()
        self._pass: Callable[..., Tensor] = one_pass

    def is_permuted(self, pass_index: int) -> bool:
        """Whether pass number `pass_index` (from 0) permutes its tokens: every sliced pass but the first."""
        return pass_index > 0 and self.groups[pass_index] > 1

    def forward(self, x: Tensor, permutations: Sequence[Permutation | None]) -> Tensor:
        """(B, N, C) -> (B, N, C); `permutations` has one entry per pass, `None` for raster order."""
        projections = list(self.projections)  # looked up once: indexing a ModuleList takes as long as a small product

        def one(i: int, x: Tensor) -> Tensor:
            return self._pass(self.block, projections[i], x, self.groups[i], permutations[i])

        first, num_passes = 0, len(self.groups)
        if torch.is_grad_enabled() and self.policy.kind != "none" and is_replayable(x):
            chain = Chain(one, self.weights_by_pass, self)
            if self.policy.passes is None:
                return recomputed(chain, self.policy.num_kept(num_passes), x)
            first = max(0, num_passes - self.policy.passes)
            x = without_gradient(chain, first, x) if first else x
        for i in range(first, num_passes):
            x = one(i, x)
        return x

    def weights_by_pass(self) -> list[list[nn.Parameter]]:
        """What each pass uses: the block's weights, and those of its projection."""
        shared = list(self.block.parameters())
        return [[*shared, *projection.parameters()] for projection in self.projections]

    def compile(self, **options: Any) -> None:
        """Compiles one pass, which all recursions of equal shapes then use; options are those of `torch.compile`."""
        self._pass = CompiledPass(one_pass, len(set(self.groups)), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pass": one_pass}  # compiled code is not copied

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class CompiledPass:
    """A function compiled for fixed shapes, storing part of what its backward needs.

    All passes of one function share its graphs, whatever their recursion or model. torch limits their number, and runs
    what comes later uncompiled with no more than a warning. That limit belongs to a thread, and backward on a GPU has
    one of its own, in which passes are computed again: hence it is raised where it counts, in the call.

    Args:
        kinds: how many differ by more than weights; each may take `VARIANTS` graphs.
    """

    most_graphs = 0  # of all together

    def __init__(self, function: Callable[..., Tensor], kinds: int, **options: Any) -> None:
        self._inner = torch.compile(function, **{"dynamic": False, **options})
        CompiledPass.most_graphs += VARIANTS * kinds

    def __call__(self, *args: Any) -> Tensor:
        dynamo = torch._dynamo.config
        if dynamo.recompile_limit < self.most_graphs:
            dynamo.recompile_limit = self.most_graphs
            dynamo.accumulated_recompile_limit = max(self.most_graphs, dynamo.accumulated_recompile_limit)
        if not torch.is_grad_enabled():  # then a graph for inputs that want gradients would be one too many
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        with torch._functorch.config.patch(activation_memory_budget=STORED):
            return self._inner(*args)
