"""Recursive models made of others: what needs sample images, and blocks of unusual kinds."""

import pytest
import torch
from test_recursify import FAMILIES, IMAGES, count, made, output
from torch import nn

from sret import InputError, recursify, recursify_cost
from sret.models.recursify import find_runs, recursify_distance
from sret.models.recursify.similarity import record


class Branches(nn.Module):
    """Two blocks, and three heads that all see the same."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x.flip(1)).view(x.shape)
        return sum(head(2 * x) for head in self.heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_follow_each_other(family):
    model = FAMILIES[family]().train()
    assert torch.equal(output(recursify(model, IMAGES).eval()), output(model.eval()))


def test_branches_are_refused():
    model = Branches()
    with pytest.raises(InputError, match=r"heads \(3 blocks\): heads.1 does not get the output of heads.0, .* parts"):
        recursify(model, IMAGES, extra_passes=1)
    recursify(model, IMAGES, extra_passes=1, parts="blocks")
    for images in (IMAGES[0], IMAGES.int(), [IMAGES], IMAGES[:0]):
        with pytest.raises(InputError, match=r"give a float tensor \(B, C, H, W\)"):
            recursify(model, images, parts="blocks")


def test_images_that_the_model_does_not_take_are_one_line():
    model = FAMILIES["ViT"]()
    message = r"VisionTransformer does not take images \(2, 3, 40, 40\) in float32 on cpu \(Input height \(40\)"
    for call in (recursify, lambda model, images, **options: recursify_distance(model, model, images)):
        with pytest.raises(InputError, match=message):
            call(model, torch.zeros(2, 3, 40, 40), passes=2)
        with pytest.raises(InputError, match=r"images are str; give a float tensor .* options by name"):
            call(model, "photo.jpg", passes=2)
    with pytest.raises(InputError, match=r"does not take images \(1, 3, 40, 40\) in float32 on meta"):
        recursify_cost(model, (3, 40, 40), passes=2)


def test_values_kept_between_calls_are_not_copied():
    model = FAMILIES["TinyViT"]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.normal_()
        expected = output(recursify(model, passes=2))
        model(IMAGES)
    assert torch.equal(output(recursify(model, passes=2)), expected)


class Pair(nn.Module):
    """A block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
        return self.norm(self.linear(x)), size + 1


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        size = 0
        for block in self.blocks:
            x, size = block(x, size)
        return x, size


def test_blocks_that_return_tuples_run_again():
    model, x = Pairs(), torch.randn(2, 3, 8)
    deep = recursify(model, extra_passes=1, scale=True, projection=True)
    torch.testing.assert_close(deep(x), model(x))
    with torch.no_grad():
        for block in deep.blocks:
            block.pass_gates.fill_(1.0)
    first, second = model.blocks
    torch.testing.assert_close(deep(x), (second(second(first(first(x, 0)[0], 0)[0], 0)[0], 0)[0], 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padded_tokens():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, is_padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[3], [5]])
    deep = recursify(model, extra_passes=1, scale=True)
    assert model.use_nested_tensor
    with torch.no_grad():
        found, expected = (net(x, src_key_padding_mask=is_padding) for net in (deep, model))
    torch.testing.assert_close(found[~is_padding], expected[~is_padding])


def test_the_number_of_runs_has_a_limit():
    with pytest.raises(InputError, match=r"extra_passes=4999999 blocks would run 20,000,000 times; at most 20,000"):
        recursify(FAMILIES["ViT"](), extra_passes=4_999_999)


@pytest.mark.parametrize("family", ["ViT", "CaiT", "Swin", "ConvMixer", "torch"])
def test_a_vector_has_a_factor_for_each_channel(family):
    model = made(family, {})
    deep = recursify(model, scale="vector")
    torch.testing.assert_close(output(deep), output(model), atol=1e-6, rtol=1e-5)
    run = find_runs(model)[-1]
    name = run.names[-1]
    old, new = model.get_submodule(name), deep.get_submodule(name)
    scale = new.pass_scale
    assert recursify_cost(model, (3, 32, 32), scale="vector").parameters == count(deep)
    with torch.no_grad():
        scale[1] = 3.0
        calls = record(model, [name], IMAGES)[0][name]
        x = next(a for a in calls.args if a.shape == calls.output.shape)
        change = (new(*calls.args, **calls.kwargs) - x) - (old(*calls.args, **calls.kwargs) - x)
    changed = change.movedim(1, -1) if family.startswith("Conv") else change
    assert changed.shape[-1] == len(scale)
    assert changed[..., 1].abs().max() > 1e-4
    assert changed[..., 0].abs().max() < 1e-5 > changed[..., 2:].abs().max()


def test_a_vector_needs_clear_channels():
    with pytest.raises(InputError, match='has no LayerNorm or BatchNorm; use scale="scalar"'):
        recursify(Branches(), scale="vector")
    with pytest.raises(InputError, match=r"channels of \(2, 8, 8, 8\) are not clear"):
        recursify(FAMILIES["ConvNeXt"](), scale="vector")(IMAGES)


def test_sequences_are_the_images_of_an_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 10
    shared = recursify(model, x, passes=2, share="similar", init="closest")
    assert recursify_distance(shared, model, x).output > 0
    with pytest.raises(InputError, match=r"give a float tensor \(B, N, C\)"):
        recursify(model, IMAGES, passes=2)
