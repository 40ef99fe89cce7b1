import copy
import pickle

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sret import InputError, SReT
from sret.layers import IndexPermutation, Permuter, StridedPermutation, replay
from sret.layers.permutation import fixed_permutation, invert

CPU = torch.device("cpu")


def tokens(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.double).view(1, n, 1).expand(2, n, 3)


def index_of(permutation) -> torch.Tensor:
    assert isinstance(permutation, IndexPermutation)
    return permutation.index


@settings(deadline=None)
@given(st.permutations(range(13)))
def test_a_permutation_followed_by_its_inverse_restores_order(order):
    index = torch.tensor(order)
    x = tokens(13)
    permutation = IndexPermutation(index)
    assert torch.equal(permutation.apply(x), x[:, index])
    assert torch.equal(permutation.undo(permutation.apply(x)), x)
    assert torch.equal(index[invert(index)], torch.arange(13))


@settings(deadline=None)
@given(num_tokens=st.integers(1, 60), data=st.data())
def test_a_strided_permutation_is_undone_for_any_sizes(num_tokens, data):
    num_groups = data.draw(st.integers(1, num_tokens))
    permutation, x = StridedPermutation(num_groups), tokens(num_tokens)
    expected = torch.cat([torch.arange(g, num_tokens, num_groups) for g in range(num_groups)])
    assert torch.equal(permutation.apply(x), x[:, expected])
    assert torch.equal(permutation.undo(permutation.apply(x)), x)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000))
def test_the_fixed_permutation_is_one_for_every_length(num_tokens):
    index = fixed_permutation(num_tokens)
    assert torch.equal(index.sort().values, torch.arange(num_tokens))


def test_the_fixed_permutation_is_the_same_on_every_machine():
    # Plain integers give the same; released models answer differently if this changes.
    for num_tokens in (1, 12, 784, 4096):
        assert fixed_permutation(num_tokens).tolist() == reference.fixed_permutation(num_tokens)


def test_the_fixed_permutation_spreads_a_slice_over_the_others():
    # 784 tokens, 8 raster slices of 98: a permuted slice should hold about 98 / 8 tokens of each.
    before = fixed_permutation(784) // 98
    counts = torch.stack([torch.bincount(part, minlength=8) for part in before.split(98)])
    assert counts.min() >= 4
    assert counts.max() <= 26


def test_evaluation_has_one_permutation_per_length_and_training_fresh_ones():
    permuter = Permuter()
    first, second = (permuter(64, 2, CPU, is_training=False) for _ in range(2))
    assert torch.equal(index_of(first), index_of(second))
    drawn = [index_of(permuter(64, 2, CPU, is_training=True)) for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert permuter.count == 3


def test_training_permutations_are_a_function_of_seed_and_count():
    def draw(permuter: Permuter) -> list[int]:
        return index_of(permuter(64, 2, CPU, is_training=True)).tolist()

    one, other = Permuter(seed=5), Permuter(seed=5)
    sequence = [draw(one) for _ in range(4)]
    torch.manual_seed(123)  # the global generator has no say
    assert [draw(other) for _ in range(4)] == sequence
    assert draw(Permuter(seed=6)) != sequence[0]
    resumed = Permuter()
    resumed.load_state_dict({"seed": 5, "count": 2})
    assert draw(resumed) == sequence[2]


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Permuter()(64, 2, CPU, is_training=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_permuter_is_copied_and_pickled_with_its_state():
    permuter = Permuter(seed=3)
    permuter(9, 2, CPU, is_training=True)
    for twin in (copy.deepcopy(permuter), pickle.loads(pickle.dumps(permuter))):
        assert twin.state_dict() == {"seed": 3, "count": 1}


def test_every_first_position_is_equally_likely():
    permuter = Permuter()
    first = torch.stack([index_of(permuter(8, 2, CPU, is_training=True)) for _ in range(800)])[:, 0]
    assert torch.bincount(first, minlength=8).min() > 60  # 100 expected


def test_replay_hands_out_the_list_in_the_order_of_use(config, image):
    model = SReT(config).eval()  # stage 1: one permuted pass over 64 tokens; stage 2: two over 16
    permutations = [torch.randperm(64), torch.randperm(16), torch.randperm(16)]
    with replay(permutations):
        a = model(image)
    with replay(permutations):
        b = model(image)
    with replay([permutations[0], permutations[2], permutations[1]]):
        c = model(image)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-6)


def test_replay_refuses_lists_that_do_not_fit(model, image):
    with pytest.raises(InputError, match="ran out"), replay([torch.randperm(64)]):
        model(image)
    with pytest.raises(InputError, match="has 64 tokens, but the pass has 16"), replay([torch.randperm(64)] * 3):
        model(image)
    too_many = [torch.randperm(64), *[torch.randperm(16)] * 3]
    with pytest.raises(InputError, match="1 of 4 replayed permutations were not used"), replay(too_many):
        model(image)
    model(image)  # nothing is left over from the failures


def test_strided_models_differ_from_random_ones_in_evaluation(config, image):
    from dataclasses import replace

    random, strided = SReT(config).eval(), SReT(replace(config, permutation="strided")).eval()
    strided.load_state_dict(random.state_dict())
    assert not torch.allclose(random(image), strided(image), atol=1e-6)
