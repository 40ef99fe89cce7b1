"""Reversible recursion: two streams whose inputs are computed from the outputs, so memory is constant in the passes.

    x_0 = x_1 = x
    x_0 <- x_0 + f(x_1),   x_1 <- x_1 + g(x_0),   x_0 <- x_0 + h(x_1),   ...      alternating
    y = (x_0 + x_1) / 2

f, g, h, ... are the residual branches in order: attention, MLP and projection of each pass. Only the outputs are kept
for backward: x_0 = x_0' - f(x_1) inverts a step. The stream has no coefficient, because dividing by one in every pass
would amplify rounding errors; the branches have theirs.

Sources: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, arXiv:1707.04585; Mangalam et al., "Reversible
Vision Transformers", CVPR 2022. With the same weights it computes another function than `Recursion`: it is a
separate architecture.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sret.errors import InputError
from sret.kernels.recompute import SECOND_BACKWARD, Chain, Recomputation, RNGState, is_recomputable
from sret.kernels.second_order import RECOMPUTED, first_order
from sret.layers.block import Block
from sret.layers.permutation import Permutation
from sret.layers.recursion import CompiledPass, Recursion
from sret.layers.residual import LearnableResidual


def change(residual: LearnableResidual, x: Tensor, *args: Any) -> Tensor:
    """(B, N, C) -> (B, N, C): what attention, MLP or projection adds to a stream."""
    return residual.change(x, *args)


class ReversibleRecursion(Recursion):
    """Two streams through the passes of a block; the residuals must not have a coefficient of the stream.

    The branches are computed without calling the block, its halves or the projections, so their hooks do not run.
    Raises `InputError` in forward for a projection that is not a residual.
    """

    def __init__(self, block: Block, groups: Sequence[int], projections: Sequence[nn.Module]) -> None:
        super().__init__(block, groups, projections)
        self._change: Callable[..., Tensor] = change

    def forward(self, x: Tensor, permutations: Sequence[Permutation | None]) -> Tensor:
        """(B, N, C) -> (B, N, C); `permutations` has one entry per pass, `None` for raster order."""
        branches: list[tuple[LearnableResidual, tuple[Any, ...]]] = []
        passes = list(zip(self.groups, permutations, self.projections, strict=True))[: self.max_passes]
        for num_groups, permutation, projection in passes:
            branches += [(self.block.attn, (num_groups, permutation)), (self.block.mlp, ())]
            if isinstance(projection, LearnableResidual):
                branches.append((projection, ()))
            elif not isinstance(projection, nn.Identity):
                raise InputError(
                    "a reversible recursion adds its projections to a stream, so they must be residuals, such as "
                    f"NonLinearProjection, or nn.Identity, not {type(projection).__name__}"
                )

        def run_branch(i: int, x: Tensor) -> Tensor:
            return self._change(branches[i][0], x, *branches[i][1])

        if torch.is_grad_enabled() and self.policy.kind == "reversible" and is_recomputable(x):
            return reversible_passes(
                Chain(run_branch, lambda: [list(residual.parameters()) for residual, _ in branches], self), x
            )
        streams = [x, x]
        for i in range(len(branches)):
            streams[i % 2] = streams[i % 2] + run_branch(i, streams[1 - i % 2])
        return (streams[0] + streams[1]) / 2

    def compile(self, **options: Any) -> None:
        """Compiles one branch; all recursions of equal shapes share its graph."""
        self._change = CompiledPass(change, 2 + len(set(self.groups)), **options)  # MLP, projection; attention

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_change": change}


@torch.compiler.disable  # as `recomputed`
def reversible_passes(chain: Chain, x: Tensor) -> Tensor:
    """The output of two streams through a chain of branches; backward computes every input from the outputs.

    Recomputed branches use the random numbers of forward. Backward can run only once.
    """
    return cast(Tensor, _Reversible.apply(chain, x, *chain.trainable()))


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.recomputation, ctx.rng_states = Recomputation(chain, x), [RNGState(x)]
        streams = [x.clone(), x.clone()]
        for i in range(len(chain)):
            if i:
                ctx.rng_states.append(ctx.rng_states[-1].current(x))
            streams[i % 2] += chain.step(i, streams[1 - i % 2])
        ctx.streams = streams
        ctx.save_for_backward(*weights)
        return (streams[0] + streams[1]) / 2

    @staticmethod
    @first_order(RECOMPUTED)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        recomputation, streams, _ = ctx.recomputation, ctx.streams, ctx.saved_tensors
        if streams is None:
            raise RuntimeError(SECOND_BACKWARD)
        ctx.streams = None
        gradients = [grad / 2, grad / 2]
        with recomputation.backward(grad):
            for i in reversed(range(len(recomputation.chain))):
                changed, other = i % 2, 1 - i % 2
                ctx.rng_states.pop().restore()
                y, gradient = recomputation.step(i, streams[other], gradients[changed])
                streams[changed] -= y
                if gradient is not None:
                    gradients[other] += gradient
        return None, gradients[0] + gradients[1] if ctx.needs_input_grad[1] else None, *recomputation.gradients()
