"""Recursion: one block applied R times, each pass followed by its own projection.

    for r = 1..R:   x <- projection_r(block(x; groups_r, permutation_r))

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297. The authors' code is correct
only for R = 2; here `groups` has one entry per pass, and its length is R.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sret.errors import InputError
from sret.kernels.checkpointing import CheckpointPolicy
from sret.kernels.gpu.dispatch import shared_packing
from sret.kernels.recompute import Chain, is_recomputable, recomputed, without_gradient
from sret.layers.block import Block, one_pass
from sret.layers.permutation import Permutation

# The share of a compiled pass's activations that is stored for backward; cheap ones are recomputed instead. At 0.5 a
# step of `sret_t` was measured to take 0.7 of the memory of 1.0, and no more time (a tenth more in bfloat16).
ACTIVATION_SHARE = 0.5
# Compiled graphs of a pass: with and without gradients, in training and evaluation, for a few batch sizes.
GRAPHS_PER_KIND = 8


class Recursion(nn.Module):
    """A shared block, the number of slices of each pass, and a projection after each pass.

    Args:
        block: the shared weights, held once.
        groups: slices per pass; its length is the number of passes.
        projections: one module per pass; `nn.Identity()` leaves a projection out (the ablation).

    Attributes:
        policy: what forward keeps for backward.
        max_passes: only the first passes run, at most so many; None for all. `SReT.set_passes` sets it.
    """

    def __init__(self, block: Block, groups: Sequence[int], projections: Sequence[nn.Module]) -> None:
        super().__init__()
        if not groups or len(groups) != len(projections):
            raise InputError(f"{len(groups)} passes (at least one) need as many projections, not {len(projections)}")
        self.block = block
        self.groups = tuple(groups)
        self.projections = nn.ModuleList(projections)
        self.policy = CheckpointPolicy()
        self.max_passes: int | None = None
        self._pass: Callable[..., Tensor] = one_pass

    @property
    def num_passes(self) -> int:
        """The number of passes that run."""
        return len(self.groups[: self.max_passes])

    def run_pass(self, pass_index: int, x: Tensor, permutation: Permutation | None) -> Tensor:
        """(B, N, C) -> (B, N, C): pass number `pass_index` (from 0) alone, without recomputation in backward."""
        return self._pass(self.block, self.projections[pass_index], x, self.groups[pass_index], permutation)

    def is_permuted(self, pass_index: int) -> bool:
        """Whether pass number `pass_index` (from 0) permutes its tokens: every sliced pass but the first."""
        return pass_index > 0 and self.groups[pass_index] > 1

    def forward(self, x: Tensor, permutations: Sequence[Permutation | None]) -> Tensor:
        """(B, N, C) -> (B, N, C); `permutations` has one entry per pass, `None` for raster order."""
        projections = list(self.projections)  # looked up once: indexing a ModuleList takes as long as a small product

        def run_pass(i: int, x: Tensor) -> Tensor:
            return self._pass(self.block, projections[i], x, self.groups[i], permutations[i])

        first, num_passes = 0, self.num_passes
        if torch.is_grad_enabled() and self.policy.kind != "none" and is_recomputable(x):
            chain = Chain(run_pass, self.weights_by_pass, self)
            if self.policy.passes is None:
                return recomputed(chain, self.policy.num_kept(num_passes), x)
            first = max(0, num_passes - self.policy.passes)
            x = without_gradient(chain, first, x) if first else x
        with shared_packing():
            for i in range(first, num_passes):
                x = run_pass(i, x)
        return x

    def weights_by_pass(self) -> list[list[nn.Parameter]]:
        """The weights that each pass uses: those of the block and of its projection."""
        shared = list(self.block.parameters())
        return [[*shared, *projection.parameters()] for projection in list(self.projections)[: self.max_passes]]

    def compile(self, **options: Any) -> None:
        """Compiles one pass; all recursions of equal shapes share its graph. `options` are those of `torch.compile`."""
        self._pass = CompiledPass(one_pass, len(set(self.groups)), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pass": one_pass}  # compiled code is not copied

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class CompiledPass:
    """A function compiled for fixed shapes, which stores a part of its activations for backward.

    All recursions of all models share the graphs of a function. torch limits their number; beyond it, calls run
    uncompiled, with only a warning. The limit is set per thread, and on a GPU backward recomputes passes in another
    thread, so every call raises the limit of its thread.

    Args:
        kinds: the number of kinds of calls, which differ in more than weights; each may need `GRAPHS_PER_KIND` graphs.
    """

    max_graphs = 0  # of all functions together

    def __init__(self, function: Callable[..., Tensor], kinds: int, **options: Any) -> None:
        self._inner = torch.compile(function, **{"dynamic": False, **options})
        CompiledPass.max_graphs += GRAPHS_PER_KIND * kinds

    def __call__(self, *args: Any) -> Tensor:
        dynamo = torch._dynamo.config
        if dynamo.recompile_limit < self.max_graphs:
            dynamo.recompile_limit = self.max_graphs
            dynamo.accumulated_recompile_limit = max(self.max_graphs, dynamo.accumulated_recompile_limit)
        if not torch.is_grad_enabled():  # no separate graph for inputs that require gradients
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_SHARE):
            return self._inner(*args)
