"""A model made ready to answer: what need not be computed anew for every image is computed once.

- BatchNorm becomes part of the convolution before it.
- The coefficient of a residual's branch becomes part of the branch's last layer, which all passes go on sharing. The
  coefficient of the stream stays: it enters the addition at no cost.
- Permutations are remembered.
"""

import copy

import torch
from torch import nn

from sret.errors import InputError
from sret.layers import ConvStem, LearnableResidual
from sret.layers.permutation import RememberingPermuter
from sret.models.sret import SReT


@torch.no_grad()
def fuse(model: SReT) -> SReT:
    """A copy of the model that gives the same answers to rounding; in evaluation mode, and not for further training.

    It is a plain module with fewer tensors, which can be compiled, exported, and saved: `save_weights`, with a card
    whose `is_fused` is true. Fusing twice changes nothing. Raises `InputError` for a model of another kind.
    """
    if not isinstance(model, SReT):
        raise InputError(f"only models of sret can be fused, not {type(model).__name__}")
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in fused.modules():
        if isinstance(module, ConvStem | LearnableResidual):
            module.fold()
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # as the feature maps are
    fused.permuter = RememberingPermuter(fused.permuter.kind)
    return fused
