"""What only a GPU can show: the outputs of a CPU, training in every precision, and the Triton kernels in bfloat16.

Outputs are compared in full precision. TF32, with 10 bits of a product's factors, has a test of its own.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from test_memory import gradients
from test_train import RECIPE
from torch.nn.functional import cross_entropy

from sret import SReT
from sret.checkpoints.state import load_state
from sret.kernels.gpu.dispatch import triton_kernels
from sret.layers import LearnableResidual
from sret.models.fuse import fuse
from sret.training.config import RuntimeConfig
from sret.training.loop import train
from sret.training.run_dir import METRICS, STATE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Within this context convolutions and matrix products of float32 may use TF32, or may not."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = is_allowed
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    with tf32(False):
        yield


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_outputs_of_a_gpu_equal_those_of_a_cpu(permutation):
    model, images = SReT(small_config(permutation=permutation)).eval(), torch.randn(3, 3, 64, 80)
    expected = model(images).detach()
    for net in (model.cuda(), fuse(model)):
        with torch.no_grad():
            torch.testing.assert_close(net(images.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_tf32_is_as_exact_as_its_ten_bits():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs compute capability 8.0")
    model, images = SReT(small_config()).eval(), torch.randn(3, 3, 64, 80)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        errors = {}
        for is_allowed in (False, True):
            with tf32(is_allowed):
                found = model.cuda()(images.cuda()).cpu()
            errors[is_allowed] = ((found - expected).norm() / expected.norm()).item()
    assert errors[False] < 1e-5
    assert 2 * errors[False] < errors[True] < 1e-2


@pytest.mark.parametrize("policy", ["pass", "nested", "reversible"])
def test_gradients_are_those_of_no_policy(policy):
    config = small_config(drop_path_rate=0.4, reversible=policy == "reversible")
    model, images = SReT(config).cuda().double().train(), torch.randn(4, 3, 64, 80).cuda().double()
    expected, *_ = gradients(model, "none", images)
    found, *_ = gradients(model, policy, images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("runtime", [RuntimeConfig(), RuntimeConfig(grad_accum_steps=2, num_workers=2)])
def test_every_precision_trains_and_resumes(tmp_path: Path, mixed_precision, runtime):
    recipe = replace(RECIPE, epochs=6, mixed_precision=mixed_precision, mixup=0.2, cutmix=1.0, ema_decay=0.9)
    train(recipe, tmp_path, max_steps=9, runtime=runtime)
    assert (load_state(tmp_path / STATE)["scaler"] is not None) == (mixed_precision == "fp16")
    train(recipe, tmp_path, resume="auto", runtime=runtime)
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 7))
    assert rows[-1]["val_loss"] < 0.95 * rows[0]["val_loss"]


# Triton kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _needs_triton() -> None:
    model = SReT(small_config()).to("cuda", torch.bfloat16)
    residual = next(module for module in model.modules() if isinstance(module, LearnableResidual))
    with triton_kernels(True):
        reason = residual.triton_refusal(torch.zeros(1, 16, 16, device="cuda", dtype=torch.bfloat16))
    if reason is not None:
        pytest.skip(reason)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this context `torch.empty` returns NaN, so that an output that a kernel did not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def stirred(**changes: object) -> SReT:
    """A model in which no coefficient or bias has its initial value."""
    model = SReT(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


DEVICE, DTYPE = "cuda", torch.bfloat16
CASES = [("random", 64), ("strided", 64), ("random", 72)]  # 72 pixels: slices of unequal length


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("_needs_triton")
@pytest.mark.parametrize(("permutation", "pixels"), CASES)
def test_outputs_of_the_triton_kernels_are_as_exact_as_those_of_the_formula(permutation, pixels):
    model, images = stirred(permutation=permutation).eval(), torch.randn(4, 3, pixels, pixels)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        model, errors = fuse(model).to(DEVICE, DTYPE), {}
        for is_enabled in (False, True):
            with triton_kernels(is_enabled), poisoned():
                errors[is_enabled] = relative_error(model(images.to(DEVICE, DTYPE)), expected)
    assert errors[True] < 1.5 * errors[False]


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("_needs_triton")
@pytest.mark.parametrize(("permutation", "pixels"), CASES)
def test_gradients_of_the_triton_kernels_are_as_exact_as_those_of_the_formula(permutation, pixels):
    model, images = stirred(permutation=permutation).train(), torch.randn(8, 3, pixels, pixels)
    labels = torch.arange(8) % 10

    def gradients(model: SReT, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(model).to(device, dtype)
        model.permuter.load_state_dict({"seed": 0, "count": 0})
        with torch.autocast(device, DTYPE, enabled=torch.float32 == dtype != DTYPE):
            loss = cross_entropy(model(images.to(device, dtype)).to(dtype), labels.to(device))
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, errors = gradients(model, "cpu", torch.float64), {}
    for is_enabled in (False, True):
        with triton_kernels(is_enabled), poisoned():
            found = gradients(model, DEVICE, torch.float32)
        errors[is_enabled] = {name: relative_error(grad, expected[name]) for name, grad in found.items()}
    for name, error in errors[True].items():
        assert error < 2 * errors[False][name] + 0.01, name
    total = {is_enabled: sum(values.values()) for is_enabled, values in errors.items()}
    assert total[True] < 1.25 * total[False]


@pytest.mark.usefixtures("_needs_triton")
def test_a_cuda_graph_of_the_triton_kernels_sees_changed_weights():
    model = stirred().eval().to("cuda", torch.bfloat16).requires_grad_(False)
    images = torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    with triton_kernels(True), torch.no_grad():
        for _ in range(2):
            expected = model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(images)
        graph.replay()
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        expected = model(images)
        graph.replay()
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.usefixtures("_needs_triton")
def test_training_with_the_triton_kernels_learns_as_much_as_without(tmp_path: Path):
    recipe = replace(RECIPE, epochs=6, mixed_precision="bf16")
    losses = {}
    for is_enabled in (False, True):
        with triton_kernels(is_enabled):
            train(recipe, tmp_path / str(is_enabled))
        rows = [json.loads(line) for line in (tmp_path / str(is_enabled) / METRICS).read_text().splitlines()]
        assert rows[-1]["val_loss"] < 0.95 * rows[0]["val_loss"]
        losses[is_enabled] = rows[-1]["val_loss"]
    assert losses[True] < 1.1 * losses[False]


# a CUDA graph of forward and backward ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(("precision", "kernels"), [("no", False), ("bf16", True)])
def test_training_with_a_cuda_graph_is_training_without(tmp_path: Path, request, precision, kernels):
    if kernels:
        request.getfixturevalue("_needs_triton")
    recipe = replace(RECIPE, epochs=2, optimizer="sgd", mixed_precision=precision)
    states = []
    with triton_kernels(kernels):
        # Loading processes, since a thread then pins memory during the capture.
        for name, runtime in (("plain", RuntimeConfig()), ("graph", RuntimeConfig(cuda_graph=True, num_workers=2))):
            train(recipe, tmp_path / name, runtime=runtime)
            states.append(load_state(tmp_path / name / STATE)["model"])
    torch.testing.assert_close(states[1], states[0], atol=1e-3, rtol=1e-3)


# compiled passes, last because they take the longest -----------------------------------------------------------------


@pytest.mark.parametrize("memory", ["none", "nested"])
def test_compiled_passes_train_as_plain_ones(tmp_path: Path, memory):
    recipe = replace(RECIPE, epochs=2, optimizer="sgd", learning_rate=1e-2, model=replace(RECIPE.model, memory=memory))
    states = []
    for name, runtime in (("plain", RuntimeConfig()), ("compiled", RuntimeConfig(compile=True))):
        train(recipe, tmp_path / name, max_steps=3, runtime=runtime)
        states.append(load_state(tmp_path / name / STATE)["model"])
    torch.testing.assert_close(states[1], states[0], atol=1e-3, rtol=1e-3)
