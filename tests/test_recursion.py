import pytest
import reference
import torch
from torch import nn

from sret import InputError
from sret.layers import Block, IndexPermutation, NonLinearProjection, Recursion

DIM = 24


def recursion(groups: tuple[int, ...], has_projection: bool = True) -> Recursion:
    projections = [NonLinearProjection(DIM) if has_projection else nn.Identity() for _ in groups]
    return Recursion(Block(DIM, 3, mlp_ratio=2.0), groups, projections).double()


def permutations(module: Recursion, num_tokens: int) -> list[IndexPermutation | None]:
    return [
        IndexPermutation(torch.randperm(num_tokens)) if module.is_permuted(i) else None
        for i in range(len(module.groups))
    ]


X = torch.randn(2, 28, DIM, dtype=torch.double)


@pytest.mark.parametrize("groups", [(1,), (8, 2), (4, 2, 1), (1, 7, 3, 1, 2, 28, 5)])
def test_a_recursion_is_its_unrolled_copies(groups):
    module = recursion(groups)
    given = permutations(module, 28)
    torch.testing.assert_close(module(X, given), reference.Unrolled(module)(X, given))


def test_a_shared_weight_receives_the_sum_of_its_recursions():
    module = recursion((4, 2, 1))
    given = permutations(module, 28)
    unrolled = reference.Unrolled(module)
    for m in (module, unrolled):
        m(X, given).square().mean().backward()
    for name, parameter in module.block.named_parameters():
        total = sum(copy.get_parameter(name).grad for copy in unrolled.copies)
        torch.testing.assert_close(parameter.grad, total)
    for shared, own in zip(module.projections.parameters(), unrolled.projections.parameters(), strict=True):
        torch.testing.assert_close(shared.grad, own.grad)


def test_one_pass_is_the_block_followed_by_its_own_projection():
    module = recursion((4,))
    torch.testing.assert_close(module(X, [None]), module.projections[0](module.block(X, 4)))


def test_weights_do_not_grow_with_passes_unless_by_projections():
    def size(m: nn.Module) -> int:
        return sum(p.numel() for p in m.parameters())

    one, five = recursion((1,)), recursion((1,) * 5)
    assert size(five) - size(one) == 4 * size(one.projections[0])
    assert size(recursion((1,) * 5, has_projection=False)) == size(one.block)


def test_the_first_pass_and_unsliced_passes_are_not_permuted():
    module = recursion((8, 2, 1, 4))
    assert [module.is_permuted(i) for i in range(4)] == [False, True, False, True]


def test_a_projection_per_pass_is_required():
    with pytest.raises(InputError, match="2 passes"):
        Recursion(Block(DIM, 3), (1, 1), [nn.Identity()])
    with pytest.raises(InputError, match="at least one"):
        Recursion(Block(DIM, 3), (), [])


def test_the_projection_is_its_formula():
    nll = NonLinearProjection(DIM, 0.5).double()
    nn.init.constant_(nll.alpha, 0.7)
    nn.init.constant_(nll.beta, 1.3)
    h = nn.functional.layer_norm(X, (DIM,), nll.norm.weight, nll.norm.bias, 1e-6)
    h = nll.branch.fc2(nn.functional.gelu(nll.branch.fc1(h)))
    assert nll.branch.fc1.out_features == 12
    torch.testing.assert_close(nll(X), 0.7 * X + 1.3 * h)
