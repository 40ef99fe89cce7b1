import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from conftest import small_config

from sret import InputError, ModelConfig, SReT, StageConfig


def stage(**changes: object) -> StageConfig:
    return StageConfig(**{"embed_dim": 16, "num_heads": 2, "num_blocks": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"embed_dim": 17}, "embed_dim 17 cannot form 2 equal heads; try 16"),
        ({"groups": ()}, "groups is empty"),
        ({"groups": (4, 0)}, r"groups \(4, 0\): 0 slices in a pass"),
        ({"groups": 4}, "groups is 4; give the slices of each pass"),
        ({"groups": (2.0, 1)}, r"groups \(2.0, 1\): 2.0 slices in a pass; use whole numbers"),
        ({"embed_dim": 16.0}, "embed_dim is 16.0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf; numbers are at most"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01 of 16 channels is not"),
        ({"projection_ratio": 0.0}, "projection_ratio 0.0 of 16 channels"),
    ],
)
def test_an_invalid_stage_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        stage(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, r"stages is \(\)"),
        ({"stages": (stage(), stage(embed_dim=24))}, "24 channels cannot follow one of 16; use a multiple of 16"),
        ({"stages": (stage(groups=(65, 1)),)}, "64 tokens cannot form 65 slices; try at most 64"),
        ({"img_size": 0}, "img_size"),
        ({"img_size": 32.5}, "img_size 32.5"),
        ({"stages": "sret_t"}, "stages is"),
        ({"img_size": (64, 64, 64)}, "img_size"),
        ({"stem_stride": 3}, "stem_stride 3 is not one of 8, 4, 2, 1"),
        ({"permutation": "shuffled"}, "permutation is 'shuffled'; it must be one of random, strided"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0; it must be a number >= 0 and < 1"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"global_pool": "mean"}, "global_pool is 'mean'; it must be one of avg, max, ''"),
        ({"global_pool": ""}, "use avg or max, or set num_classes to 0"),
    ],
)
def test_an_invalid_model_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        small_config(**changes)


def test_an_error_names_stage_pass_and_size():
    with pytest.raises(InputError, match=r"stage 2 at 8x8 pixels.* pass 1: 1 token.* 4"):
        replace(small_config(), img_size=8, stages=(stage(groups=(1,)), stage(groups=(4, 2))))


def test_a_config_is_frozen_and_hashable():
    config = small_config()
    with pytest.raises(FrozenInstanceError):
        config.img_size = 3
    assert hash(config) == hash(small_config())


def test_lists_and_one_number_are_normalised():
    assert stage(groups=[8, 2]) == stage(groups=(8, 2))
    assert small_config(img_size=64) == small_config(img_size=[64, 64])


def test_a_config_survives_json():
    config = small_config(img_size=(64, 96), permutation="strided", drop_path_rate=0.1)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_named_with_the_nearest():
    with pytest.raises(InputError, match=r"no field 'image_size'.*did you mean 'img_size'"):
        ModelConfig.from_dict({**small_config().to_dict(), "image_size": 3})
    values = small_config().to_dict()
    values["stages"][0]["num_head"] = 2
    with pytest.raises(InputError, match=r"StageConfig has no field 'num_head'.*did you mean 'num_heads'"):
        ModelConfig.from_dict(values)
    with pytest.raises(InputError, match="stages must be a list"):
        ModelConfig.from_dict({"stages": 3})


@pytest.mark.parametrize("size", [(224, 224), (232, 232), (256, 192), (96, 96), (33, 65)])
def test_grids_are_those_the_model_makes(size):
    config = small_config()
    maps = SReT(config).eval().forward_intermediates(torch.zeros(1, 3, *size), intermediates_only=True)
    assert [tuple(m.shape[-2:]) for m in maps] == config.grids(size)


OTHER_VALUES = {
    "img_size": 64,
    "in_chans": 1,
    "num_classes": 7,
    "stem_stride": 4,
    "learnable_residual": False,
    "residual_scale": "passes",
    "reversible": True,
    "memory": "pass",
    "permutation": "strided",
    "drop_rate": 0.5,
    "drop_path_rate": 0.9,
    "global_pool": "max",
    "exits": "passes",
}
OTHER_STAGES = {
    "embed_dim": 32,
    "num_heads": 4,
    "num_blocks": 3,
    "groups": (4, 2, 1),
    "mlp_ratio": 3.0,
    "projection_ratio": None,
    "merge": (1,),
}


def behaviour(config: ModelConfig) -> dict[str, object]:
    """What may depend on a configuration: the tensors of a model, a prediction in training, what backward stores."""
    torch.manual_seed(0)
    model, stored = SReT(config).train(), []
    x = torch.randn(2, config.in_chans, *config.input_size)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tensor.numel()), lambda _: None):
        logits = model(x)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    return {"shapes": shapes, "logits": logits.tolist(), "stored": sum(stored)}


def test_every_field_counts():
    """A model of another value of a field is another one, or stores something else for backward."""
    base = stage(groups=(4, 2), num_blocks=2)
    config = small_config(stages=(base,), img_size=32)
    before = behaviour(config)
    assert behaviour(config) == before
    for name, value in OTHER_VALUES.items():
        assert behaviour(replace(config, **{name: value})) != before, name
    for name, value in OTHER_STAGES.items():
        assert behaviour(replace(config, stages=(replace(base, **{name: value}),))) != before, name
    assert {"stages", *OTHER_VALUES} == {field.name for field in fields(ModelConfig)}
    assert OTHER_STAGES.keys() == {field.name for field in fields(StageConfig)}
