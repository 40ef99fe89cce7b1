import copy

import numpy as np
import pytest
import torch
from PIL import Image

from sret.layers import PositionEmbedding
from sret.layers.position import resize


def test_its_own_grid_is_added_as_it_is():
    position, x = PositionEmbedding(4, (6, 5)), torch.randn(2, 4, 6, 5)
    assert torch.equal(position(x), x + position.weight)


def test_resizing_keeps_constants_and_smooth_maps():
    flat = torch.full((1, 2, 8, 8), 0.7)
    torch.testing.assert_close(resize(flat, (12, 5)), torch.full((1, 2, 12, 5), 0.7))
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(1, 1, 4, 64)
    inner = resize(ramp, (4, 32))[0, 0, 0, 4:-4]  # cubic interpolation is exact on a ramp away from its ends
    torch.testing.assert_close(inner, (torch.arange(4, 28) * 2 + 0.5) / 63, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(20, 13), (5, 7)])
def test_resizing_is_bicubic_and_antialiased_as_pillow_has_it(grid):
    surface = torch.randn(8, 9)
    expected = Image.fromarray(surface.numpy()).resize(grid[::-1], Image.Resampling.BICUBIC)
    torch.testing.assert_close(
        resize(surface[None, None], grid)[0, 0], torch.tensor(np.asarray(expected)), atol=1e-4, rtol=0
    )


def test_shrinking_is_antialiased():
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8).view(1, 1, 16, 16)
    assert resize(checkers, (4, 4))[..., 1:-1, 1:-1].abs().max() < 0.05  # picking pixels would give 1


def test_the_cache_serves_evaluation_and_notices_new_weights():
    position, x = PositionEmbedding(4, (8, 8)).eval(), torch.zeros(1, 4, 6, 6)
    with torch.no_grad():
        first = position(x)
        assert len(position._cache) == 1
        assert torch.equal(position(x), first)
        position.weight.mul_(2)
        torch.testing.assert_close(position(x), 2 * first)
        assert len(position._cache) == 1
        for width in range(1, 30):
            position(torch.zeros(1, 4, 7, width))
        assert len(position._cache) == PositionEmbedding.CACHED_GRIDS
        assert not copy.deepcopy(position)._cache
        position.weight = torch.nn.Parameter(torch.ones(1, 4, 8, 8))
        torch.testing.assert_close(position(x), torch.ones(1, 4, 6, 6))
        torch.testing.assert_close(position.double()(x.double()), torch.ones(1, 4, 6, 6, dtype=torch.double))
    assert not position.train()._cache


def test_gradients_reach_the_embedding_through_a_resize():
    for is_training in (True, False):
        position = PositionEmbedding(4, (8, 8)).train(is_training)
        with torch.no_grad():
            position(torch.zeros(1, 4, 6, 6))
        position(torch.zeros(1, 4, 6, 6)).square().sum().backward()
        assert position.weight.grad.abs().min() > 0


def test_weights_made_in_inference_mode_work():
    with torch.inference_mode():
        position = PositionEmbedding(4, (8, 8)).eval()
        assert position(torch.zeros(1, 4, 6, 6)).shape == (1, 4, 6, 6)
