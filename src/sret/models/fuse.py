"""Fuses a model for inference: what does not depend on the image is computed once.

- BatchNorm is folded into the convolution before it.
- The coefficient of a residual's branch is folded into the branch's last layer, which all passes still share. The
  coefficient of the stream stays: it costs nothing in the addition.
- Permutations are cached.
"""

import copy

import torch
from torch import nn

from sret.errors import InputError
from sret.layers import ConvStem, LearnableResidual
from sret.layers.permutation import CachedPermuter
from sret.models.sret import SReT


@torch.no_grad()
def fuse(model: SReT) -> SReT:
    """A copy of the model with the same outputs, up to rounding; in evaluation mode, and not for further training.

    It can be compiled, exported, and saved (`save_weights`, with a card whose `is_fused` is true). Fusing it again
    changes nothing. Raises `InputError` if the model is not an `SReT`.
    """
    if not isinstance(model, SReT):
        raise InputError(f"only models of sret can be fused, not {type(model).__name__}")
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in fused.modules():
        if isinstance(module, ConvStem | LearnableResidual):
            module.fold()
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # as the feature maps are
    fused.permuter = CachedPermuter(fused.permuter.kind)
    return fused
