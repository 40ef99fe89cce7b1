"""A stage of the model: a pool, then a recursion for each distinct block, in all passes or one by one.

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297.
Letters: B batch, N tokens, C channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from sret.kernels.conditions import autocast_dtype
from sret.layers import (
    Block,
    Coefficients,
    ConvPool,
    NonLinearProjection,
    Permutation,
    Permuter,
    Recursion,
    ReversibleRecursion,
)
from sret.layers.merging import merging_passes
from sret.layers.permutation import CachedPermuter
from sret.models.config import ModelConfig
from sret.models.stage_config import StageConfig


@register_notrace_module  # torch.fx takes a stage as one node: it draws permutations
class Stage(nn.Module):
    """(B, C, H, W) -> (B, C', H', W'): a pool (except in the first stage), then a recursion per distinct block.

    Attributes:
        permuter: the permuter of the model, which all stages share.
        merge: tokens merged in each slice in each layer, see `StageConfig.merge`.
    """

    def __init__(
        self,
        config: StageConfig,
        model: ModelConfig,
        in_dim: int | None,
        drop_path_rates: Sequence[float],
        permuter: Permuter,
    ) -> None:
        super().__init__()
        self.permuter = permuter
        self.merge = config.merge
        dim = config.embed_dim
        coefficients = Coefficients(
            model.learnable_residual,
            is_stream_learnable=not model.reversible,
            scale=model.residual_factor(config),
        )

        def projection() -> nn.Module:
            if config.projection_ratio is None:
                return nn.Identity()
            return NonLinearProjection(dim, config.projection_ratio, coefficients)

        kind = ReversibleRecursion if model.reversible else Recursion
        self.pool = nn.Identity() if in_dim is None else ConvPool(in_dim, dim)
        self.recursions = nn.ModuleList(
            kind(
                Block(dim, config.num_heads, config.mlp_ratio, drop_path_rate, coefficients),
                config.groups,
                [projection() for _ in config.groups],
            )
            for drop_path_rate in drop_path_rates
        )

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> (B, N, C') and the grid (H', W'): the input of the first recursion."""
        x = self.pool(x)
        H, W = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # contiguous
        if autocast_dtype(x) is not None:  # half precision would round small steps of the stream away
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, (H, W)

    def forward(self, x: Tensor) -> Tensor:
        x, (H, W) = self.tokens(x)
        if self.merge:
            recursions = cast(list[Recursion], list(self.recursions))
            x = merging_passes(recursions, self.merge, self.permuter, x, is_training=self.training)
            return x.transpose(1, 2).unflatten(2, (H, W))
        for recursion in self.recursions:
            assert isinstance(recursion, Recursion)
            x = recursion(x, self.permutations(recursion, H * W, x.device))
        return x.transpose(1, 2).unflatten(2, (H, W))

    def permutations(self, recursion: Recursion, num_tokens: int, device: torch.device) -> list[Permutation | None]:
        """One for each pass. Drawn outside the recursion, so that a recomputed pass uses the same permutation."""
        return [self._permutation(recursion, i, num_tokens, device) for i in range(len(recursion.groups))]

    def _permutation(
        self, recursion: Recursion, pass_index: int, num_tokens: int, device: torch.device
    ) -> Permutation | None:
        if not recursion.is_permuted(pass_index):
            return None
        return self.permuter(num_tokens, recursion.groups[pass_index], device, is_training=self.training)

    def passes(self, num_tokens: int) -> list[tuple[int, int, Callable[[Tensor], Tensor]]]:
        """The passes of all recursions in order: (recursion, pass, function (B, N, C) -> (B, N, C))."""

        def one_pass(recursion: Recursion, drawn: list[Permutation | None], k: int, x: Tensor) -> Tensor:
            if isinstance(self.permuter, CachedPermuter):  # nothing is stored, so that torch.cond can trace it
                return recursion.run_pass(k, x, self._permutation(recursion, k, num_tokens, x.device))
            if k == 0:
                drawn[:] = self.permutations(recursion, num_tokens, x.device)
            return recursion.run_pass(k, x, drawn[k])

        found: list[tuple[int, int, Callable[[Tensor], Tensor]]] = []
        for i, recursion in enumerate(cast(list[Recursion], list(self.recursions))):
            drawn: list[Permutation | None] = []
            found += [(i, k, partial(one_pass, recursion, drawn, k)) for k in range(recursion.num_passes)]
        return found
