"""Convolutions around the transformer: the stem, which makes the tokens, and the pool between stages.

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297; the pool follows Heo et al.,
"Rethinking Spatial Dimensions of Vision Transformers", ICCV 2021, arXiv:2103.16302.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sret.kernels.conditions import has_hooks, is_transformed


@register_notrace_module  # its memory format and in-place ReLU depend on the caller
class ConvStem(nn.Module):
    """(B, in_chans, H, W) -> (B, C, ceil(H / s), ceil(W / s)), s the product of the strides.

    Three 3x3 convolutions to C/2, C and C channels, each followed by BatchNorm and ReLU.
    """

    def __init__(self, in_chans: int, embed_dim: int, strides: tuple[int, int, int] = (2, 2, 2)) -> None:
        super().__init__()
        first, second, third = strides
        mid = embed_dim // 2
        self.conv1 = nn.Conv2d(in_chans, mid, 3, first, padding=1)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, embed_dim, 3, second, padding=1)
        self.bn2 = nn.BatchNorm2d(embed_dim)
        self.conv3 = nn.Conv2d(embed_dim, embed_dim, 3, third, padding=1)
        self.bn3 = nn.BatchNorm2d(embed_dim)

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The output of the last convolution; those of all three are appended to `maps`."""
        # Channels last from here on: convolutions are faster, and tokens are a view of the feature map.
        if not is_transformed():
            x = x.contiguous(memory_format=torch.channels_last)
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            # In place, unless a hook may keep BatchNorm's output: these are the model's largest tensors.
            x = relu(bn(conv(x)), inplace=not has_hooks(bn))
            if maps is not None:
                maps.append(x)
        return x

    def fold(self) -> None:
        """Folds each BatchNorm, as applied in evaluation, into the convolution before it."""
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
            if type(getattr(self, bn)) is nn.BatchNorm2d:
                setattr(self, conv, fuse_conv_bn_eval(getattr(self, conv), getattr(self, bn)))
                setattr(self, bn, nn.Identity())


class ConvPool(nn.Module):
    """(B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)): a 3x3 depth-wise convolution; C' is a multiple of C."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1, groups=in_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
