"""What timm's models offer works on their recursive copies too: every family, every way of sharing."""

import copy
import math
import operator
import re
from functools import cache

import onnx_ir.passes.common
import onnxruntime
import openvino
import pytest
import timm
import torch
from test_recursify import FAMILIES, LABELS, count
from timm.models._features import FeatureGetterNet, FeatureListNet
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sret import recursify

OPTIONS: dict[str, dict[str, object]] = {
    "strict": {"passes": 2},
    "rank": {"passes": 2, "rank": 2, "init": "mean"},
    "scale": {"scale": "vector"},
    "projection": {"passes": 2, "projection": True},
    "extra_passes": {"extra_passes": 2, "damping": True},
}
WITHOUT_PROJECTIONS = {"TinyViT", "ConvMixer", "ConvNeXt"}  # channels are not in the last axis
PAIRS = [(f, o) for f in FAMILIES for o in OPTIONS if o != "projection" or f not in WITHOUT_PROJECTIONS]
PIXELS = dict.fromkeys(("PVT v2", "TinyViT", "ConvNeXt"), 64)  # at 32 the last stage has a single token
FEATURES = [family for family in FAMILIES if family != "torch"]
# timm's PiT has neither checkpointing nor group_matcher; torch's parts have no methods of timm.
TIMM = [pair for pair in PAIRS if pair[0] not in ("PiT", "torch")]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request) -> tuple[str, str]:
    return request.param


@cache
def images(family: str) -> Tensor:
    size = PIXELS.get(family, 32)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """What begins as zeros or ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def made(family: str, option: str, is_trained: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = recursify(perturbed(FAMILIES[family]().eval(), 0), **OPTIONS[option])
    return perturbed(model, 1) if is_trained else model


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)
    cross_entropy(logits_of(model, x), LABELS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def unshared(family: str, model: nn.Module) -> nn.Module:
    """The original with the weights that each of its blocks has in a shared model, corrections included."""
    original = FAMILIES[family]().eval()
    for name, value in (*original.named_parameters(), *original.named_buffers()):
        value.copy_(operator.attrgetter(name)(model))
    return original


def all_tensors(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [x for inner in found for x in all_tensors(inner)]


@pytest.mark.parametrize("option", ["strict", "rank", "extra_passes"])
@pytest.mark.parametrize("family", FEATURES)
@torch.no_grad()
def test_features_are_those_of_the_same_blocks_apart(family, option):
    model, x = made(family, option, is_trained=option != "extra_passes"), images(family)
    original = unshared(family, model)
    few = {"out_indices": 2} if family.startswith("Swin") else {"out_indices": 3}
    for features in (
        lambda net: net.forward_features(x),
        lambda net: net.forward_intermediates(x),
        lambda net: net.forward_head(net.forward_features(x), pre_logits=True),
        lambda net: FeatureGetterNet(net, **few)(x),
    ):
        found, expected = all_tensors(features(model)), all_tensors(features(original))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["strict", "rank", "extra_passes"])
@pytest.mark.parametrize("family", ["ViT", "Swin", "PVT v2", "TinyViT", "Mixer", "ConvNeXt"])
@torch.no_grad()
def test_a_model_that_gives_features_only_is_shared_too(family, option):
    model, x = perturbed(FAMILIES[family]().eval(), 0), images(family)
    net = (
        FeatureGetterNet(model, out_indices=2)
        if family in ("ViT", "Mixer", "Swin")
        else FeatureListNet(model, (1, 2), flatten_sequential=True)
    )
    shared = recursify(net, **OPTIONS[option])
    found, original = shared(x), net(x)
    assert [y.shape for y in found] == [y.shape for y in original]
    assert (count(shared) < count(net)) or option != "strict"
    if option == "extra_passes":
        torch.testing.assert_close(found, original, atol=1e-6, rtol=1e-6)
    else:
        assert not torch.allclose(found[-1], original[-1], atol=1e-3)


@pytest.mark.parametrize(("family", "option"), [pair for pair in PAIRS if pair[0] != "torch"])
@torch.no_grad()
def test_a_new_classifier_has_its_classes_and_leaves_the_body(family, option):
    model, x = made(family, option), images(family)
    before = all_tensors(model.forward_features(x))
    model.reset_classifier(7)
    assert (model.num_classes, model(x).shape) == (7, (2, 7))
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(model.forward_features(x)), before, strict=True))


@pytest.mark.parametrize(("family", "option"), TIMM)
def test_checkpointing_changes_neither_gradients_nor_statistics(family, option):
    model, x = made(family, option).train(), images(family)
    checkpointed = made(family, option).train()
    checkpointed.set_grad_checkpointing(True)
    found, expected = gradients(checkpointed, x), gradients(model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    if option == "extra_passes":  # elsewhere timm's own checkpointing updates BatchNorm twice
        in_blocks = [name for name in model.state_dict() if re.search(r"blocks\.\d+\..*running_", name)]
        for name in in_blocks:
            torch.testing.assert_close(checkpointed.state_dict()[name], model.state_dict()[name])
        assert bool(in_blocks) == (family in ("XCiT", "TinyViT", "ConvMixer"))


def original_name(name: str) -> str:
    """Of the parameter that a new one corrects, or of a parameter of the block that has it."""
    return re.sub(r"parametrizations\.(\w+)\.(original|0\.left|0\.right)$", r"\1", name)


@pytest.mark.parametrize(("family", "option"), TIMM)
def test_optimizers_see_each_parameter_once_in_the_group_of_the_original(family, option):
    model, original = made(family, option), FAMILIES[family]()
    names = [name for name, _ in model.named_parameters()]
    for is_coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=is_coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(names)
    settings = []
    for net in (model, original):
        kept = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
        groups = param_groups_layer_decay(net, no_weight_decay_list=kept)
        found = [(id(p), group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]]
        ids = {id(parameter): name for name, parameter in net.named_parameters()}
        assert sorted(i for i, _, _ in found) == sorted(ids)
        settings.append({ids[i]: (decay, scale) for i, decay, scale in found})
    found, expected = settings
    layers: dict[float, set[float]] = {}
    for name, (decay, scale) in found.items():
        if block := re.match(r"(.*\.)pass_(?:scale|gates|projections)", name):
            assert decay == 0 or name.endswith(("fc1.weight", "fc2.weight"))
            assert scale in {of for other, (_, of) in expected.items() if other.startswith(block[1])}
        else:
            assert decay == expected[original_name(name)][0]
            layers.setdefault(expected[original_name(name)][1], set()).add(scale)
    if option == "strict":  # fewer layers, in the order of the original
        assert all(len(scales) == 1 for scales in layers.values())
        ordered = [scale for key in sorted(layers) for scale in layers[key]]
        assert ordered == sorted(ordered)
        assert len(set(ordered)) > 2
    else:
        assert layers == {scale: {scale} for scale in layers}


def test_every_parameter_has_a_gradient_after_one_step(pair):
    model, x = made(*pair, is_trained=False).train(), images(pair[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = gradients(model, x)
    assert [name for name, gradient in first.items() if gradient is None or not gradient.isfinite().all()] == []
    optimizer.step()
    second = gradients(model, x)
    assert [name for name, gradient in second.items() if not gradient.abs().max() > 0] == []


SLOW_PAIRS = [pair for pair in PAIRS if pair[1] in ("strict", "rank", "extra_passes")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "option"), SLOW_PAIRS)
def test_compiled_models_compute_and_learn_the_same(family, option):
    torch._dynamo.reset()
    x = images(family)
    compiled = torch.compile(made(family, option), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(family, option)(x))
    model, learning = made(family, option).train(), made(family, option).train()
    torch.manual_seed(0)
    cross_entropy(logits_of(torch.compile(learning, backend="eager", fullgraph=True), x), LABELS).backward()
    for (name, gradient), other in zip(gradients(model, x).items(), learning.parameters(), strict=True):
        torch.testing.assert_close(other.grad, gradient, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_and_openvino_compute_the_same_with_shared_weights_once(family):
    model, x = made(family, "strict"), images(family)
    if family == "BEiT":  # torch 2.14 does not export its call of fused attention, with or without sharing
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    x = torch.cat([x, x.flip(-1)[:1]])
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (x[:2],), dynamo=True, verbose=False, dynamic_shapes=batch)
    onnx_ir.passes.common.DeduplicateInitializersPass(size_limit=2**40)(program.model)
    proto = onnx_ir.to_proto(program.model)
    stored = sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)
    assert stored < 1.04 * count(model)  # with constants such as rotary tables and biases of positions
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
    core = openvino.Core()
    engine = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    torch.testing.assert_close(torch.from_numpy(engine(x.numpy())[0]), expected, atol=1e-5, rtol=1e-4)
