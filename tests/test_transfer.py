"""Weights walk the same path in other steps: what is reused, what is new, and that it is said."""

from dataclasses import replace

import pytest
import timm
import torch
from conftest import small_config
from safetensors.torch import save_file
from test_weights import official_state_dict

from sret import InputError, ModelConfig, SReT, StageConfig
from sret.checkpoints.adapt import transfer, transfer_file
from sret.checkpoints.card import Card, save_weights
from sret.checkpoints.official import to_official
from sret.checkpoints.resolve import read_source
from sret.data.preprocess import Preprocessing
from sret.models.variants import config_of
from sret.training.config import TrainConfig
from sret.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_report")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_depths_are_equal_models(dtype):
    source, target = lively(SReT(deep(39))).to(dtype), SReT(deep(39)).to(dtype)
    transfer(target, source.state_dict(), source.config)
    ours = target.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("scale", ["one", "sqrt", "passes"])
@pytest.mark.slow
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


@pytest.mark.parametrize("learnable", [True, False])
def test_projections_where_there_were_none_begin_silent(learnable):
    source = lively(SReT(replace(with_projections(4, None), learnable_residual=learnable)))
    target = SReT(replace(with_projections(4, 0.25), learnable_residual=learnable)).double().eval()
    report = transfer(target, source.state_dict(), source.config)
    assert target.stages[0].recursions[0].projections[0].branch.fc1.weight.any()
    torch.testing.assert_close(target(IMAGE), source(IMAGE))
    assert report[0] == "stage 1: 2 blocks reused; 8 new projections, adding nothing at first"


@pytest.mark.parametrize(("before", "after", "widths"), [(0.25, 0.75, (4, 12)), (0.75, 0.25, (12, 4))])
@pytest.mark.parametrize("passes", [4, 8])
def test_projections_of_another_width_begin_silent(before, after, widths, passes):
    """They keep nothing of the source's: the model is as if the source had none."""
    source = lively(SReT(with_projections(4, before)))
    bare = with_projections(4, None)
    kept = {key: value for key, value in source.state_dict().items() if ".projections." not in key}
    target, expected = (SReT(with_projections(passes, ratio)).double().eval() for ratio in (after, None))
    report = transfer(target, source.state_dict(), source.config)
    transfer(expected, kept, bare)
    torch.testing.assert_close(target(IMAGE), expected(IMAGE))
    assert target.stages[0].recursions[0].projections[0].branch.fc1.weight.any()  # else it would never learn
    then, now = widths
    said = f"; {2 * passes} new projections ({now} hidden channels instead of {then}), adding nothing at first"
    assert report[0].endswith(said)


def test_left_out_projections_are_counted():
    source = SReT(deep(4))
    report = transfer(SReT(with_projections(4, None)), source.state_dict(), source.config)
    assert report[0] == "stage 1: 2 blocks reused; 8 projections left out"


def test_the_report_names_every_part():
    source = SReT(deep(4))
    target = SReT(deep(6, num_classes=3, img_size=48, in_chans=1))
    assert transfer(target, source.state_dict(), source.config) == [
        "stage 1: 2 blocks reused, 4 passes become 6 of length 0.667; 12 projections from 8 of 8",
        "stage 2: 2 blocks reused, 2 passes become 3 of length 0.667; 6 projections from 4 of 4",
        "new classifier: 3 classes instead of 5",
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
    with pytest.raises(InputError, match="has a fused model, which is for inference only"):
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
    assert report[0] == "stage 1: 2 blocks reused, 2 passes become 4 of length 0.5; 8 projections from 4 of 4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reversible": True}, "a model with one stream, but this one has two streams; set reversible to false"),
        ({"stages": deep(4).stages[:1]}, "for 2 stages, but this model has 1"),
        (
            {"stages": small_config().stages[:2]},
            "stage 1 are for 2 blocks of width 16 and 2 heads, but this model has 1 block of",
        ),
        ({"stages": tuple(replace(stage, num_heads=4) for stage in deep(4).stages)}, "4 head"),
        ({"stages": tuple(replace(stage, mlp_ratio=3.0) for stage in deep(4).stages)}, "do not fit the model"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    source = SReT(deep(4))
    with pytest.raises(InputError, match=message):
        transfer(SReT(replace(deep(4), **changes)), source.state_dict(), source.config)


def one_block() -> ModelConfig:
    return deep(4, stages=tuple(replace(stage, num_blocks=1) for stage in deep(4).stages))


@pytest.mark.parametrize(
    ("found", "claimed"),
    [(deep(4), one_block()), (deep(8), deep(4)), (deep(4), with_projections(4, None))],
    ids=["blocks", "passes", "projections"],
)
def test_weights_of_another_model_than_they_are_said_to_be_are_refused(found, claimed):
    for target in (found, claimed):
        with pytest.raises(InputError, match=r"do not fit the model: unexpected stages\.0\.recursions"):
            transfer(SReT(target), SReT(found).state_dict(), claimed)


def test_weights_that_are_no_numbers_of_the_kind_are_refused():
    state_dict = SReT(deep(4)).state_dict()
    key = "stages.0.recursions.0.projections.0.branch.fc1.weight"
    state_dict[key] = state_dict[key].to(torch.int8)
    with pytest.raises(InputError, match=rf"{key} is of torch.int8, not torch.float32"):
        transfer(SReT(deep(8)), state_dict, deep(4))


def test_without_coefficients_a_step_cannot_be_made_longer():
    source = SReT(deep(4, learnable_residual=False))
    transfer(SReT(deep(8, learnable_residual=False)), source.state_dict(), source.config)
    config = deep(8, learnable_residual=False, residual_scale="one")
    with pytest.raises(InputError, match=r"8 passes .* 1 .* 4 passes .* 0.25 .* residual_scale"):
        transfer(SReT(config), source.state_dict(), source.config)


def test_coefficients_are_neither_lost_nor_missed():
    without = deep(4, learnable_residual=False)
    learned, target = lively(SReT(deep(4))), SReT(without)
    with pytest.raises(InputError, match=r"have a learned stages\.0.*\.alpha, .* set learnable_res"):
        transfer(target, learned.state_dict(), learned.config)
    for source, config in (
        (SReT(deep(4)), without),
        (lively(SReT(without)), deep(4)),
        (lively(SReT(without)), deep(8)),
    ):
        target = SReT(config)
        transfer(target, source.state_dict(), source.config)
        same = SReT(replace(source.config, stages=config.stages))
        transfer(same, source.state_dict(), source.config)
        torch.testing.assert_close(target.double().eval()(IMAGE), same.double().eval()(IMAGE))


def test_weights_without_a_card_are_those_of_the_very_model(tmp_path):
    """Whatever its scale, passes and classes, not the named one's."""
    options = {"residual_scale": "passes", "num_classes": 7, "stages": deep(3).stages, "img_size": 32}
    state_dict = lively(timm.create_model("sret_t", **options)).float().state_dict()
    save_file(state_dict, tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    loaded = timm.create_model("sret_t", pretrained=True, pretrained_cfg_overlay=overlay, **options).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state_dict.items())
    assert "new classifier: 2 classes instead of 7" in transfer_file(
        SReT(deep(3, num_classes=2, residual_scale="passes")), tmp_path / "own.safetensors"
    )


def test_a_published_file_gives_equal_outputs_on_any_scale(tmp_path):
    """The authors' steps are of 1, whatever the scale of the model that takes their weights."""
    torch.save({"model": official_state_dict("SReT_T")}, tmp_path / "SReT_T.pth")
    image = torch.randn(1, 3, 64, 64)
    answers = []
    for scale in ("one", "passes"):
        model = SReT(replace(config_of("sret_t"), residual_scale=scale, img_size=64)).eval()
        transfer_file(model, tmp_path / "SReT_T.pth")
        answers.append(model.double()(image.double()))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-5)


def test_the_error_of_a_folder_names_the_file_in_it(tmp_path):
    with pytest.raises(InputError, match=r"is a folder.*best\.safetensors"):
        read_source(tmp_path, deep(4))


def test_the_error_of_an_exported_model_names_its_source(tmp_path):
    with pytest.raises(InputError, match=r"model\.onnx is an exported model, .* use the weights it was exported from"):
        read_source(tmp_path / "model.onnx", deep(4))


def test_the_error_of_a_state_names_the_weights_beside_it(tmp_path):
    torch.save({"model": SReT(deep(4)).state_dict(), "step": 3}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"state\.pt has weights of sret, .* use a run's best\.safetensors"):
        read_source(tmp_path / "state.pt", deep(4))


def test_the_authors_format_of_a_model_of_ones_own_is_read_at_any_size(tmp_path):
    """Also for images too small for the slices of the published models."""
    config = deep(4, residual_scale="one", img_size=16)
    source = lively(SReT(config))
    torch.save({"model": to_official(source.state_dict(), config)}, tmp_path / "own.pth")
    target = SReT(config).double().eval()
    transfer_file(target, tmp_path / "own.pth")
    torch.testing.assert_close(target(IMAGE[..., :16, :16]), source(IMAGE[..., :16, :16]))


@pytest.mark.parametrize("changes", [{"num_classes": 0, "global_pool": ""}, {"in_chans": 4}, {"in_chans": 1}])
def test_a_file_without_a_card_may_have_other_classes_and_channels(changes, tmp_path):
    source = SReT(deep(4, in_chans=5))
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    target = SReT(deep(4, **changes))
    transfer_file(target, tmp_path / "own.safetensors")
    weight = target.stem.conv1.weight
    assert torch.isfinite(target(torch.randn(1, target.in_chans, 32, 32))).all()
    grey = source.stem.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(weight, (grey / target.in_chans).expand_as(weight))


@pytest.mark.parametrize("spoil", ["nan", "size"])
def test_errors_name_the_file(spoil, tmp_path):
    state_dict = SReT(deep(4)).state_dict()
    if spoil == "nan":
        state_dict["head.bias"][1] = float("nan")
    else:
        state_dict["pos_embed.weight"] = torch.zeros(1, 16, 0, 4)
    save_file(state_dict, tmp_path / "own.safetensors")
    with pytest.raises(InputError, match=r"own\.safetensors: "):
        transfer_file(SReT(deep(4)), tmp_path / "own.safetensors")


def test_two_streams_pass_between_depths():
    source = lively(SReT(deep(64, reversible=True, memory="none")))
    target = SReT(deep(128, reversible=True, memory="none")).double().eval()
    transfer(target, source.state_dict(), source.config)
    assert (target(IMAGE) - source(IMAGE)).norm() < 0.05 * source(IMAGE).norm()


def test_training_begins_with_the_weights_of_another_depth_and_says_so(tmp_path, capsys):
    shallow = deep(2, in_chans=1, num_classes=10)
    recipe = TrainConfig(model=shallow, epochs=1, batch_size=256, warmup_epochs=0)
    train(recipe, tmp_path / "two", max_steps=1)
    capsys.readouterr()
    deeper = replace(recipe, model=deep(6, in_chans=1, num_classes=10), init=tmp_path / "two" / "last.safetensors")
    train(deeper, tmp_path / "six", max_steps=1)
    out = capsys.readouterr().out
    assert "Init    stage 1: 2 blocks reused, 2 passes become 6 of length 0.333; 12 projections from 4 of 4" in out
    (tmp_path / "two" / "last.safetensors").unlink()
    train(deeper, tmp_path / "six", max_steps=2, resume="auto")  # which needs no beginning any more
    assert "Init" not in capsys.readouterr().out
