"""Recursive models made of others: groups and weights found from sample images, and distances."""

import itertools

import pytest
import torch
from test_recursify import FAMILIES, IMAGES, count, made, output
from torch import nn

from sret import InputError, recursify, recursify_cost, recursify_distance
from sret.models.recursify import Sharing, found_groups
from sret.models.recursify.sharing import tie
from sret.models.recursify.similarity import closest_base, record, replaced_distance, similar_groups, unit_distances


def divisions(num_units: int, num_groups: int) -> list[list[list[int]]]:
    cuts = itertools.combinations(range(1, num_units), num_groups - 1)
    return [[list(range(a, b)) for a, b in itertools.pairwise((0, *cut, num_units))] for cut in cuts]


@pytest.mark.parametrize("is_first", [False, True])
def test_groups_are_the_best_of_all(is_first):
    for seed in range(4):
        distances = torch.rand(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        for num_groups in (1, 3, 7):

            def total(groups, distances=distances):
                columns = [distances[group][:, group].sum(0) for group in groups]
                return float(sum(c[0] if is_first else c.min() for c in columns))

            best = min(map(total, divisions(7, num_groups)))
            assert total(similar_groups(distances, num_groups, is_first)) == pytest.approx(best)


def test_similar_blocks_share_weights():
    model = made("ViT", {})
    for same in (1, 2):
        model.blocks[same + 1].load_state_dict(model.blocks[same].state_dict())
    with pytest.raises(InputError, match='share="similar" needs images'):
        recursify(model, passes=2, share="similar")
    shared = recursify(model, IMAGES, passes=2, share="similar")
    assert torch.equal(output(shared), output(model))  # 0 | 1 2 3
    found = found_groups(model, Sharing(passes=2, share="similar"), IMAGES)
    assert found.group_sizes == (1, 3)
    again = recursify(model, **vars(found))
    assert again.blocks[3].attn.qkv.weight is again.blocks[1].attn.qkv.weight
    assert count(again) == count(shared) == recursify_cost(model, (3, 32, 32), **vars(found)).parameters
    with pytest.raises(InputError, match=r"group_sizes are \(1, 2\); they must add up to \[4\]"):
        recursify(model, passes=2, share="similar", group_sizes=(1, 2))


@pytest.mark.parametrize("family", ["ViT", "Swin", "CaiT"])
def test_the_closest_weights_are_never_worse(family):
    model = made(family, {})
    names = ("blocks.0", "blocks.1") if family != "Swin" else ("layers.1.blocks.0", "layers.1.blocks.2")
    calls, _ = record(model, names, IMAGES)
    recorded = [calls[name] for name in names]
    for rank in (0, 1):
        errors = {}
        blocks = [model.get_submodule(name) for name in names]
        for base in (0, 1, "mean"):
            copies = [recursify(model).get_submodule(name) for name in names]
            tie(copies, base, rank)
            errors[base] = replaced_distance(copies, recorded)
        assert len(set(errors.values())) == 3
        assert errors[closest_base(blocks, recorded, rank)] == min(errors.values())
    closest = recursify(model, IMAGES, passes=2, init="closest", rank=1)
    assert count(closest) == count(recursify(model, passes=2, rank=1))


def test_a_block_in_its_own_place_has_no_distance():
    model = made("Swin", {})
    units = [(f"layers.1.blocks.{i}", f"layers.1.blocks.{i + 1}") for i in (0, 2)]
    calls, _ = record(model, [name for unit in units for name in unit], IMAGES)
    distances = unit_distances(model.get_submodule, units, calls)
    assert distances.diag().max() < 1e-10
    assert distances[0, 1] > 1e-3
    assert distances[1, 0] > 1e-3


def test_the_distance_to_the_original():
    model = made("ViT", {})
    same = recursify_distance(recursify(model, extra_passes=1), model, IMAGES)
    assert same.output < 1e-6
    shared = recursify(model, passes=2)
    found = recursify_distance(shared, model, IMAGES)
    expected = (output(shared) - output(model)).norm() / output(model).norm()
    assert found.output == pytest.approx(float(expected), rel=1e-4)
    assert list(found.blocks) == [f"blocks.{i}" for i in range(4)]
    assert found.blocks["blocks.0"] == 0 < found.blocks["blocks.1"]
    with pytest.raises(InputError, match="does not have the blocks of the original"):
        recursify_distance(FAMILIES["Swin"](), model, IMAGES)
    with pytest.raises(InputError, match=r"blocks.0 returns \(\d+, 16, \d+\), but in the original \("):
        recursify_distance(FAMILIES["Mixer"](), model, IMAGES)


def test_blocks_may_change_their_inputs():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x.add_(self.fc(x))

    model = nn.Sequential(*(InPlace() for _ in range(3)))
    names = ("0", "1", "2")
    calls, _ = record(model, names, torch.randn(2, 4))
    own = [replaced_distance([model.get_submodule(name)], [calls[name]]) for name in names * 2]
    assert max(own) < 1e-10
