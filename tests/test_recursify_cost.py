"""The cost of a recursive model before it is built: what the formula says is what the built model has."""

import pytest
import timm
import torch
from test_recursify import FAMILIES, count
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from sret import InputError, recursify, recursify_cost

OPTIONS = [{}, {"passes": 2, "rank": 2, "extra_passes": 1, "scale": True}]
SIZE = (3, 32, 32)
FAST = ("ViT", "CaiT", "Mixer", "torch")
FAST_AND_SLOW = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


def counted_macs(model: nn.Module) -> int:
    """By torch's counter; without data, attention is computed by products, which it counts."""
    with parametrize.cached(), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(1, *SIZE, device="meta"))
    return counter.get_total_flops() // 2


def check(model: nn.Module, options: dict) -> None:
    found = recursify_cost(model, SIZE, **options)
    assert (found.original_parameters, found.original_macs) == (count(model), counted_macs(recursify(model)))
    built = recursify(model, **options)
    assert found.parameters == count(built)
    assert found.macs + found.correction_macs == counted_macs(built)


@pytest.mark.parametrize("family", FAST_AND_SLOW)
def test_parameters_and_macs_are_those_of_the_built_model(family):
    model = FAMILIES[family]().eval()
    for options in OPTIONS:
        check(model, options)


@pytest.mark.parametrize("family", ["DINOv2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("ViT", "EVA-02"))])
def test_slices_and_projections_are_counted(family):
    model = FAMILIES[family]().eval()
    check(model, {"passes": 2, "slices": (3, 2), "projection": True, "extra_passes": 1})
    check(model, {"share": "middle", "passes": 2, "rank": 3})


def test_a_model_without_weights_has_a_cost():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    found = recursify_cost(model, (3, 224, 224), passes=2)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert found.original_parameters - found.parameters == 6 * block
    assert 1.2e9 < found.macs == found.original_macs < 1.3e9


def test_wrong_options_have_no_cost():
    model = FAMILIES["ViT"]()
    for options, message in (({"slices": (17,)}, "16 token"), ({"passes": 3}, "passes can be 2 or 4")):
        with pytest.raises(InputError, match=message):
            recursify_cost(model, SIZE, **options)
    with pytest.raises(InputError, match=r"give channels, height and width, such as \(3, 224, 224\)"):
        recursify_cost(model, 224, passes=2)
    with pytest.raises(InputError, match=r"with 16 channels last, not \(1, 16, 4, 4\); leave projection out"):
        recursify_cost(FAMILIES["ConvNeXt"](), (3, 32, 32), projection=True)
    with pytest.raises(InputError, match="cannot be sliced"):
        recursify_cost(FAMILIES["Swin"](), SIZE, slices=(2,))
