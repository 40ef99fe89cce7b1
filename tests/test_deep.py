"""Models of any depth within a budget: as deep as asked, no larger than allowed, or an error that says what can be."""

import pytest
import timm
import torch
from torch import nn

from sret import InputError, SReT, deep_config, model_cost
from sret.layers import Block, LearnableResidual
from sret.models.deep import passes_of
from sret.models.variants import DEEP, config_of

SMALL = {"embed_dim": 32, "img_size": 32, "stem_stride": 4, "num_classes": 10}


@pytest.mark.parametrize(("name", "layers"), [("sret_deep_108", 108), ("sret_deep_1008", 1008)])
def test_the_named_models_are_as_deep_and_as_small_as_promised(name, layers):
    config = config_of(name)
    with torch.device("meta"):
        model = SReT(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert config.depth == layers
    assert 13e6 <= parameters <= 15e6
    assert model_cost(config).parameters == parameters
    assert config.input_size == (224, 224)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.slow
def test_the_depth_in_a_name_is_the_number_of_passes_that_run(name):
    with torch.device("meta"):
        model, calls = SReT(config_of(name)), []
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_hook(lambda *_: calls.append(1))
        model.set_memory("none")
        model(torch.empty(1, 3, *model.config.input_size))
    assert len(calls) == int(name.split("_")[2])


def test_timm_makes_and_trains_them():
    model = timm.create_model("sret_deep_20_32", num_classes=7, in_chans=1, memory="pass")
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.config.memory == "pass"


def test_every_depth_from_five_on_can_be_had_exactly():
    for layers in (*range(5, 70), 108, 1000, 1008, 5000):
        first, second, third = passes_of(layers)
        assert min(first, second, third) >= 1
        assert first + 2 * second + 2 * third == layers


@pytest.mark.parametrize("millions", [3, 14, 60])
def test_a_budget_is_kept_and_used(millions):
    for layers in (5, 20, 108, 400):
        config = deep_config(layers=layers, max_parameters=millions * 10**6)
        cost = model_cost(config)
        assert config.depth == layers
        assert cost.parameters <= millions * 10**6
        ratio = config.stages[0].projection_ratio
        assert ratio is not None
        if ratio < 1:  # the next hundredth, of all projections, would not fit
            more = 0
            for stage in config.stages:
                C = stage.embed_dim
                hidden = int(C * (ratio + 0.01)) - int(C * ratio)
                more += stage.num_blocks * stage.num_passes * hidden * (2 * C + 1)
            assert cost.parameters + more > millions * 10**6, layers


@pytest.mark.slow
def test_all_depths_of_one_width_have_the_same_blocks():
    shapes = []
    for layers in (20, 108):
        model = SReT(deep_config(layers=layers, max_parameters=3_000_000, **SMALL))
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        shapes.append([p.shape for block in blocks for p in block.parameters()])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 4, "max_parameters": 10**7}, "layers is 4; it must be at least 5"),
        ({"layers": 0, "max_parameters": 10**7}, "layers is 0"),
        ({"layers": 10.5, "max_parameters": 10**7}, "layers is 10.5; it must be a whole number"),
        ({"layers": 1008, "max_parameters": 10**6}, "1008 layers of 32 channels need.*enough for 205 layers"),
        ({"layers": 20, "max_parameters": 10}, "the smallest model, of 5 layers, has 685,177"),
        (
            {"layers": 20, "max_parameters": 10**6, "embed_dim": 50},
            "embed_dim is 50, which cannot form heads of about 32 .*; try 64",
        ),
        ({"layers": 20, "max_parameters": 10**6, "embed_dim": 0}, "embed_dim is 0"),
        ({"layers": 20, "max_parameters": 10**6, "embed_dim": 8}, "embed_dim is 8.*try 32"),
        ({"layers": 20, "max_parameters": "10M"}, "max_parameters is '10M'; it must be a whole number"),
        ({"layers": 20, "max_parameters": float("inf")}, "max_parameters is inf; it must be a whole number"),
    ],
)
def test_errors_name_the_nearest_valid_value(asked, message):
    with pytest.raises(InputError, match=message):
        deep_config(**asked)


def test_the_nearest_depth_that_an_error_names_can_be_had():
    assert deep_config(layers=205, max_parameters=10**6).depth == 205
    with pytest.raises(InputError):
        deep_config(layers=206, max_parameters=10**6)


# health ---------------------------------------------------------------------------------------------------------------


def streams(layers: int, **changes: object) -> list[float]:
    """Mean square of the stream before every layer, at the start."""
    torch.manual_seed(0)
    model = timm.create_model(
        "sret_deep_20_32",
        memory="none",
        stages=deep_config(layers=layers, max_parameters=3_000_000, **SMALL).stages,
        **changes,
    )
    found: list[float] = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].square().mean().item()))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    return found


def test_a_stream_keeps_its_size_at_any_depth():
    """Divided by the number of passes; as published it grows with the square of depth."""
    assert max(streams(20)) < 2
    assert max(streams(400)) < 2
    assert max(streams(400, residual_scale="one")) > 100


@pytest.mark.parametrize("scale", ["one", "sqrt", "passes"])
def test_a_scale_multiplies_the_change_of_the_stream(scale):
    model = timm.create_model("sret_deep_20_32", residual_scale=scale)
    stage = model.config.stages[2]
    s = {"one": 1.0, "sqrt": stage.num_passes**-0.5, "passes": 1 / stage.num_passes}[scale]
    residual = model.stages[2].recursions[0].block.mlp.double()
    assert isinstance(residual, LearnableResidual)
    nn.init.constant_(residual.alpha, 0.8)
    nn.init.constant_(residual.beta, 1.3)
    x = torch.randn(2, 4, 128, dtype=torch.double)
    expected = (1 + s * (0.8 - 1)) * x + s * 1.3 * residual.branch(residual.norm(x))
    torch.testing.assert_close(residual(x), expected)
    residual.fold()
    torch.testing.assert_close(residual(x), expected)
    residual.fold()
    torch.testing.assert_close(residual(x), expected)
