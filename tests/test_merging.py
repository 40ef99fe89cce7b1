"""Token merging: properties of the matching, of merging and its inverse, and of models that merge tokens."""

import logging

import pytest
import torch
from conftest import small_config

from sret import InputError, SReT, StageConfig, load, merge_tokens, model_cost
from sret.cli.main import main
from sret.layers import IndexPermutation
from sret.layers.merging import MergedTokens, find_merge, merging_pass
from sret.models.config import ModelConfig
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distributed import make_accelerator
from sret.training.step import out_of_memory_advice

MERGES = [[3, 4], [1, 1, 1], 0]


def global_config(**changes: object) -> ModelConfig:
    stage = StageConfig(embed_dim=16, num_heads=2, num_blocks=2, groups=(1, 1), mlp_ratio=2.0)
    return ModelConfig(**{"stages": (stage,), "img_size": 32, "num_classes": 5, "stem_stride": 8, **changes})


@pytest.fixture
def merging(model: SReT) -> SReT:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return merge_tokens(model, MERGES)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])  # 3 and 5 do not divide the number of tokens
def test_each_slice_loses_the_same_number_and_the_rest_keeps_its_order(num_groups):
    keys, order = torch.randn(3, 28, 4), torch.randperm(28)
    merge = find_merge(keys, num_groups, 2, order)
    K = 28 - 2 * num_groups
    assert (merge.source.shape, merge.num_tokens) == ((3, 28), K)
    lengths = [28 // num_groups + (g < 28 % num_groups) for g in range(num_groups)]
    slice_of, place_of = torch.empty(28, dtype=torch.int64), torch.empty(28, dtype=torch.int64)
    slice_of[order] = torch.arange(num_groups).repeat_interleave(torch.tensor(lengths))
    place_of[order] = torch.cat([torch.arange(length) for length in lengths])
    for image in range(3):
        rows = merge.source[image] - K * image
        assert rows.unique().tolist() == list(range(K))
        for g, length in enumerate(lengths):
            assert len(rows[slice_of == g].unique()) == length - 2
        held = [(rows == row).nonzero().flatten() for row in range(K)]
        # Of tokens that became one, only one is of set B, the odd places of a slice; the others were merged into it.
        kept = [tokens[0] if len(tokens) == 1 else tokens[place_of[tokens] % 2 == 1] for tokens in held]
        assert torch.stack([token.squeeze() for token in kept]).diff().min() > 0


def test_the_most_similar_pairs_are_merged():
    keys = torch.eye(8, dtype=torch.float64)[None].clone()
    keys[0, 4] = 3 * keys[0, 1]  # parallel
    keys[0, 2] = keys[0, 7] + 0.1 * keys[0, 0]
    # Of 0..7 remain 0, 1, 3, 5, 6, 7, in this order.
    assert find_merge(keys, 1, 2).source.tolist() == [[0, 1, 5, 2, 1, 3, 4, 5]]


def test_a_merged_token_is_the_mean_of_its_tokens_and_goes_back_to_their_positions():
    x = torch.randn(2, 24, 6, dtype=torch.float64)
    tokens = MergedTokens(x)
    for r in (3, 2, 3):
        N = tokens.x.shape[1]
        tokens = tokens.merged(find_merge(torch.randn(2, N, 4), 2, r))
        assert tokens.sizes.sum(1).flatten().tolist() == [24, 24]
    assert tokens.x.shape[1] == 24 - 2 * (3 + 2 + 3)
    restored = tokens.unmerged()
    for image in range(2):
        for token in range(tokens.x.shape[1]):
            held = tokens.source[image] == image * tokens.x.shape[1] + token
            assert held.sum() == tokens.sizes[image, token]
            torch.testing.assert_close(tokens.x[image, token], x[image, held].mean(0))
            assert (restored[image, held] == tokens.x[image, token]).all()


def test_without_merging_a_model_is_the_same_bit_for_bit(model, image):
    same = merge_tokens(model, 0)
    assert same.config == model.config
    assert torch.equal(same(image), model(image))
    assert torch.equal(merge_tokens(merge_tokens(model, MERGES), [0, [0, 0], 0])(image), model(image))


def duplicated(x: torch.Tensor) -> torch.Tensor:
    """Tokens 2i and 2i + 1 become equal, so that merging all of A loses nothing."""
    return x[:, ::2].repeat_interleave(2, dim=1)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_merging_equal_tokens_changes_nothing(num_groups):
    model = SReT(global_config()).double()
    recursion = model.stages[0].recursions[0]
    x = duplicated(torch.randn(2, 16, 16, dtype=torch.float64))
    order = torch.randperm(16 // 2)[:, None] * 2 + torch.arange(2)  # pairs stay in one slice, A and B
    permutation = IndexPermutation(order.flatten())
    plain, merged = MergedTokens(x), MergedTokens(x)
    for groups, drawn, r in ((num_groups, permutation, 8 // num_groups), (1, None, 0)):
        plain = merging_pass(recursion.block, recursion.projections[0], plain, groups, drawn, 0)
        merged = merging_pass(recursion.block, recursion.projections[0], merged, groups, drawn, r)
    assert merged.x.shape[1] == 8
    torch.testing.assert_close(merged.unmerged(), plain.x)


def test_no_images_give_no_outputs(merging):
    assert merging(torch.empty(0, 3, 64, 64)).shape == (0, 10)


def test_an_image_alone_equals_the_image_in_a_batch(merging):
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    merging = merging.double()
    alone = torch.cat([merging(image[None]) for image in images])
    torch.testing.assert_close(merging(images), alone)
    assert (alone - merge_tokens(merging, 0)(images)).abs().max() > 1e-4  # it merges something


def test_feature_maps_keep_their_grid(merging, image):
    maps = merging.forward_intermediates(image, intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in maps] == [(8, 8), (4, 4), (2, 2)]
    assert len(maps[0][0].flatten(1).unique(dim=1).T) == 64 - 8 * 3 - 2 * 4  # equal values where merged
    assert merging(torch.randn(1, 3, 72, 88)).shape == (1, 10)  # slices of unequal lengths


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_gradients_flow_to_every_parameter(permutation, image):
    model = merge_tokens(SReT(small_config(permutation=permutation)), MERGES).train()
    model(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_the_gradient_is_that_of_finite_differences():
    recursion = SReT(global_config()).double().stages[0].recursions[0]
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)

    def two_passes(x: torch.Tensor) -> torch.Tensor:
        tokens = MergedTokens(x)
        for r in (2, 1):
            tokens = merging_pass(recursion.block, recursion.projections[0], tokens, 1, None, r)
        return tokens.unmerged()

    assert torch.autograd.gradcheck(two_passes, x, fast_mode=True)


def test_layers_with_hooks_or_half_precision_work(merging, image):
    expected = merging(image)
    merging.stages[0].recursions[0].block.attn.branch.qkv.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(merging(image), expected)
    assert merging.bfloat16()(image.bfloat16()).isfinite().all()


def test_counted_costs_include_merging(merging):
    from torch.utils.flop_counter import FlopCounterMode

    for size in ((64, 64), (72, 88)):
        sdpa = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa:
            merging(torch.zeros(1, 3, *size))
        assert counter.get_total_flops() == model_cost(merging.config, size).flops
    assert model_cost(merging.config).macs < model_cost(merge_tokens(merging, 0).config).macs


def test_a_weights_file_holds_the_merging(merging, image, tmp_path, capsys):
    from sret.checkpoints.card import Card, save_weights
    from sret.data.preprocess import Preprocessing

    card = Card(config=merging.config, preprocessing=Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3))
    save_weights(str(tmp_path / "m.safetensors"), merging.state_dict(), card)
    loaded = load(tmp_path / "m.safetensors").eval()
    assert loaded.config.stages[0].merge == (3, 4)
    assert torch.equal(loaded(image), merging(image))
    assert main(["info", str(tmp_path / "m.safetensors")]) == 0
    assert "Merged tokens of a slice, by stage and layer: [3, 4], [1, 1, 1], []" in capsys.readouterr().out


@pytest.mark.slow
def test_an_exported_model_merges_the_same_tokens(merging, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from sret.export.onnx import to_onnx

    session = onnxruntime.InferenceSession(to_onnx(merging, (3, 64, 64)).SerializeToString())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # the converter warned twice for each merge
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, 64, 64)
        logits = session.run(None, {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(logits), merging(images), atol=1e-4, rtol=1e-4)


def test_fewer_passes_merge_in_the_passes_that_run(merging, image):
    merging.set_passes(1)
    maps = merging.forward_intermediates(image, intermediates_only=True)
    assert len(maps[0][0].flatten(1).unique(dim=1).T) == 64 - 8 * 3


def test_entries_stay_with_their_passes():
    stage = StageConfig(embed_dim=8, num_heads=2, num_blocks=2, groups=(2, 1), merge=(4, 0, 2))
    for passes, groups, merge in ((1, (2,), (4, 2)), (2, (2, 1), (4, 0, 2)), (3, (2, 1, 1), (4, 0, 0, 2))):
        found = stage.with_passes(passes)
        assert (found.groups, found.merge) == (groups, merge)
    config = ModelConfig(stages=(stage,), img_size=64, num_classes=10)
    model = SReT(config).eval()
    short = SReT(config.first_passes(1)).eval()
    names = short.state_dict().keys()
    short.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images, passes=1), short(images))


@pytest.mark.parametrize(
    ("changes", "r", "message"),
    [
        (
            {},
            5,
            "in layer 1, whose slices have 8 tokens, is more than half of them; use at most 4. In all passes at most 1",
        ),
        ({}, [5, 0, 0], "use at most 4"),
        ({}, [1, 0], "one for each of the 3 stages"),
        ({}, [[1, -1], 0, 0], "whole numbers >= 0"),
        ({}, [1, 0, [0, 0, 1]], "merge has 3 entries, but the stage has 2 layers"),
        ({"reversible": True}, 1, "one-stream"),
        ({"memory": "pass"}, 1, "use memory 'none'"),
        ({"exits": "passes"}, [0, 0, 1], "last stage that merges no tokens"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(changes, r, message):
    with pytest.raises(InputError, match=message) as refused:
        merge_tokens(SReT(small_config(**changes)), r)
    assert "\n" not in str(refused.value)


def test_recomputation_and_compilation_are_refused(merging):
    for refused in (merging.compile, merging.set_grad_checkpointing):
        with pytest.raises(InputError, match="merge"):
            refused()
    with pytest.raises(InputError, match="only models of sret"):
        merge_tokens(torch.nn.Linear(1, 1), 1)


def test_training_of_merging_models_has_advice_that_works(tmp_path):
    merging = merge_tokens(SReT(small_config()), [[4], 0, 0]).config
    for config, advice in ((merging, "batch size: --grad_accum_steps 2"), (small_config(), "--model.memory pass, ")):
        with pytest.raises(InputError, match=advice), out_of_memory_advice(config, RuntimeConfig()):
            raise MemoryError
    with pytest.raises(InputError, match=r"fsdp does not support model\.stages"):
        make_accelerator(TrainConfig(model=merging), RuntimeConfig(fsdp=True), tmp_path)
