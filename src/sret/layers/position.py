"""A learned position embedding that follows the image: resized (bicubic, antialiased) to any grid of tokens."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def resize(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, C, H, W) -> (1, C, *grid), bicubic with antialiasing, in the dtype of the input."""
    if embedding.shape[-2:] == grid:
        return embedding
    resized = interpolate(embedding.float(), grid, mode="bicubic", antialias=True, align_corners=False)
    return resized.to(embedding.dtype)


class PositionEmbedding(nn.Module):
    """Adds an embedding of shape (1, C, H, W) to a feature map of any size.

    In evaluation without gradients the resized embedding is cached per grid. The cache is dropped when the weights
    change or the module returns to training.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, *grid), std=0.02))
        self._cache: dict[tuple[object, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H', W') -> (B, C, H', W')."""
        return x + self._resized((x.shape[-2], x.shape[-1]))

    def train(self, mode: bool = True) -> "PositionEmbedding":
        self._cache.clear()
        return super().train(mode)

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        weight = self.weight
        is_cacheable = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if grid == weight.shape[-2:] or not is_cacheable or weight.is_inference():
            return resize(weight, grid)
        key = (grid, weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if key not in self._cache:
            # Weights that changed leave entries that can never be found again: keep those of the present weights.
            self._cache = {k: v for k, v in self._cache.items() if k[1:] == key[1:]}
            self._cache[key] = resize(weight, grid).detach()
        return self._cache[key]
