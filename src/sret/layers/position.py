"""Learned position embedding, resized (bicubic, antialiased) to the token grid of any image."""

from collections.abc import Callable
from typing import Any, Self

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sret.kernels.conditions import is_transformed


def resize(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, C, H, W) -> (1, C, *grid), bicubic with antialiasing, in the dtype of the input."""
    # Symbolic sizes of a traced graph are not compared: such a graph always resizes, which is exact at the same size.
    if all(isinstance(size, int) for size in grid) and embedding.shape[-2:] == grid:
        return embedding
    precise = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    return interpolate(precise, grid, mode="bicubic", antialias=True, align_corners=False).to(embedding.dtype)


@register_notrace_module  # what it caches depends on the size
class PositionEmbedding(nn.Module):
    """Adds an embedding of shape (1, C, H, W) to a feature map of any size.

    In evaluation without gradients the resized embeddings of the last few grids are cached. The cache is cleared when
    the weight is replaced or changed in place (PyTorch does not report changes through `.data`), and by `train()`. It
    is neither copied nor pickled.
    """

    CACHED_GRIDS = 8

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, *grid), std=0.02))
        self._cache: dict[tuple[int, int], Tensor] = {}
        self._cached_of: tuple[Tensor, int] | None = None  # the weight that was resized, and its version then

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H', W') -> (B, C, H', W')."""
        embedding = self._resized((x.shape[-2], x.shape[-1]))
        if not is_transformed():
            embedding = embedding.contiguous(memory_format=torch.channels_last)  # as the stem's output
        return x + embedding

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resizes the weight to another grid."""
        self.weight = nn.Parameter(resize(self.weight, grid), requires_grad=self.weight.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; clears the cache."""
        self._cache, self._cached_of = {}, None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `.to()`, `.half()` and the like; clears the cache, since device or dtype may change."""
        self._cache, self._cached_of = {}, None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cached_of": None}

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        weight = self.weight
        is_cacheable = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not is_cacheable or weight.is_inference() or grid == weight.shape[-2:]:
            return resize(weight, grid)
        if self._cached_of is None or self._cached_of[0] is not weight or self._cached_of[1] != weight._version:
            self._cache, self._cached_of = {}, (weight, weight._version)
        if grid not in self._cache:
            if len(self._cache) == self.CACHED_GRIDS:
                del self._cache[next(iter(self._cache))]
            self._cache[grid] = resize(weight, grid).detach()
        return self._cache[grid]
