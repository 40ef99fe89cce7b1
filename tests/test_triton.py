"""The Triton kernels compute the formula, forward and backward; here in Triton's interpreter, in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import small_config
from torch import nn

from sret.kernels.gpu import dispatch

pytest.importorskip("triton")
if not dispatch.is_interpreted():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from triton_offline import launches_of_a_pass, recorded_launches

from sret import SReT
from sret.kernels.gpu.dispatch import refusal, shared_packing, triton_kernels
from sret.kernels.gpu.mlp import PackedMlp
from sret.layers import Block, NonLinearProjection
from sret.layers.block import one_pass
from sret.layers.gpu_path import gpu_path
from sret.layers.mlp import MlpResidual
from sret.layers.permutation import IndexPermutation, Permutation, StridedPermutation
from sret.models.variants import config_of

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _kernels_are_on():
    with triton_kernels(True):
        yield


def index(num_tokens: int) -> Permutation:
    return IndexPermutation(torch.randperm(num_tokens))


class Reversed:
    """A permutation of a kind that the kernels do not know."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)

    undo = apply


def a_pass(C: int, H: int, mlp_ratio: float, projection: nn.Module, drop_prob: float = 0.0) -> nn.ModuleList:
    parts = nn.ModuleList([Block(C, H, mlp_ratio, drop_prob), projection])
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter += torch.randn_like(parameter) / 10
    return parts


CASES = {
    # Channels, heads, tokens, slices, permutation, MLP ratio, projection.
    "one slice": (16, 2, 20, 1, None, 2.3, NonLinearProjection(16)),
    "permuted": (24, 3, 20, 4, index(20), 1.5, NonLinearProjection(24, 0.4)),
    "uneven slices": (32, 1, 21, 4, index(21), 1.0, nn.Identity()),
    "strided": (16, 1, 35, 2, StridedPermutation(2), 1.0, NonLinearProjection(16)),
    "strided otherwise": (16, 1, 12, 2, StridedPermutation(3), 1.0, nn.Identity()),
    "unknown permutation": (16, 1, 12, 2, Reversed(), 1.0, nn.Identity()),
    "unaligned heads": (126, 3, 9, 2, index(9), 1.0, NonLinearProjection(126, 0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pass_without_gradients_is_the_formula(case):
    C, H, N, G, permutation, ratio, projection = CASES[case]
    parts, x = a_pass(C, H, ratio, projection).eval(), torch.randn(2, N, C)
    with triton_kernels(False), torch.no_grad():
        expected = one_pass(*copy.deepcopy(parts).double(), x.double(), G, permutation)
    with torch.no_grad():
        found = one_pass(*parts, x, G, permutation)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_passes_are_those_of_the_formula(case):
    C, H, N, G, permutation, ratio, projection = CASES[case]
    parts, x = a_pass(C, H, ratio, projection, drop_prob=0.4), torch.randn(3, N, C)
    direction = torch.randn(3, N, C)

    def gradients(parts: nn.ModuleList, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(3)  # of stochastic depth
        stream = x.to(dtype).requires_grad_()
        with shared_packing():
            y = one_pass(*parts, one_pass(*parts, stream, G, permutation), G, permutation)
        return [y, *torch.autograd.grad(y, [stream, *parts.parameters()], direction.to(dtype))]

    found = gradients(parts, torch.float32)
    with triton_kernels(False):
        # In float32, for the same random numbers of stochastic depth; its own error is as large.
        expected = gradients(parts, torch.float32)
    # A coefficient's gradient is a product of the stream and its gradient, which may cancel: it is rounded as they are.
    rounding = torch.finfo(torch.float32).eps * (x.norm() * direction.norm()).item()
    for a, b in zip(found, expected, strict=True):
        atol = max(1e-5 * b.detach().abs().max().item(), rounding if b.numel() == 1 else 0.0)
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["none", "pass", "nested"])
def test_a_model_has_the_outputs_and_gradients_of_the_formula(memory):
    config = small_config(permutation="random")
    model, images = SReT(replace(config, memory=memory)), torch.randn(1, 3, 64, 64)

    def step() -> list[torch.Tensor]:
        model.permuter.load_state_dict({"seed": 0, "count": 0})
        loss = model(images).square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    found = step()
    with triton_kernels(False):
        expected = step()
    largest = max(b.detach().abs().max().item() for b in expected)  # gradients of biases before a norm are rounding
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.detach().abs().max().item() + 1e-6 * largest, rtol=1e-3)


def test_changed_weights_are_packed_anew():
    residual, x = MlpResidual(16, 1.0).eval(), torch.randn(1, 16, 16)
    with torch.no_grad():
        residual(x)
        residual.branch.fc2.bias += 1
        found = residual(x)
        with triton_kernels(False):
            expected = residual(x)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_cuda_graph_packs_weights_that_may_change(is_fused, monkeypatch):
    residual, x = MlpResidual(16, 1.0).eval(), torch.randn(1, 16, 16)
    if is_fused:
        residual.fold()
    with torch.no_grad():
        residual(x)
        packs = []
        monkeypatch.setattr(PackedMlp, "of", lambda *args, of=PackedMlp.of: packs.append(args) or of(*args))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            residual(x)
    assert len(packs) == (0 if is_fused else 2)


def test_a_pass_is_three_kernels_without_gradients_and_five_with_as_many_for_backward():
    names = [kernel.fn.__name__ for kernel, _ in launches_of_a_pass(16, torch.float32)]
    assert names[:3] == ["_norm_linear", "_attend", "_rest"]
    # The projection's MLP launches the same two kernels again; the recorded step leaves it out.
    assert names[3:7] == ["_norm_linear", "_attend", "_proj_residual", "_forward"]
    assert names[7:] == ["_backward", "_proj_residual_backward", "_attend_backward", "_norm_linear_backward"]


def test_second_derivatives_are_refused_in_one_line():
    x = torch.randn(1, 8, 16, requires_grad=True)
    y = MlpResidual(16, 1.0)(x)
    with pytest.raises(RuntimeError, match="SRET_TRITON"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def launches(parts: nn.ModuleList, x: torch.Tensor) -> int:
    with recorded_launches() as found, torch.no_grad():
        one_pass(*parts, x, 1, None)
    return len(found)


def test_what_the_kernels_do_not_know_takes_the_formula():
    x = torch.randn(1, 8, 16)
    parts = a_pass(16, 2, 1.0, NonLinearProjection(16)).eval()
    assert launches(parts, x) == 3
    assert launches(copy.deepcopy(parts).double(), x.double()) == 0

    hooked = copy.deepcopy(parts)
    seen = []
    hooked[0].mlp.branch.fc1.register_forward_hook(lambda *_: seen.append(1))
    assert launches(hooked, x) == 4  # attention and the projection
    assert seen == [1]

    adapted = copy.deepcopy(parts)
    adapted[0].attn.branch.qkv = nn.Sequential(adapted[0].attn.branch.qkv)
    assert "adapted" in adapted[0].attn.weights_refusal()
    assert launches(adapted, x) == 2  # MLP and projection

    with triton_kernels(False):
        assert launches(parts, x) == 0
    assert torch.func.vmap(lambda y: one_pass(*parts, y, 1, None))(x[None]).shape == (1, 1, 8, 16)


@pytest.mark.parametrize("name", ["sret_t", "sret_s"])
def test_the_published_models_run_wholly_in_the_kernels(name):
    with torch.device("meta"):
        model = SReT(config_of(name))
    assert gpu_path(model).endswith("for 40 of 40 branches")
    residual = next(module for module in model.modules() if isinstance(module, MlpResidual))
    residual.norm = nn.Identity()
    assert gpu_path(model).endswith("for 39 of 40 branches; not for 1: its norm is a Identity, not a plain LayerNorm")
    with triton_kernels(False):
        assert "SRET_TRITON=1" in gpu_path(model)


def test_refusals_say_why(monkeypatch):
    x, weight = torch.zeros(1, 1, 16), torch.zeros(16, 16)
    assert refusal(x, weight, 16) is None
    assert "512 channels" in refusal(x, weight, 1024)
    assert refusal(x, weight, 512) is None
    assert "heads" in refusal(x, weight, 512, 2)
    assert "float64" in refusal(x.double(), weight.double(), 16)
    assert "empty" in refusal(x[:0], weight, 16)
    with triton_kernels(False):
        assert "SRET_TRITON=1" in MlpResidual(16, 1.0).triton_refusal(x)
    monkeypatch.delenv("TRITON_INTERPRET")
    dispatch.device_refusal.cache_clear()
    assert "NVIDIA" in MlpResidual(16, 1.0).triton_refusal(x)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0, this one has 7.5" in dispatch.device_refusal(torch.device("cuda"))
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    dispatch.device_refusal.cache_clear()
    assert "not installed" in dispatch.device_refusal(torch.device("cuda"))
    dispatch.device_refusal.cache_clear()
