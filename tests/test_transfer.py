"""Weights walk the same path in other steps: what is reused, what is new, and that it is said."""

from dataclasses import replace

import pytest
import torch
from conftest import small_config
from test_weights import official_state_dict

from sret import InputError, ModelConfig, SReT, StageConfig
from sret.checkpoint import Card, save_weights
from sret.preprocess import Preprocessing
from sret.recipe import TrainConfig
from sret.train import train
from sret.transfer import read_source, transfer
from sret.variants import config_of


def deep(passes: int, **changes: object) -> ModelConfig:
    stage = StageConfig(embed_dim=16, num_heads=2, num_blocks=2, groups=(1,) * passes, projection_ratio=0.5)
    wide = replace(stage, embed_dim=32, groups=(1,) * max(1, passes // 2))
    return ModelConfig(
        **{"stages": (stage, wide), "img_size": 32, "num_classes": 5, "residual_scale": "passes", **changes}
    )


def lively(model: SReT) -> SReT:
    """Weights of some size, coefficients that are not 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.2 if name.endswith(("alpha", "beta")) else 0.05)
    return model.double().eval()


IMAGE = torch.randn(4, 3, 32, 32, dtype=torch.double)


def test_equal_depths_are_equal_models():
    source, target = lively(SReT(deep(4))), SReT(deep(4)).double().eval()
    transfer(target, source.state_dict(), source.config)
    assert torch.equal(target(IMAGE), source(IMAGE))


@pytest.mark.parametrize("scale", ["one", "sqrt", "passes"])
def test_finer_steps_follow_the_path_of_the_coarse_ones(scale):
    """The nearer, the finer; whatever the scale on which coefficients are learned."""

    def distance(passes: int) -> float:
        """Of the answers of a model of so many passes, and of twice as many, as a share of their size."""
        source = lively(SReT(deep(passes)))
        target = SReT(deep(2 * passes, residual_scale=scale)).double().eval()
        transfer(target, source.state_dict(), source.config)
        return ((target(IMAGE) - source(IMAGE)).norm() / source(IMAGE).norm()).item()

    assert distance(8) < 0.3
    assert distance(64) < 0.3 * distance(8)


def test_every_pass_takes_the_projection_at_its_share_of_the_way():
    source, deeper, shallower = (SReT(deep(n)) for n in (4, 8, 2))
    for target, taken in ((deeper, [0, 0, 1, 1, 2, 2, 3, 3]), (shallower, [1, 3])):
        transfer(target, source.state_dict(), source.config)
        ours, theirs = target.stages[0].recursions[1].projections, source.stages[0].recursions[1].projections
        for i, j in enumerate(taken):
            assert torch.equal(ours[i].branch.fc1.weight, theirs[j].branch.fc1.weight), (i, j)
        assert torch.equal(
            target.stages[1].recursions[0].block.attn.branch.qkv.weight,
            source.stages[1].recursions[0].block.attn.branch.qkv.weight,
        )


def with_projections(passes: int, ratio: float | None) -> ModelConfig:
    return deep(passes, stages=tuple(replace(stage, projection_ratio=ratio) for stage in deep(passes).stages))


def test_projections_where_there_were_none_begin_silent():
    source, target = lively(SReT(with_projections(4, None))), SReT(with_projections(4, 0.25)).double().eval()
    report = transfer(target, source.state_dict(), source.config)
    assert target.stages[0].recursions[0].projections[0].branch.fc1.weight.any()
    torch.testing.assert_close(target(IMAGE), source(IMAGE))
    assert report[0] == "stage 1: 2 block(s) reused; 8 projections afresh, silent at first"


def test_a_wider_projection_answers_as_before_and_can_learn_more():
    source, target = lively(SReT(with_projections(4, 0.25))), SReT(with_projections(4, 0.75)).double().eval()
    report = transfer(target, source.state_dict(), source.config)
    torch.testing.assert_close(target(IMAGE), source(IMAGE))
    fc1, fc2 = (getattr(target.stages[0].recursions[0].projections[0].branch, name) for name in ("fc1", "fc2"))
    assert fc1.weight[4:].any(dim=1).all()  # else new channels would never have a gradient
    assert not fc2.weight[:, 4:].any()
    assert report[0] == "stage 1: 2 block(s) reused; 8 projections from 8 of 8, 4 hidden channels now 12"


def test_a_narrower_projection_keeps_the_channels_that_matter():
    source, target = lively(SReT(with_projections(4, 0.75))), SReT(with_projections(4, 0.25)).double().eval()
    for projection in (p for stage in source.stages for r in stage.recursions for p in r.projections):
        with torch.no_grad():  # of every three channels the last matters
            projection.branch.fc2.weight.unflatten(1, (-1, 3))[..., :2].zero_()
    transfer(target, source.state_dict(), source.config)
    torch.testing.assert_close(target(IMAGE), source(IMAGE))


def test_the_report_names_every_part():
    source = SReT(deep(4))
    target = SReT(deep(6, num_classes=3, img_size=48, in_chans=1))
    assert transfer(target, source.state_dict(), source.config) == [
        "stage 1: 2 block(s) reused, 4 passes now 6 of 0.667; 12 projections from 8 of 8",
        "stage 2: 2 block(s) reused, 2 passes now 3 of 0.667; 6 projections from 4 of 4",
        "classifier afresh: 5 classes now 3",
        "position embedding resized from 4x4 tokens to 6x6",
        "first convolution adapted from 3 channels to 1",
    ]


def test_a_file_of_ours_says_how_deep_its_model_was(tmp_path):
    source = SReT(deep(4)).eval()
    card = Card(config=source.config, preprocessing=Preprocessing(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3))
    save_weights(tmp_path / "four.safetensors", source.state_dict(), card)
    state_dict, config = read_source(tmp_path / "four.safetensors", deep(9))
    assert config == source.config
    transfer(SReT(deep(9)), state_dict, config)
    save_weights(tmp_path / "fused.safetensors", source.state_dict(), replace(card, is_fused=True))
    with pytest.raises(InputError, match="is of a fused model, which is for answering"):
        read_source(tmp_path / "fused.safetensors", deep(9))


def test_a_published_file_goes_into_more_passes(tmp_path):
    """The authors' two passes become four."""
    config = config_of("sret_t")
    torch.save({"model": official_state_dict("SReT_T")}, tmp_path / "SReT_T.pth")
    stages = tuple(replace(stage, groups=(stage.groups[0],) * 2 + (stage.groups[1],) * 2) for stage in config.stages)
    target = SReT(replace(config, stages=stages))
    state_dict, source = read_source(tmp_path / "SReT_T.pth", target.config)
    assert source.stages[0].num_passes == 2
    report = transfer(target, state_dict, source)
    assert report[0] == "stage 1: 2 block(s) reused, 2 passes now 4 of 0.5; 8 projections from 4 of 4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reversible": True}, "of a model of one stream, and this one has two streams.*set reversible to false"),
        ({"stages": deep(4).stages[:1]}, "of 2 stages, and this model has 1"),
        (
            {"stages": small_config().stages[:2]},
            r"stage 1 are of 2 block\(s\) of width 16 and 2 head\(s\), and this model has 1 block\(s\)",
        ),
        ({"stages": tuple(replace(stage, num_heads=4) for stage in deep(4).stages)}, "4 head"),
        ({"stages": tuple(replace(stage, mlp_ratio=3.0) for stage in deep(4).stages)}, "do not fit the model"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    source = SReT(deep(4))
    with pytest.raises(InputError, match=message):
        transfer(SReT(replace(deep(4), **changes)), source.state_dict(), source.config)


def test_blocks_that_the_file_has_and_its_model_has_not_are_not_dropped_in_silence():
    one = deep(4, stages=tuple(replace(stage, num_blocks=1) for stage in deep(4).stages))
    for more, fewer in ((deep(4), one), (deep(8), deep(4))):
        with pytest.raises(InputError, match=r"do not fit the model: unexpected stages\.0\.recursions"):
            transfer(SReT(fewer), SReT(more).state_dict(), fewer)


def test_without_coefficients_a_step_cannot_be_made_longer():
    source = SReT(deep(4, learnable_residual=False))
    transfer(SReT(deep(8, learnable_residual=False)), source.state_dict(), source.config)
    config = deep(8, learnable_residual=False, residual_scale="one")
    with pytest.raises(InputError, match="set residual_scale to 'passes' in both"):
        transfer(SReT(config), source.state_dict(), source.config)


def test_a_folder_is_answered_with_the_file_in_it(tmp_path):
    with pytest.raises(InputError, match=r"is a folder; name a file of weights in it, such as .*best\.safetensors"):
        read_source(tmp_path, deep(4))


def test_training_begins_with_the_weights_of_another_depth_and_says_so(tmp_path, capsys):
    shallow = deep(2, in_chans=1, num_classes=10)
    recipe = TrainConfig(model=shallow, epochs=1, batch_size=256, warmup_epochs=0)
    train(recipe, tmp_path / "two", max_steps=1)
    capsys.readouterr()
    deeper = replace(recipe, model=deep(6, in_chans=1, num_classes=10), init=tmp_path / "two" / "last.safetensors")
    train(deeper, tmp_path / "six", max_steps=1)
    out = capsys.readouterr().out
    assert "Init    stage 1: 2 block(s) reused, 2 passes now 6 of 0.333; 12 projections from 4 of 4" in out
