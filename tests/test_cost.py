import pytest
import torch
from conftest import small_config
from torch.utils.flop_counter import FlopCounterMode

from sret import ModelConfig, SReT, StageConfig, model_cost

CONFIGS = {
    "sliced": small_config(),
    "ablated": small_config(
        learnable_residual=False,
        num_classes=0,
        stages=(StageConfig(embed_dim=16, num_heads=2, num_blocks=2, groups=(3,), projection_ratio=None),),
    ),
    "many passes": ModelConfig(
        stages=(
            StageConfig(embed_dim=8, num_heads=2, num_blocks=1, groups=(4, 2, 1, 7), projection_ratio=0.5),
            StageConfig(embed_dim=16, num_heads=2, num_blocks=3, groups=(1, 1)),
        ),
        img_size=(40, 24),
        in_chans=1,
        num_classes=3,
        stem_stride=4,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_costs_equal_the_formula(name):
    config = CONFIGS[name]
    model = SReT(config).eval()
    cost = model_cost(config)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.bytes == 4 * cost.parameters
    for stage, module in zip(cost.stages, model.stages, strict=True):
        assert stage.parameters == sum(p.numel() for p in module.parameters())
    # PyTorch's counter knows attention only in its plain form.
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(torch.zeros(1, config.in_chans, *config.input_size))
    assert counter.get_total_flops() == cost.flops


def test_slicing_saves_attention_only():
    sliced, unsliced = (
        small_config(),
        small_config(
            stages=tuple(
                StageConfig(embed_dim=s.embed_dim, num_heads=s.num_heads, num_blocks=s.num_blocks, mlp_ratio=2.0)
                for s in small_config().stages
            )
        ),
    )
    assert model_cost(sliced).parameters == model_cost(unsliced).parameters
    saved = model_cost(unsliced).macs - model_cost(sliced).macs
    attention = sum(
        2 * s.embed_dim * s.num_blocks * (n * n - n * n // g)
        for s, n in zip(sliced.stages, (64, 16, 4), strict=True)
        for g in s.groups
    )
    assert saved == attention > 0
