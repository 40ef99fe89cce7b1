import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sret import InputError
from sret.kernels import attention as kernels
from sret.kernels.slices import slice_lengths
from sret.layers import IndexPermutation, SlicedAttention, StridedPermutation


def attention(dim: int = 24, num_heads: int = 3) -> SlicedAttention:
    return SlicedAttention(dim, num_heads).double()


def tokens(n: int, dim: int = 24) -> torch.Tensor:
    return torch.randn(2, n, dim, dtype=torch.double)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 7, 13, 27, 28])
def test_slicing_is_full_attention_under_a_block_diagonal_mask(num_groups):
    attn, x = attention(), tokens(28)
    ids = reference.slice_ids(28, num_groups)
    torch.testing.assert_close(attn(x, num_groups), reference.masked_attention(attn, x, ids[:, None] == ids))


@pytest.mark.parametrize("num_groups", [1, 3, 4, 8])
def test_a_permutation_moves_tokens_between_slices_and_back(num_groups):
    attn, x = attention(), tokens(29)
    index = torch.randperm(29)
    ids = torch.empty(29, dtype=torch.long)
    ids[index] = reference.slice_ids(29, num_groups)  # the token at position i of the permuted sequence is index[i]
    expected = reference.masked_attention(attn, x, ids[:, None] == ids)
    torch.testing.assert_close(attn(x, num_groups, IndexPermutation(index)), expected)


@pytest.mark.parametrize(("num_tokens", "num_groups"), [(28, 4), (29, 4), (31, 4), (5, 5), (7, 4)])
def test_a_strided_slice_holds_every_gth_token(num_tokens, num_groups):
    attn, x = attention(), tokens(num_tokens)
    ids = torch.arange(num_tokens) % num_groups
    expected = reference.masked_attention(attn, x, ids[:, None] == ids)
    torch.testing.assert_close(attn(x, num_groups, StridedPermutation(num_groups)), expected)


def test_exchanging_whole_slices_exchanges_outputs():
    attn, x = attention(), tokens(28)
    swap = torch.arange(28).view(4, 7)[[2, 1, 0, 3]].flatten()
    torch.testing.assert_close(attn(x[:, swap], 4), attn(x, 4)[:, swap])


def test_no_gradient_flows_from_one_slice_to_another():
    attn, x = attention(), tokens(29).requires_grad_()
    ids = reference.slice_ids(29, 4)
    attn(x, 4)[:, ids == 1].sum().backward()
    touched = x.grad.abs().sum((0, 2)) > 0
    assert torch.equal(touched, ids == 1)


@settings(deadline=None)
@given(num_tokens=st.integers(1, 200), data=st.data())
def test_slices_cover_all_tokens_and_differ_by_one_at_most(num_tokens, data):
    num_groups = data.draw(st.integers(1, num_tokens))
    lengths = [length for slices, length in slice_lengths(num_tokens, num_groups) for _ in range(slices)]
    assert sum(lengths) == num_tokens
    assert len(lengths) == num_groups
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("num_groups", [0, -1, 5])
def test_impossible_slices_are_refused(num_groups):
    with pytest.raises(InputError, match="try at most 4"):
        attention()(tokens(4), num_groups)


def test_impossible_heads_are_refused():
    with pytest.raises(InputError, match="24 channels cannot form 5 equal heads"):
        SlicedAttention(24, 5)


# which kernel


@pytest.fixture
def chosen(monkeypatch):
    """The implementations of attention that were taken, in order."""
    names = []
    for name in ("scaled_dot_product_attention", "formula"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, function=function: names.append(name) or function(*a))
    apply = kernels._MatrixProductBackward.apply
    monkeypatch.setattr(kernels._MatrixProductBackward, "apply", lambda *a: names.append("products") or apply(*a))
    return names


@pytest.mark.parametrize(
    ("dtype", "trained", "expected"),
    [
        (torch.float32, "qkv", "scaled_dot_product_attention"),
        (torch.float64, "qkv", "scaled_dot_product_attention"),
        (torch.bfloat16, "", "scaled_dot_product_attention"),
        (torch.bfloat16, "q", "products"),
        (torch.bfloat16, "k", "products"),
        (torch.bfloat16, "v", "products"),
        (torch.float16, "qkv", "products"),
    ],
)
def test_half_precision_that_is_trained_on_a_cpu_takes_the_backward_in_products(dtype, trained, expected, chosen):
    tensors = [torch.randn(2, 2, 5, 4, dtype=dtype).requires_grad_(name in trained) for name in "qkv"]
    kernels.attend(*tensors)
    assert chosen[0] == expected
    chosen.clear()
    with torch.no_grad():
        kernels.attend(*tensors)
    assert chosen == ["scaled_dot_product_attention"]


def test_what_traces_half_precision_sees_the_formula(chosen, monkeypatch):
    q = torch.randn(2, 2, 5, 4, dtype=torch.bfloat16)
    torch.func.grad(lambda q: kernels.attend(q, q, q).sum())(q)
    assert chosen == ["formula"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    kernels.attend(*[q.requires_grad_()] * 3)
    assert chosen == ["formula"] * 2
