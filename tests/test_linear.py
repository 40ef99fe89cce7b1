"""Layers joined with their neighbours answer, and learn, as the formula does."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import gelu

from sret.kernels.linear import gelu_linear, is_plain, linear, linear_gelu, norm_linear
from sret.layers import MlpResidual
from sret.layers.residual import weighted_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def arguments(dtype: torch.dtype, tokens: tuple[int, ...] = (2, 5)) -> tuple[torch.Tensor, nn.LayerNorm, nn.Linear]:
    norm, layer = nn.LayerNorm(6), nn.Linear(6, 7)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return torch.randn(*tokens, 6).to(dtype), norm.to(dtype), layer.to(dtype)


FORMULAS = {
    linear: lambda x, norm, layer: layer(x),
    linear_gelu: lambda x, norm, layer: gelu(layer(x)),
    gelu_linear: lambda x, norm, layer: layer(gelu(x)),
    norm_linear: lambda x, norm, layer: layer(norm(x)),
}


def call(function, x, norm, layer):
    return function(x, *([norm] if function is norm_linear else []), layer.weight, layer.bias)


@pytest.fixture(params=[True, False])
def _any_kernel(request, monkeypatch):
    """Whether what is small is large enough for the fused kernel."""
    if request.param:
        monkeypatch.setattr("sret.kernels.linear.FUSED_MACS", 0)
        monkeypatch.setattr("sret.kernels.linear.FUSED_ROWS", 0)


@pytest.mark.usefixtures("_any_kernel")
@pytest.mark.parametrize("function", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("tokens", [(2, 5), (0, 5), (3,)])
def test_each_is_its_formula(function, dtype, has_gradient, tokens):
    given = arguments(dtype, tokens)
    expected = FORMULAS[function](*given)
    with torch.set_grad_enabled(has_gradient):
        y = call(function, *given)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", [gelu_linear, norm_linear])
def test_gradients_are_those_of_the_formula(function):
    x, norm, layer = arguments(torch.float64)

    values = (x.requires_grad_(), *(norm.parameters() if function is norm_linear else ()), *layer.parameters())

    def apply(*_: torch.Tensor) -> torch.Tensor:  # the modules hold the tensors that gradcheck perturbs
        return call(function, x, norm, layer)

    assert gradcheck(apply, values)
    assert gradgradcheck(apply, values)


def test_the_weighted_sum_has_the_gradients_of_its_formula():
    x, y = torch.randn(2, 2, 3, 4, dtype=torch.double).requires_grad_().unbind(0)
    alpha = torch.tensor([0.7], dtype=torch.double, requires_grad=True)
    assert gradcheck(weighted_sum, (x, alpha, y))
    assert gradgradcheck(weighted_sum, (x, alpha, y))


@pytest.mark.parametrize("frozen", ["norm", "layer", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    x, norm, layer = arguments(torch.float64)
    x.requires_grad_(frozen != "x")
    norm.requires_grad_(frozen != "norm")
    layer.requires_grad_(frozen != "layer")
    grads = []
    for function in (norm_linear, lambda x, n, w, b: layer(n(x))):
        function(x, norm, layer.weight, layer.bias).square().sum().backward()
        tensors = {"x": x, "norm": norm.weight, "norm bias": norm.bias, "layer": layer.weight, "bias": layer.bias}
        grads.append({name: tensor.grad for name, tensor in tensors.items()})
        for tensor in tensors.values():
            tensor.grad = None
    assert {name for name, grad in grads[0].items() if grad is None} == {
        name for name, grad in grads[1].items() if grad is None
    }
    for name, grad in grads[0].items():
        if grad is not None:
            torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("function", [gelu_linear, norm_linear])
def test_autocast_computes_products_in_half_precision_and_gradients_in_full(function):
    x, norm, layer = arguments(torch.float32)
    x.requires_grad_()
    grads = []
    for f in (call, lambda function, *given: FORMULAS[function](*given)):
        with torch.autocast("cpu", torch.bfloat16):
            y = f(function, x, norm, layer)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads.append((x.grad, layer.weight.grad, layer.bias.grad))
        x.grad, layer.weight.grad, layer.bias.grad = None, None, None
    for ours, expected in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=3e-2, rtol=3e-2)


def test_an_mlp_stores_only_its_input_and_its_hidden_channels():
    residual, x = MlpResidual(8, 4.0), torch.randn(3, 5, 8, requires_grad=True)
    stored: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == 3:
            stored[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        residual(x)
    statistics = 2 * 3 * 5  # of the norm
    assert sum(stored.values()) == x.numel() + 4 * x.numel() + statistics


def test_adapters_and_hooks_are_called():
    """Whoever replaces a layer (LoRA, quantisation) or listens to one is not passed over."""
    residual, x = MlpResidual(8, 2.0), torch.randn(2, 5, 8)
    plain = residual(x)
    assert is_plain(residual.branch.fc1, residual.branch.fc2)
    seen = []
    for module in (residual.norm, residual.branch, residual.branch.fc1, residual.branch.fc2):
        handle = module.register_forward_hook(lambda *_, module=module: seen.append(module))
        torch.testing.assert_close(residual(x), plain)
        assert seen.pop() is module
        handle.remove()

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*x.shape[:-1], len(self.bias))

    residual.branch.fc2 = Adapter(residual.branch.fc2)
    torch.testing.assert_close(residual(x), x)
