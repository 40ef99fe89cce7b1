"""Every fast path gives the answers and gradients of the authors' arithmetic, and does no more work than it says."""

import copy
import os
import pickle
import sys
from collections import Counter
from typing import Any

import processes
import pytest
import timm
import torch
from conftest import small_config
from naive import Naive
from torch.utils._python_dispatch import TorchDispatchMode

from sret import ModelConfig, SReT, StageConfig
from sret.checkpoints.card import Card, load_weights, save_weights
from sret.data.preprocess import Preprocessing
from sret.kernels.attention import attend, formula
from sret.layers import AttentionResidual, Block, NonLinearProjection, Permuter, StridedPermutation
from sret.layers.block import one_pass
from sret.models.fuse import fuse


def lively(model: SReT) -> SReT:
    """Coefficients, norms and statistics of a trained model instead of ones and zeros."""
    for name, parameter in model.named_parameters():
        if name.endswith(("alpha", "beta")):
            torch.nn.init.uniform_(parameter, 0.6, 1.4)
        elif parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data += name.endswith("weight")
    for norm in (model.stem.bn1, model.stem.bn2, model.stem.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def many_passes(**changes: Any) -> ModelConfig:
    stage = StageConfig(embed_dim=24, num_heads=3, num_blocks=2, groups=(4, 3, 1, 2, 4), projection_ratio=1.5)
    return ModelConfig(**{"stages": (stage, stage), "img_size": 64, "num_classes": 10, **changes})


CASES = {
    "small": small_config(),
    "strided": small_config(permutation="strided"),
    "many passes": many_passes(),
    "many strided passes": many_passes(permutation="strided"),
    "no coefficients": small_config(learnable_residual=False),
    "no projections": ModelConfig(
        stages=(StageConfig(embed_dim=16, num_heads=2, num_blocks=2, groups=(4, 2), projection_ratio=None),),
        num_classes=10,
    ),
}
SIZES = [(64, 64), (80, 56)]  # of slices that are equal, and that are not


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_oracles(case, size):
    model = lively(SReT(CASES[case])).double()
    x = torch.randn(3, 3, *size, dtype=torch.double)
    grads = []
    for net in (model, Naive(model)):
        model.zero_grad()
        logits = net(x)
        logits.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    expected = logits.detach()
    with torch.no_grad():
        for answer in (model(x), fuse(model)(x)):
            torch.testing.assert_close(answer, expected, atol=1e-10, rtol=1e-10)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-9, rtol=1e-8, msg=name)


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_a_training_step_is_the_oracles(permutation):
    """Stochastic depth, fresh permutations and batch statistics included."""
    model = lively(SReT(small_config(permutation=permutation, drop_path_rate=0.5))).double().train()
    x = torch.randn(6, 3, 64, 64, dtype=torch.double)
    grads = []
    for net in (model, Naive(model)):
        model.zero_grad()
        model.permuter.load_state_dict({"seed": 3, "count": 0})
        torch.manual_seed(4)
        net(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@pytest.fixture(params=["small products as measured", "all products fused"])
def _kernels(request, monkeypatch):
    if request.param == "all products fused":
        monkeypatch.setattr("sret.kernels.linear.FUSED_MACS", 0)
        monkeypatch.setattr("sret.kernels.linear.FUSED_ROWS", 0)


# Those that differ in what is computed: slices, uneven ones even at 64 pixels, channels that are no power of two.
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("variant", "permutation"),
    [
        ("sret_t", "random"),
        ("sret_t", "strided"),
        ("sret_t_unsliced", "random"),
        ("sret_lt_16_14_1", "strided"),
        ("sret_s", "random"),
    ],
)
def test_published_models_in_float32(variant, permutation):
    model = lively(timm.create_model(variant, num_classes=10, permutation=permutation))
    fused = fuse(model)
    for size in ((64, 64), (104, 88)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = Naive(model)(x)
            scale = expected.abs().max()
            for net in (model, fused):
                assert (net(x) - expected).abs().max() <= 1e-5 * scale
        assert (model(x) - expected).abs().max() <= 1e-5 * scale  # the path that remembers for backward


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_bfloat16_is_as_near_as_the_oracle_in_bfloat16(permutation):
    model = lively(SReT(small_config(permutation=permutation)))
    x = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        exact = Naive(model)(x)
        rounded = copy.deepcopy(model).bfloat16()
        plain = (Naive(rounded)(x.bfloat16()) - exact).abs().mean()
        for net in (rounded, fuse(model).bfloat16()):
            assert (net(x.bfloat16()) - exact).abs().mean() <= 1.2 * plain


def test_bfloat16_gradients_are_as_near_as_the_oracles():
    model = lively(SReT(small_config()))
    x = torch.randn(16, 3, 64, 64)
    grads = []
    for net, is_rounded in ((Naive(model), False), (Naive(model), True), (model, True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
            logits = net(x)
        logits.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, plain, ours = grads
    assert (ours - exact).norm() <= 1.2 * (plain - exact).norm()


@pytest.mark.parametrize("tokens", [1, 7, 98, 400])
def test_attention_in_half_precision_learns_as_its_formula(tokens):
    qkv = torch.randn(3, 5, 2, tokens, 8)
    grads = []
    for f, given in ((formula, qkv), (formula, qkv.bfloat16()), (attend, qkv.bfloat16())):
        given = given.clone().requires_grad_()
        f(*given.unbind(0)).float().square().sum().backward()
        grads.append(given.grad.float())
    exact, plain, ours = grads
    assert (ours - exact).norm() <= 1.2 * (plain - exact).norm() + 1e-6


# fuse


def test_fusing_leaves_the_model_alone_and_removes_what_it_folded():
    model = lively(SReT(small_config()))
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    gone = before.keys() - fused.state_dict().keys()
    assert gone == {key for key in before if ".bn" in key or key.endswith("beta")}
    assert not fused.training
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    again = fuse(fused)
    assert all(torch.equal(tensor, fused.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_a_fused_model_is_saved_and_loaded(tmp_path):
    fused, x = fuse(lively(SReT(small_config()))), torch.randn(2, 3, 64, 64)
    preprocessing = Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    card = Card(config=fused.config, preprocessing=preprocessing, is_fused=True)
    save_weights(tmp_path / "fused.safetensors", fused.state_dict(), card)
    loaded, again = load_weights(tmp_path / "fused.safetensors")
    assert again == card
    with torch.no_grad():
        assert torch.equal(loaded(x), fused(x))


def test_what_is_changed_in_a_fused_model_counts():
    """A pass is looked up once; a new weight, a new layer, a hook and the end of a hook are seen all the same."""
    fused, x = fuse(lively(SReT(small_config()))), torch.randn(2, 3, 64, 64)
    mlp = fused.stages[1].recursions[0].block.mlp
    with torch.no_grad():
        before = fused(x)
        calls = []
        handle = mlp.branch.fc1.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(fused(x), before, atol=1e-5, rtol=1e-5)
        assert len(calls) == 2  # passes
        handle.remove()
        assert torch.equal(fused(x), before)
        assert len(calls) == 2
        weight = mlp.branch.fc1.weight
        mlp.branch.fc1.weight = torch.nn.Parameter(torch.zeros_like(weight), requires_grad=False)
        changed = fused(x)
        assert not torch.allclose(changed, before, atol=1e-3)
        mlp.branch.fc1 = torch.nn.Linear(*reversed(weight.shape))
        again = fused(x)
        assert not torch.allclose(again, changed, atol=1e-4)
        mlp.alpha.fill_(0.0)
        assert not torch.allclose(fused(x), again, atol=1e-4)


def test_a_fused_model_gives_gradients_of_its_input_after_a_call_without():
    model = lively(SReT(small_config()))
    fused, x = fuse(model), torch.randn(2, 3, 64, 64, requires_grad=True)
    with torch.inference_mode():
        fused(x)
    grads = []
    for net in (fused, model):
        (grad,) = torch.autograd.grad(net(x).square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


def test_fused_models_are_copied_pickled_and_cast():
    fused, x = fuse(lively(SReT(small_config()))), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = fused(x)
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(copied(x), expected)
        torch.testing.assert_close(fused.double()(x.double()).float(), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_of_another_kind_keeps_its_coefficient():
    model, x = lively(SReT(small_config())), torch.randn(2, 3, 64, 64)
    mlp = model.stages[0].recursions[0].block.mlp
    mlp.branch.fc2 = torch.nn.Sequential(mlp.branch.fc2)
    fused = fuse(model)
    assert fused.stages[0].recursions[0].block.mlp.beta is not None
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-5)


# what the fast paths do not know


def changed_activation(model: SReT) -> None:
    mlp = model.stages[1].recursions[0].block.mlp
    mlp.branch = timm.layers.Mlp(32, 64, act_layer=torch.nn.ReLU)


def patched_forward(model: SReT) -> None:
    layer = model.stages[1].recursions[0].block.mlp.branch.fc2
    layer.forward = lambda x: torch.zeros(*x.shape[:-1], 32)


def no_bias(model: SReT) -> None:
    model.stages[1].recursions[0].block.attn.branch.qkv = torch.nn.Linear(32, 96, bias=False)


def other_epsilon(model: SReT) -> None:
    model.stages[1].recursions[0].block.attn.norm.eps = 10.0


def stochastic_depth(model: SReT) -> None:
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.train()


@pytest.mark.parametrize("change", [changed_activation, patched_forward, no_bias, other_epsilon, stochastic_depth])
def test_a_changed_model_gives_changed_outputs(change):
    """Before and after the lines of its passes were made; the path for gradients and that without agree."""
    model, x = lively(SReT(small_config(drop_path_rate=0.5))), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
    change(model)
    torch.manual_seed(1)
    expected = model(x).detach()
    torch.manual_seed(1)
    with torch.no_grad():
        answer = model(x)
    assert not torch.allclose(answer, before, atol=1e-3)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_gradient", [True, False])
def test_global_hooks_see_every_layer(has_gradient):
    model, seen = SReT(small_config()).eval(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with handle, torch.set_grad_enabled(has_gradient):
        model(torch.randn(1, 3, 64, 64))
    linear = [module for module in seen if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 8 * 6 + 1  # a pass has six, the head is one


def test_what_a_hook_kept_of_the_stem_stays(model, image):
    kept = []
    model.stem.bn1.register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    model(image)
    assert kept[0].min() < 0


@pytest.mark.parametrize("has_gradient", [True, False])
def test_shapes_without_numbers(has_gradient):
    with torch.device("meta"), torch.set_grad_enabled(has_gradient):
        assert SReT(small_config()).eval()(torch.empty(2, 3, 64, 64)).shape == (2, 10)


def test_gradients_of_each_sample_by_functional_transforms():
    model, x = SReT(small_config(permutation="strided")).double().eval(), torch.randn(3, 3, 64, 64).double()
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name].sum(0), parameter.grad, msg=name)


@pytest.mark.slow
def test_a_processor_without_avx512_computes_in_bfloat16():
    code = (
        "import torch, timm, sret; m = sret.fuse(timm.create_model('sret_t', num_classes=3)).bfloat16()\n"
        "with torch.no_grad(): print(m(torch.randn(2, 3, 64, 64).bfloat16()).isfinite().all().item())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = processes.run([sys.executable, "-c", code], env=environment)
    assert done.stdout.strip() == "True", done.stderr[-500:]


# what is done


class Calls(TorchDispatchMode):
    """Counts kernels, by name; what only looks at memory in another way is no kernel."""

    VIEWS = (
        "view",
        "_unsafe_view",
        "transpose",
        "permute",
        "select",
        "unbind",
        "split",
        "expand",
        "slice",
        "t",
        "empty",
    )
    VIEWS += ("as_strided", "detach", "unsqueeze", "alias", "squeeze")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "contiguous", "index_select", "index", "gather"}


@torch.no_grad()
def calls_of(
    num_groups: int, permutation: Any, num_tokens: int = 64, dtype: torch.dtype = torch.float32
) -> Counter[str]:
    block, projection = Block(16, 2).to(dtype), NonLinearProjection(16).to(dtype)
    for module in (block.attn, block.mlp, projection):
        module.fold()
    with Calls() as calls:
        x = torch.randn(2, num_tokens, 16, dtype=dtype)
        one_pass(block.eval(), projection.eval(), x, num_groups, permutation)
    return calls.names - Counter({"randn": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_groups", "permutation"), [(1, None), (8, None), (8, StridedPermutation(8))])
def test_a_pass_is_thirteen_kernels_and_no_copy(num_groups, permutation, dtype):
    """Three norms, six products (biases and GELUs within), three sums, one attention for all slices and heads."""
    calls = calls_of(num_groups, permutation, dtype=dtype)
    if num_groups > 1 and permutation is not None:
        calls.subtract({"clone": 2})  # the rows of the qkv layer's weight and bias, in another order
    calls = +calls
    assert not COPIES & calls.keys(), calls
    attention = sum(count for name, count in calls.items() if "attention" in name)
    gelus = calls["gelu"]  # where the processor has no product with a GELU
    assert attention == 1
    assert sum(calls.values()) - gelus == 13, calls


def test_a_gathered_permutation_costs_two_gathers():
    permutation = Permuter()(64, 8, torch.device("cpu"), is_training=False)
    calls = calls_of(8, permutation)
    assert calls["index_select"] == 2


def test_uneven_slices_cost_two_attention_calls():
    assert sum(count for name, count in calls_of(8, None, num_tokens=67).items() if "attention" in name) == 2


def test_the_guard_sees_a_copy():
    residual = AttentionResidual(16, 2)
    with torch.no_grad(), Calls() as calls:
        residual(torch.randn(2, 64, 16).transpose(0, 1).contiguous().transpose(0, 1), 8, StridedPermutation(8))
    assert calls.names["clone"] > 2


# compiled


@pytest.mark.slow
def test_a_compiled_pass_has_the_outputs_and_gradients_of_the_plain_one():
    model = lively(SReT(small_config(permutation="strided"))).train()
    compiled = copy.deepcopy(model)
    compiled.compile()
    x = torch.randn(4, 3, 64, 64)
    for net in (model, compiled):
        net(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-6, name
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(copy.deepcopy(compiled)(x), model(x))  # a copy is plain again


@pytest.mark.slow
def test_the_number_of_compiled_graphs_does_not_grow_with_depth():
    graphs = []
    for num_passes in (2, 9):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        stage = StageConfig(embed_dim=16, num_heads=2, num_blocks=2, groups=(2,) * num_passes)
        model = SReT(ModelConfig(stages=(stage,), img_size=32, num_classes=3, permutation="strided")).eval()
        model.compile(backend="eager")
        model(torch.randn(2, 3, 32, 32))
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == 2  # the first pass, and those that permute
