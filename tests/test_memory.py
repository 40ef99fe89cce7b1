"""Every exact policy gives the gradients of no policy; the schedule is the best there is; and what each keeps."""

import gc
import weakref
from dataclasses import replace
from functools import cache

import pytest
import reference
import torch
from conftest import small_config
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from sret import InputError, ModelConfig, SReT, StageConfig
from sret.kernels.checkpointing import CheckpointPolicy, kept_steps, min_kept, split
from sret.kernels.recompute import Chain, recomputed
from sret.layers import (
    Block,
    Coefficients,
    IndexPermutation,
    NonLinearProjection,
    Recursion,
    ReversibleRecursion,
)

DIM, TOKENS = 24, 28
X = torch.randn(3, TOKENS, DIM, dtype=torch.double)
GROUPS = (4, 2, 1, 7, 3, 1, 4, 2, 2, 1, 5)


def deep(**changes: object) -> SReT:
    """Sliced, permuted passes with stochastic depth in float64; eleven of them, then two blocks of five."""
    stages = (
        StageConfig(embed_dim=16, num_heads=2, num_blocks=1, groups=GROUPS, mlp_ratio=2.0, projection_ratio=0.5),
        StageConfig(embed_dim=32, num_heads=2, num_blocks=2, groups=(2, 1, 4, 2, 2), mlp_ratio=2.0),
    )
    config = ModelConfig(stages=stages, img_size=48, num_classes=5, drop_path_rate=0.4, residual_scale="sqrt")
    return SReT(replace(config, **changes)).double().train()


def gradients(model: SReT, policy: str, image: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Of a loss, the loss, and the next number of the global generator, from one and the same start."""
    model.set_memory(policy)
    model.zero_grad()
    torch.manual_seed(5)
    model.permuter.load_state_dict({"seed": 1, "count": 0})
    loss = model(image).square().sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, loss.detach(), torch.rand(1)


BEFORE_NORM = "stem.conv"  # biases before BatchNorm: their gradients are nothing but rounding
IMAGE = torch.randn(4, 3, 48, 40, dtype=torch.double)


@pytest.mark.parametrize("permutation", ["random", "strided"])
@pytest.mark.parametrize("policy", ["pass", "nested", "reversible"])
def test_gradients_are_those_of_no_policy(policy, permutation):
    """With permutations and stochastic depth replayed, and the generator left where it was."""
    model = deep(permutation=permutation, reversible=policy == "reversible")
    expected, loss, after = gradients(model, "none", IMAGE)
    found, same_loss, same_after = gradients(model, policy, IMAGE)
    assert torch.equal(loss, same_loss)
    assert torch.equal(after, same_after)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-9 or BEFORE_NORM in name, name
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("policy", ["pass", "nested"])
def test_dropout_is_replayed(policy):
    """As a projection, where it meets every pass."""
    module = Recursion(Block(DIM, 3), (1,) * 6, [nn.Dropout(0.3) for _ in range(6)]).double()
    found = []
    for name in ("none", policy):
        module.policy = CheckpointPolicy.parse(name)
        module.zero_grad()
        torch.manual_seed(3)
        x = X.clone().requires_grad_()
        module(x, [None] * 6).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("frozen", ["stem", "stages.0", "stages.0.recursions.0.block", "stages.1.recursions.1"])
@pytest.mark.parametrize("policy", ["nested", "reversible"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(policy, frozen):
    model = deep(reversible=policy == "reversible")
    model.get_submodule(frozen).requires_grad_(False)
    expected, *_ = gradients(model, "none", IMAGE)
    found, *_ = gradients(model, policy, IMAGE)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("policy", ["none", "pass", "nested", "truncated:2"])
def test_a_gradient_of_the_image_alone_is_the_same(policy):
    model = deep().eval().requires_grad_(False)
    model.set_memory(policy)
    image = IMAGE.clone().requires_grad_()
    model(image).square().sum().backward()
    expected = IMAGE.clone().requires_grad_()
    model.set_memory("none")
    model(expected).square().sum().backward()
    assert (image.grad.abs().max() > 0) == (expected.grad.abs().max() > 0)
    if policy != "truncated:2":
        torch.testing.assert_close(image.grad, expected.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("policy", ["nested", "reversible"])
def test_autocast_stands_in_backward_as_it_stood_in_forward(policy):
    model = deep(reversible=policy == "reversible").float()
    found = []
    for name in ("none", policy):
        model.set_memory(name)
        model.zero_grad()
        torch.manual_seed(5)
        model.permuter.load_state_dict({"seed": 1, "count": 0})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IMAGE.float()).float().square().sum()
        loss.backward()  # outside, as usual
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        if BEFORE_NORM in name:
            continue
        difference = (found[1][name] - gradient).norm() / gradient.norm()
        assert difference < 0.05, name


def test_truncated_gradients_are_those_of_a_stream_to_which_first_passes_add_constants():
    model = deep(drop_path_rate=0.0)
    found, loss, _ = gradients(model, "truncated:2", IMAGE)
    for module in model.modules():
        if isinstance(module, Recursion):
            module.forward = _cut_off(module, 2)
    expected, same_loss, _ = gradients(model, "none", IMAGE)
    torch.testing.assert_close(loss, same_loss)
    for name, gradient in found.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=1e-10, msg=name)
    assert not found["stages.0.recursions.0.projections.8.branch.fc1.weight"].any()
    assert found["stages.0.recursions.0.projections.9.branch.fc1.weight"].any()
    assert found["stem.conv1.weight"].any()


def _cut_off(module: Recursion, passes: int):
    def forward(x, permutations):
        y = x
        for i, permutation in enumerate(permutations):
            if i == len(permutations) - passes:
                y = x + (y - x).detach()
            y = module.projections[i](module.block(y, module.groups[i], permutation))
        return y

    return forward


def test_more_passes_than_there_are_truncate_nothing():
    model = deep()
    expected, *_ = gradients(model, "none", IMAGE)
    found, *_ = gradients(model, "truncated:11", IMAGE)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


# two streams ----------------------------------------------------------------------------------------------------------


def two_streams(num_passes: int, has_projection: bool = True) -> ReversibleRecursion:
    coefficients = Coefficients(is_stream_learnable=False, scale=0.5)
    projections = [
        NonLinearProjection(DIM, 0.5, coefficients) if has_projection else nn.Identity() for _ in range(num_passes)
    ]
    block = Block(DIM, 3, 2.0, coefficients=coefficients)
    return ReversibleRecursion(block, (4, 2, 1)[:num_passes], projections).double()


@pytest.mark.parametrize("has_projection", [True, False])
def test_two_streams_take_turns(has_projection):
    module = two_streams(3, has_projection)
    permutations = [None, IndexPermutation(torch.randperm(TOKENS)), None]
    torch.testing.assert_close(module(X, permutations), reference.two_streams(module, X, permutations))


def test_two_streams_are_not_one():
    module = two_streams(2)
    one = Recursion(module.block, module.groups, list(module.projections))
    assert (module(X, [None] * 2) - one(X, [None] * 2)).abs().max() > 1e-3


def test_a_reversible_model_has_no_coefficient_of_the_stream():
    names = [name for name, _ in deep(reversible=True).named_parameters()]
    assert not [name for name in names if name.endswith("alpha")]
    assert [name for name in names if name.endswith("beta")]


# the schedule ---------------------------------------------------------------------------------------------------------


@cache
def fewest_steps(num_steps: int, slots: int) -> int:
    """The oracle: the fewest steps run ahead to reverse a chain whose first input is kept, by trying every split."""
    if num_steps == 1:
        return 0
    if slots == 1:
        return num_steps * (num_steps - 1) // 2
    return min(m + fewest_steps(num_steps - m, slots - 1) + fewest_steps(m, slots) for m in range(1, num_steps))


def steps_of_schedule(num_steps: int, slots: int) -> int:
    if num_steps == 1:
        return 0
    if slots == 1:
        return num_steps * (num_steps - 1) // 2
    m = split(num_steps, slots)
    return m + steps_of_schedule(num_steps - m, slots - 1) + steps_of_schedule(m, slots)


def test_the_schedule_is_the_best_there_is():
    for num_steps in range(1, 60):
        for slots in range(1, 12):
            assert steps_of_schedule(num_steps, slots) == fewest_steps(num_steps, slots), (num_steps, slots)


def test_slots_are_the_square_root_or_the_logarithm():
    assert min_kept(1008, 2) == 44  # the square root of 2016
    assert min_kept(1008, 10) == 5
    assert [min_kept(n, 2) for n in (1, 2, 3, 6)] == [1, 1, 1, 2]
    assert kept_steps(6, 3)[0] == 0
    assert len(kept_steps(1008, 44)) == 44
    assert kept_steps(5, 9) == [0, 1, 2, 3, 4]  # no more inputs than steps


@pytest.mark.parametrize(("num_steps", "slots"), [(1, 1), (2, 1), (7, 7), (40, 3), (100, 6), (60, 59)])
def test_no_more_inputs_live_than_slots(num_steps, slots):
    """And steps are run as often as the schedule says: once in forward, then as few times as can be."""
    seen: dict[int, weakref.ref[Tensor]] = {}
    most, calls = 0, 0

    def step(i: int, x: Tensor) -> Tensor:
        nonlocal most, calls
        calls += 1
        seen[id(x)] = weakref.ref(x)
        most = max(most, sum(ref() is not None for ref in seen.values()))
        return torch.sin(x * (1 + i / num_steps))

    x = torch.randn(3, dtype=torch.double, requires_grad=True)
    y = recomputed(Chain(step, lambda: [[]] * num_steps, nn.Identity()), slots, x)
    assert calls == num_steps
    y.sum().backward()
    gc.collect()
    assert most <= slots + 2  # with the input of the step at work, and the leaf
    assert calls == 2 * num_steps + steps_of_schedule(num_steps, slots) - kept_steps(num_steps, slots)[-1]
    expected = x.detach().clone().requires_grad_()
    z = expected
    for i in range(num_steps):
        z = torch.sin(z * (1 + i / num_steps))
    z.sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, atol=1e-12, rtol=1e-12)


# what cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("nestd", "memory 'nestd' is not a policy; .*; did you mean 'nested'"),
        ("", "memory '' is not a policy; use none, pass"),
        ("pass:3", "'pass' takes no argument"),
        ("nested:512MiB", "'nested' takes no argument"),
        ("nested:", "'nested' takes no argument"),
        ("truncated", "needs a number of passes, at least 1, such as 'truncated:4'"),
        ("truncated:0", "needs a number of passes, at least 1"),
        ("reversible", "needs a two-stream model.*use 'nested'"),
    ],
)
def test_an_invalid_policy_names_a_valid_one(policy, message):
    with pytest.raises(InputError, match=message):
        small_config(memory=policy)
    with pytest.raises(InputError, match=message):
        deep().set_memory(policy)


def test_a_reversible_model_refuses_the_policies_of_one_stream():
    with pytest.raises(InputError, match=r"'nested' .* set memory to 'reversible'"):
        small_config(memory="nested", reversible=True)


def test_pass_keeps_every_input_and_nested_the_square_root():
    assert CheckpointPolicy.parse("nested").num_kept(1008) == 44
    assert CheckpointPolicy.parse("pass").num_kept(1008) == 1008


@pytest.mark.parametrize("policy", ["nested", "reversible"])
def test_a_second_backward_is_refused_not_wrong(policy):
    model = deep(reversible=policy == "reversible")
    model.set_memory(policy)
    loss = model(IMAGE).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run a second time; use memory 'none'"):
        loss.backward()


@pytest.mark.parametrize("policy", ["nested", "reversible"])
def test_weights_that_change_before_backward_are_refused_not_wrong(policy):
    model = deep(reversible=policy == "reversible")
    model.set_memory(policy)
    loss = model(IMAGE).sum()
    block = model.stages[1].recursions[0].block
    with torch.no_grad():
        block.mlp.branch.fc1.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = model(IMAGE).sum()
    block.mlp.branch.fc1.weight = nn.Parameter(torch.zeros_like(block.mlp.branch.fc1.weight))
    with pytest.raises(RuntimeError, match="weights of a recursion were replaced"):
        loss.backward()


def test_a_step_leaves_no_garbage_for_the_collector():
    model, images = deep(memory="nested"), torch.randn(2, 3, 48, 48, dtype=torch.double)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            model(images).sum().backward()
        alive = [x for x in gc.get_objects() if type(x).__name__ in ("Recomputation", "_RecomputedBackward")]
    finally:
        gc.enable()
    assert alive == []


def test_transforms_take_the_plain_way():
    """torch.func differentiates formulas, and not what is computed again."""
    model = deep(drop_path_rate=0.0).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (IMAGE[:1],)).square().sum()

    expected = torch.func.grad(loss)(weights)
    model.set_memory("nested")
    found = torch.func.grad(loss)(weights)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_evaluation_and_weights_know_no_policy():
    model, image = deep().eval(), IMAGE
    with torch.no_grad():
        expected = model(image)
        for policy in ("pass", "nested", "truncated:1"):
            model.set_memory(policy)
            assert torch.equal(model(image), expected)
    assert deep(memory="nested").state_dict().keys() == deep().state_dict().keys()


@pytest.mark.parametrize("policy", ["nested", "reversible"])
def test_a_hook_of_a_weight_sees_its_whole_gradient_once(policy):
    model, heard = deep(reversible=policy == "reversible"), []
    weight = model.stages[0].recursions[0].block.mlp.branch.fc1.weight
    weight.register_hook(lambda gradient: heard.append(gradient.clone()) or 2 * gradient)
    expected, *_ = gradients(model, "none", IMAGE)
    found, *_ = gradients(model, policy, IMAGE)
    assert len(heard) == 2
    name = "stages.0.recursions.0.block.mlp.branch.fc1.weight"
    torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("policy", ["nested", "reversible"])
def test_what_would_get_no_gradient_or_another_is_refused(policy):
    model = deep(reversible=policy == "reversible")
    model.set_memory(policy)
    loss = model(IMAGE).sum()
    model.eval()
    with pytest.raises(RuntimeError, match="switched between training and evaluation mode"):
        loss.backward()
    prompt = torch.zeros(1, requires_grad=True)
    norm = model.stages[0].recursions[0].block.mlp.norm
    norm.register_forward_hook(lambda _, inputs, y: y + prompt)
    with pytest.raises(RuntimeError, match=r"uses a tensor of shape \(1,\) that requires a gradient"):
        model(IMAGE).sum().backward()


@pytest.mark.parametrize("changes", [{}, {"reversible": True}, {"learnable_residual": False}], ids=str)
def test_half_precision_does_not_round_small_steps_away(changes):
    """The stream stays in float32 under autocast; in bfloat16 a change of a thousandth would be lost."""
    passes = (1,) * 600
    narrow = StageConfig(embed_dim=16, num_heads=1, num_blocks=1, groups=(1,), projection_ratio=None)
    stages = (narrow, replace(narrow, embed_dim=32, groups=passes))
    config = ModelConfig(stages=stages, img_size=32, num_classes=5, residual_scale="passes")
    model, image = SReT(replace(config, **changes)).eval(), IMAGE[:, :, :32, :32].float()
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(image).float()
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("reversible", [False, True])
def test_tensors_without_values_have_gradients_without_values(reversible):
    """Shapes can be followed on the meta device, forwards and backwards."""
    config = replace(deep().config, reversible=reversible, permutation="strided")
    with torch.device("meta"):
        model = SReT(replace(config, memory="reversible" if reversible else "nested")).train()
        model(torch.empty(2, 3, 48, 48)).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("reversible", [False, True])
def test_fake_tensors_take_the_plain_way(reversible):
    config = replace(deep().config, reversible=reversible, permutation="strided")
    model = SReT(replace(config, memory="reversible" if reversible else "nested")).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(2, 3, 48, 48)).shape == (2, 5)


def test_a_reversible_recursion_refuses_what_it_cannot_add():
    module = two_streams(2)
    module.projections[0] = nn.Sequential(module.projections[0])
    with pytest.raises(InputError, match=r"must be residuals, .*, or nn\.Identity, not Sequential"):
        module(X, [None] * 2)
