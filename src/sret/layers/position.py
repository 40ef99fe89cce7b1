"""A learned position embedding that follows the image: resized (bicubic, antialiased) to any grid of tokens."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sret.kernels.conditions import is_transformed


def resize(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, C, H, W) -> (1, C, *grid), bicubic with antialiasing, in the dtype of the input."""
    if embedding.shape[-2:] == grid:
        return embedding
    precise = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    return interpolate(precise, grid, mode="bicubic", antialias=True, align_corners=False).to(embedding.dtype)


class PositionEmbedding(nn.Module):
    """Adds an embedding of shape (1, C, H, W) to a feature map of any size.

    In evaluation without gradients the resized embeddings of the last few grids are cached. The cache is dropped when
    the weights are replaced or written in place (but for writes through `.data`, which PyTorch does not count), and
    when the module returns to training; it is neither copied nor pickled.
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
            embedding = embedding.contiguous(memory_format=torch.channels_last)  # as the stem's output lies in memory
        return x + embedding

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; drops the cache."""
        self._cache, self._cached_of = {}, None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.half()` and their like call: another device or dtype needs other entries."""
        self._cache, self._cached_of = {}, None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cached_of": None}

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        weight = self.weight
        is_cacheable = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if grid == weight.shape[-2:] or not is_cacheable or weight.is_inference():
            return resize(weight, grid)
        if self._cached_of is None or self._cached_of[0] is not weight or self._cached_of[1] != weight._version:
            self._cache, self._cached_of = {}, (weight, weight._version)
        if grid not in self._cache:
            if len(self._cache) == self.CACHED_GRIDS:
                del self._cache[next(iter(self._cache))]
            self._cache[grid] = resize(weight, grid).detach()
        return self._cache[grid]
