"""A recursion of two streams, whose inputs can be computed from its outputs: its memory does not grow with passes.

    x_0 = x_1 = x
    x_0 <- x_0 + f(x_1),   x_1 <- x_1 + g(x_0),   x_0 <- x_0 + h(x_1),   ...      by turns
    y = (x_0 + x_1) / 2

f, g, h, ... are the changes of each pass in their order: attention, MLP, and the projection of that pass. Nothing is
kept for backward but the outputs: x_0 = x_0' - f(x_1) undoes a turn. The stream has no coefficient, since dividing by
one would grow with depth; the branches keep theirs.

Sources: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, arXiv:1707.04585; Mangalam et al., "Reversible
Vision Transformers", CVPR 2022. It is another function of the same weights than `Recursion`: an architecture of its
own.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sret.errors import InputError
from sret.kernels.recompute import SPENT, Chain, Replay, RNGState, is_replayable
from sret.layers.block import Block
from sret.layers.permutation import Permutation
from sret.layers.recursion import CompiledPass, Recursion
from sret.layers.residual import LearnableResidual


def change(residual: LearnableResidual, x: Tensor, *args: Any) -> Tensor:
    """(B, N, C) -> (B, N, C): what one half of a pass, or a projection, adds to a stream."""
    return residual.change(x, *args)


class ReversibleRecursion(Recursion):
    """Two streams through the passes of a block; residuals must have no coefficient of the stream.

    Changes are computed without calling the block, its halves or the projections: their hooks hear nothing. Raises
    `InputError` in forward for a projection that is no residual.
    """

    def __init__(self, block: Block, groups: Sequence[int], projections: Sequence[nn.Module]) -> None:
        super().__init__(block, groups, projections)
        self._change: Callable[..., Tensor] = change

    def forward(self, x: Tensor, permutations: Sequence[Permutation | None]) -> Tensor:
        """(B, N, C) -> (B, N, C); `permutations` has one entry per pass, `None` for raster order."""
        turns: list[tuple[LearnableResidual, tuple[Any, ...]]] = []
        for num_groups, permutation, projection in zip(self.groups, permutations, self.projections, strict=True):
            turns += [(self.block.attn, (num_groups, permutation)), (self.block.mlp, ())]
            if isinstance(projection, LearnableResidual):
                turns.append((projection, ()))
            elif not isinstance(projection, nn.Identity):
                raise InputError(
                    "a reversible recursion adds its projections to a stream, so that they must be residuals, such as "
                    f"NonLinearProjection, or nn.Identity, not {type(projection).__name__}"
                )

        def turn(i: int, x: Tensor) -> Tensor:
            return self._change(turns[i][0], x, *turns[i][1])

        if torch.is_grad_enabled() and self.policy.kind == "reversible" and is_replayable(x):
            return reversibly(Chain(turn, lambda: [list(residual.parameters()) for residual, _ in turns], self), x)
        streams = [x, x]
        for i in range(len(turns)):
            streams[i % 2] = streams[i % 2] + turn(i, streams[1 - i % 2])
        return (streams[0] + streams[1]) / 2

    def compile(self, **options: Any) -> None:
        """Compiles the change of a turn, which all recursions of equal shapes then use."""
        self._change = CompiledPass(change, 2 + len(set(self.groups)), **options)  # MLP, projection; attention

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_change": change}


@torch.compiler.disable  # as `recomputed`
def reversibly(chain: Chain, x: Tensor) -> Tensor:
    """The two-stream answer of a chain of changes; backward computes every input from what came out.

    Random numbers are drawn as they were in forward. It can be differentiated only once.
    """
    return cast(Tensor, _Reversible.apply(chain, x, *chain.trained()))


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.replay, ctx.rng_states = Replay(chain, x), [RNGState(x)]
        streams = [x.clone(), x.clone()]
        for i in range(len(chain)):
            if i:
                ctx.rng_states.append(ctx.rng_states[-1].current(x))
            streams[i % 2] += chain.step(i, streams[1 - i % 2])
        ctx.streams = streams
        ctx.save_for_backward(*weights)
        return (streams[0] + streams[1]) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        replay, streams, _ = ctx.replay, ctx.streams, ctx.saved_tensors
        if streams is None:
            raise RuntimeError(SPENT)
        ctx.streams = None
        gradients = [grad / 2, grad / 2]
        with replay.started(grad):
            for i in reversed(range(len(replay.chain))):
                changed, other = i % 2, 1 - i % 2
                ctx.rng_states.pop().restore()
                y, gradient = replay.step(i, streams[other], gradients[changed])
                streams[changed] -= y
                if gradient is not None:
                    gradients[other] += gradient
        return None, gradients[0] + gradients[1] if ctx.needs_input_grad[1] else None, *replay.gradients()
