"""The images of a step: a function of (seed, step), whoever computes it and in however many parts."""

import random

import numpy as np
import pytest
import torch

from sret import InputError
from sret.data.sampler import EpochBatches, SampleIndex, balanced_uses, part_of, seeded


def images(batches: EpochBatches, epoch: int, first: int = 0) -> list[list[int]]:
    batches.start_at(epoch, first)
    return [[sample.image for sample in batch] for batch in batches]


def test_an_epoch_s_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int, first: int = 0) -> list[list[int]]:
        return images(EpochBatches(103, 10, seed), epoch, first)

    assert order(0, 0) == order(0, 0)
    flat = [i for batch in order(0, 0) for i in batch]
    assert len(set(flat)) == len(flat) == 100
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 1, first=4) == order(0, 1)[4:]


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (1, 2), (2, 3)])
def test_a_step_s_images_do_not_depend_on_who_computes_them(num_ranks, accumulation):
    whole = images(EpochBatches(103, 24, 0), 1)
    parts = [images(EpochBatches(103, 24, 0, rank, num_ranks, accumulation), 1) for rank in range(num_ranks)]
    for step, batch in enumerate(whole):
        shares = [part[step * accumulation + k] for part in parts for k in range(accumulation)]
        assert {len(share) for share in shares} == {24 // num_ranks // accumulation}
        assert sorted(i for share in shares for i in share) == sorted(batch)
        mirrored = dict(zip(batch, reversed(batch), strict=True))  # whom mixup pairs with whom
        assert all(mirrored[a] == b for share in shares for a, b in zip(share, reversed(share), strict=True))


def test_one_part_is_the_batch_itself():
    batch = [SampleIndex(i, 0) for i in (5, 3, 9)]  # odd
    assert part_of(batch, 0, 1) == batch


LABELS = [0] * 80 + [1] * 16 + [2] * 4


@pytest.mark.parametrize(
    ("balance", "shares"), [(1.0, [1 / 3, 1 / 3, 1 / 3]), (0.5, [0.597, 0.267, 0.133]), (1e-9, [0.8, 0.16, 0.04])]
)
def test_classes_are_drawn_in_their_shares_and_images_of_a_class_equally(balance, shares):
    uses = balanced_uses(LABELS, balance)
    batches = EpochBatches(100, 20, 0, uses=uses)
    counts = np.zeros(100)
    for epoch in range(30):
        batches.start_at(epoch)
        drawn = [sample for batch in batches for sample in batch]
        assert len(set(drawn)) == len(drawn) == 100  # a repeated image has another number, so another augmentation
        found = np.bincount([sample.image for sample in drawn], minlength=100)
        assert ((found == np.floor(uses)) | (found == np.ceil(uses))).all()
        counts += found
    by_class = [counts[np.asarray(LABELS) == label].sum() / 3000 for label in range(3)]
    assert by_class == pytest.approx(shares, abs=0.01)
    assert balanced_uses(LABELS, 0.0) is None


def test_balanced_epochs_are_a_function_of_seed_epoch_and_step():
    uses = balanced_uses(LABELS, 1.0)
    whole = images(EpochBatches(100, 24, 0, uses=uses), 1)
    assert images(EpochBatches(100, 24, 0, uses=uses), 1, first=2) == whole[2:]
    assert images(EpochBatches(100, 24, 0, uses=uses), 2) != whole
    parts = [images(EpochBatches(100, 24, 0, rank, 2, uses=uses), 1) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_impossible_batches_are_refused():
    with pytest.raises(InputError, match=r"batch_size 10 .* 3 processes.* multiple of 6"):
        EpochBatches(100, 10, 0, 0, 3)
    with pytest.raises(InputError, match=r"in 2 parts each: it must be a multiple of 8"):
        EpochBatches(100, 10, 0, 0, 2, 2)
    with pytest.raises(InputError, match="batch_size 10 is more than the 9 training images"):
        EpochBatches(9, 10, 0)


def test_seeded_restores_all_generators():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded((1, 2)):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
