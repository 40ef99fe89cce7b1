"""Layers joined with their neighbours answer, and learn, as the formula does."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import gelu

from sret.kernels import linear as kernels
from sret.kernels.linear import gelu_linear, is_plain, kernels_for, linear, linear_gelu, norm_linear
from sret.layers import MlpResidual
from sret.layers.residual import weighted_sum


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


@pytest.fixture
def _fused_at_any_size(monkeypatch):
    """What is small is large enough for the fused kernel."""
    monkeypatch.setattr(kernels, "FUSED_MACS", 0)
    monkeypatch.setattr(kernels, "FUSED_ROWS", 0)


@pytest.mark.skipif(not kernels._IS_SUPPORTED, reason="oneDNN's kernels were measured on x86 only")
@pytest.mark.usefixtures("_fused_at_any_size")
@pytest.mark.parametrize("function", FORMULAS)
@pytest.mark.parametrize("dtype", sorted(kernels._FUSED_DTYPES, key=str))
def test_each_is_its_formula_in_the_fused_kernel(function, dtype):
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    for tokens in ((2, 5), (3,), (0, 5)):
        given = arguments(dtype, tokens)
        expected = FORMULAS[function](*given)
        with torch.no_grad():
            torch.testing.assert_close(call(function, *given), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("_fused_at_any_size")
@pytest.mark.parametrize("function", [gelu_linear, norm_linear])
def test_with_a_backward_of_its_own_each_is_its_formula(function):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        for tokens in ((2, 5), (0, 5)):
            given = arguments(dtype, tokens)
            y = call(function, *given)
            assert type(y.grad_fn).__name__ in ("_GeluLinearBackward", "_NormLinearBackward")
            torch.testing.assert_close(y, FORMULAS[function](*given), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", [gelu_linear, norm_linear])
def test_gradients_are_those_of_the_formula(function):
    x, norm, layer = arguments(torch.float64)

    values = (x.requires_grad_(), *(norm.parameters() if function is norm_linear else ()), *layer.parameters())

    def apply(*_: torch.Tensor) -> torch.Tensor:  # the modules hold the tensors that gradcheck perturbs
        return call(function, x, norm, layer)

    assert gradcheck(apply, values)
    assert gradgradcheck(apply, values)


PLAIN = (kernels.plain_linear, kernels._plain_linear_gelu)
FUSED = (kernels._onednn_linear, kernels._onednn_linear_gelu)


@pytest.fixture
def _x86(monkeypatch):
    """The choice as on a processor with AVX-512, wherever the test runs; nothing is computed."""
    monkeypatch.setattr(kernels, "_IS_SUPPORTED", True)
    monkeypatch.setattr(kernels, "_FUSED_DTYPES", {torch.float32, torch.bfloat16})


@pytest.mark.usefixtures("_x86")
@pytest.mark.parametrize(
    ("rows", "channels", "hidden", "expected"),
    [
        (148, 8, 8, (PLAIN[0], PLAIN[1])),
        (150, 8, 8, (PLAIN[0], FUSED[1])),  # a product with a GELU: by rows
        (100, 400, 499, (PLAIN[0], PLAIN[1])),
        (100, 400, 500, (FUSED[0], PLAIN[1])),  # one without: by multiply-adds, 20 million
        (784, 256, 256, FUSED),
    ],
)
@torch.no_grad()
def test_float32_takes_the_fused_kernel_from_the_measured_size_on(rows, channels, hidden, expected):
    assert kernels_for(torch.empty(2, rows // 2, channels), torch.empty(hidden, channels)) == expected


@pytest.mark.usefixtures("_x86")
@torch.no_grad()
def test_bfloat16_takes_the_fused_kernel_at_any_size_and_nothing_else_does(monkeypatch):
    def chosen(dtype: torch.dtype, device: str = "cpu") -> tuple:
        return kernels_for(torch.empty(3, 8, dtype=dtype, device=device), torch.empty(8, 8, dtype=dtype, device=device))

    assert chosen(torch.bfloat16) == FUSED
    assert chosen(torch.float64) == chosen(torch.float16) == PLAIN
    assert chosen(torch.bfloat16, "meta") == PLAIN
    monkeypatch.setattr(kernels, "_FUSED_DTYPES", {torch.float32})  # a processor without AVX-512
    assert chosen(torch.bfloat16) == PLAIN


@pytest.mark.usefixtures("_x86")
@pytest.mark.parametrize(
    "circumstance", ["gradients", "autocast", "torch.func", "compiling", "no oneDNN", "not x86", "other dtype", "empty"]
)
def test_the_plain_kernel_serves_where_the_fused_one_cannot(circumstance, monkeypatch):
    x, weight = torch.empty(784, 256), torch.empty(256, 256)
    found = []
    with torch.no_grad():
        assert kernels_for(x, weight) == FUSED
        if circumstance == "gradients":
            with torch.enable_grad():
                found.append(kernels_for(x, weight))
        elif circumstance == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found.append(kernels_for(x, weight))
        elif circumstance == "torch.func":
            torch.func.vmap(lambda row: found.append(kernels_for(x, weight)) or row)(x)
        elif circumstance == "compiling":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            found.append(kernels_for(x, weight))
        elif circumstance == "no oneDNN":
            with torch.backends.mkldnn.flags(enabled=False):
                found.append(kernels_for(x, weight))
        elif circumstance == "not x86":
            monkeypatch.setattr(kernels, "_IS_SUPPORTED", False)
            found.append(kernels_for(x, weight))
        elif circumstance == "other dtype":
            found.append(kernels_for(x, weight.double()))
        else:
            found.append(kernels_for(x[:0].bfloat16(), weight.bfloat16()))
    assert found == [PLAIN]


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
