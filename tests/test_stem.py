import pytest
import torch

from sret.layers import ConvPool, ConvStem
from sret.models.config import STEM_STRIDES


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(64, 64), (33, 17), (232, 96)])
def test_the_stem_divides_the_image_and_rounds_up(stride, size):
    y = ConvStem(3, 16, STEM_STRIDES[stride])(torch.randn(1, 3, *size))
    assert y.shape == (1, 16, -(-size[0] // stride), -(-size[1] // stride))
    assert y.min() >= 0  # the last of its layers is a ReLU


@pytest.mark.parametrize(("stride", "halved"), [(8, (1, 2, 3)), (4, (1, 2, 2)), (2, (1, 1, 1)), (1, (0, 0, 0))])
def test_the_first_convolutions_halve_the_image(stride, halved):
    """The earlier an image is halved, the less the next convolutions cost."""
    maps: list[torch.Tensor] = []
    ConvStem(3, 16, STEM_STRIDES[stride])(torch.randn(1, 3, 32, 32), maps)
    assert [y.shape[-1] for y in maps] == [32 // 2**n for n in halved]


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_the_pool_halves_and_mixes_no_channels(size):
    pool = ConvPool(4, 8)
    x = torch.randn(1, 4, *size, requires_grad=True)
    y = pool(x)
    assert y.shape == (1, 8, -(-size[0] // 2), -(-size[1] // 2))
    y[:, 2:4].sum().backward()  # outputs 2 and 3 are made of input 1
    assert [bool(g.any()) for g in x.grad[0]] == [False, True, False, False]
