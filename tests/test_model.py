"""What holds for every model: any shape, one answer, gradients everywhere, and timm's contract."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from conftest import small_config
from torch import nn

from sret import InputError, ModelConfig, SReT, StageConfig

SIZES = [(224, 224), (232, 232), (256, 192), (384, 384), (96, 96)]


@pytest.mark.parametrize("size", SIZES)
def test_any_size_the_stem_can_take(size):
    model = timm.create_model("sret_t", num_classes=7).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("permutation", ["random", "strided"])
@pytest.mark.parametrize("size", [(64, 64), (72, 72), (80, 56)])
def test_the_output_of_an_image_depends_on_neither_seed_nor_batch(permutation, size):
    model = SReT(small_config(permutation=permutation)).double().eval()
    x = torch.randn(3, 3, *size, dtype=torch.double)
    with torch.no_grad():
        together = model(x)
        torch.manual_seed(99)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone)


def test_training_permutes_afresh_and_evaluation_does_not_draw(model, image):
    with torch.no_grad():
        model(image)
        assert model.permuter.count == 0
        for norm in (model.stem.bn1, model.stem.bn2, model.stem.bn3):
            norm.momentum = 0.0
        a, b = model.train()(image), model(image)
    assert model.permuter.count == 2 * 3  # two calls, three blocks whose second pass is sliced
    assert not torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("groups", [(1,), (4, 2, 1), (4, 4, 2, 2, 1, 1, 3), (2,) * 50])
def test_any_number_of_passes(groups, image):
    stage = StageConfig(embed_dim=16, num_heads=2, num_blocks=1, groups=groups, projection_ratio=0.5)
    model = SReT(ModelConfig(stages=(stage, stage), img_size=64, num_classes=10))
    loss = model(image).square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_any_number_of_stages(num_stages, image):
    stages = tuple(StageConfig(embed_dim=8 * 2**i, num_heads=2, num_blocks=1) for i in range(num_stages))
    model = SReT(ModelConfig(stages=stages, img_size=64, num_classes=10, stem_stride=4)).eval()
    maps = model.forward_intermediates(image, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [64 // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info]


def test_the_ablations_leave_out_what_they_say(image):
    full = small_config()
    without_nll = replace(full, stages=tuple(replace(s, projection_ratio=None) for s in full.stages))
    for config, kept, gone in (
        (without_nll, "alpha", "projections"),
        (replace(full, learnable_residual=False), "projections", "alpha"),
    ):
        names = [name for name, _ in SReT(config).named_parameters()]
        assert any(kept in name for name in names)
        assert not any(gone in name for name in names)
        assert SReT(config)(image).isfinite().all()


def test_dropout_before_the_classifier_is_for_training_only(image):
    model = SReT(small_config(drop_rate=0.5)).eval()
    features = torch.ones(400, 64, 1, 1) * torch.arange(64).view(1, 64, 1, 1)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.forward_head(features), model.head(pooled))
    logits = model.train().forward_head(features)
    assert logits.std(dim=0).min() > 1e-3  # equal rows, other units dropped
    torch.testing.assert_close(logits.mean(dim=0), model.head(pooled)[0], atol=0.3, rtol=0)


def test_a_batch_may_be_empty(model):
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 10)


def test_every_parameter_has_a_gradient(image):
    model = SReT(small_config()).train()
    model(image).square().mean().backward()
    # A bias before BatchNorm has none: the mean is taken out again.
    exceptions = {"stem.conv1.bias", "stem.conv2.bias", "stem.conv3.bias"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name in exceptions or parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_checkpointing_changes_no_gradient(permutation):
    config = small_config(permutation=permutation, drop_path_rate=0.3, num_classes=5)
    plain = SReT(config).double()
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64, dtype=torch.double)
    for model in (plain, recomputed):
        torch.manual_seed(1)
        model.train()(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert recomputed.config.memory == "pass"
    recomputed.set_grad_checkpointing(False)
    assert recomputed.config.memory == "none"


def test_initial_weights_have_the_spread_of_torch_s_defaults_and_positions_0_02():
    stage = StageConfig(embed_dim=96, num_heads=3, num_blocks=1, groups=(4, 2))
    model = SReT(ModelConfig(stages=(stage, replace(stage, embed_dim=192)), num_classes=100))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # uniform between -1 / sqrt(inputs) and its negative
            limit = module.weight[0].numel() ** -0.5
            assert module.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name
            assert module.weight.abs().max() <= limit, name
            assert 0 < module.bias.abs().max() <= limit, name
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert module.weight.eq(1).all(), name
            assert module.bias.eq(0).all(), name
    assert model.pos_embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    coefficients = [p for name, p in model.named_parameters() if name.endswith(("alpha", "beta"))]
    assert len(coefficients) == 16
    assert all(p.item() == 1 for p in coefficients)


def test_stochastic_depth_grows_with_depth_one_rate_per_block():
    model = SReT(small_config(drop_path_rate=0.5))
    rates = [getattr(r.block.attn.drop_path, "drop_prob", 0.0) for stage in model.stages for r in stage.recursions]
    assert rates == [0.0, 0.5 * 2 / 8, 0.5 * 3 / 8, 0.5 * 6 / 8]  # layers before the block's own, over all 8
    assert model.stages[1].recursions[1].block.mlp.drop_path.drop_prob == rates[2]


def test_eight_images_are_memorised():
    model = SReT(small_config(num_classes=8)).train()
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_images_of_the_wrong_shape_are_refused(model):
    with pytest.raises(InputError, match=r"takes \(batch, 3, height, width\)"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(InputError, match=r"takes \(batch, 3, height, width\)"):
        model(torch.zeros(3, 64, 64))
    with pytest.raises(InputError, match="stage 1 at 8x16 pixels"):
        model(torch.zeros(1, 3, 8, 16))


def test_weights_exist_once(model):
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


# timm's contract, as timm's own test-suite checks it


def test_features_then_head_is_forward(model, image):
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), model(image))


def test_the_classifier_can_be_reset_and_removed(model, image):
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert model.num_classes == model.config.num_classes == 3
    model.reset_classifier(0)
    assert model(image).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, model.num_features, 2, 2)
    model.reset_classifier(4, "avg")
    assert model(image).shape == (2, 4)


def test_intermediates(model, image):
    last, maps = model.forward_intermediates(image)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)]
    assert torch.equal(last, maps[-1])
    assert torch.equal(last, model.forward_features(image))
    (first,) = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])
    assert len(model.forward_intermediates(image, indices=2, intermediates_only=True)) == 2
    normed = model.forward_intermediates(image, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(normed.permute(0, 2, 3, 1), model.norm(last.permute(0, 2, 3, 1)))
    with pytest.raises(InputError, match="NCHW"):
        model.forward_intermediates(image, output_fmt="NLC")


def test_pruning_keeps_the_stages_asked_for(model, image):
    (expected,) = model.forward_intermediates(image, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.stages) == len(model.config.stages) == 2
    assert torch.equal(model.forward_intermediates(image, indices=[1], intermediates_only=True)[0], expected)


def test_parameter_groups_follow_depth(model):
    from timm.models import group_parameters
    from timm.optim import param_groups_weight_decay

    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [
        groups[f"{name}"]
        for name in ("stem.conv1.weight", "pos_embed.weight", "stages.0.recursions.0.block.attn.alpha")
    ]
    assert order[0] == order[1] < order[2]
    assert groups["stages.1.recursions.0.block.mlp.beta"] < groups["stages.1.recursions.1.projections.0.alpha"]
    assert groups["head.weight"] == max(groups.values())
    undecayed, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert undecayed["weight_decay"] == 0
    assert not any(p is model.pos_embed.weight for p in decayed["params"])
    assert all(p.ndim > 1 for p in decayed["params"])


def test_a_model_is_copied_and_pickled_whole(model, image):
    import pickle

    with torch.no_grad():
        expected = model(image)
        assert torch.equal(copy.deepcopy(model)(image), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), expected)
