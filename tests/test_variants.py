"""The published models: sizes to the last digit, timm's registry, compilation and export of every one."""

import csv
import json

import pytest
import timm
import torch
from conftest import DATA

from sret import InputError, SReT, model_cost
from sret.models.variants import CONFIGS, PUBLISHED, RELEASES, config_of

OFFICIAL = json.loads((DATA / "official_variants.json").read_text())
NAMES = {
    "SReT_T": "sret_t",
    "SReT_LT": "sret_lt",
    "SReT_S": "sret_s",
    "SReT_LT_16-14-1_1-1-1": "sret_lt_16_14_1",
    "SReT_T_wo_slice": "sret_t_unsliced",
    "SReT_LT_wo_slice": "sret_lt_unsliced",
    "SReT_S_wo_slice": "sret_s_unsliced",
    "SReT_T_wo_slice_384": "sret_t_unsliced_384",
    "SReT_S_wo_slice_384": "sret_s_unsliced_384",
    "SReT_S_wo_slice_512": "sret_s_unsliced_512",
}


@pytest.mark.parametrize("official", OFFICIAL)
def test_parameters_multiply_adds_and_slices_are_the_published_ones(official):
    expected, name = OFFICIAL[official], NAMES[official]
    config = config_of(name)
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert model_cost(config).parameters == expected["parameters"]
    assert model_cost(config).macs == expected["macs"]
    assert config.input_size == (expected["image_size"],) * 2
    for pass_, key in enumerate(("first", "second")):
        assert [stage.groups[pass_] for stage in config.stages] == expected["groups"][key]


def test_every_architecture_is_a_variant():
    assert set(NAMES.values()) == set(PUBLISHED)


def test_every_published_checkpoint_has_a_name():
    with (DATA / "official_zoo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RELEASES) == 16
    for row in rows:
        names = [name for name, release in RELEASES.items() if release.drive_id == row["google_drive_id"]]
        assert len(names) == 1, row
        name, release = names[0], RELEASES[names[0]]
        config = config_of(name)
        assert release.official == row["variant"]
        assert release.top1 == float(row["imagenet_top1"])
        assert config.input_size[0] == int(row["image_size"])
        assert model_cost(config).parameters / 1e6 == pytest.approx(float(row["params_M"]), abs=0.1)
        for pass_, key in enumerate(("groups_first", "groups_second")):
            slices = "-".join(str(stage.groups[pass_]) for stage in config.stages)
            assert slices == (row[key] or "1-1-1")
        assert ("dist" in name) == ("Distill" in row["variant"])
        assert ("best" in name) == (row["weights"] == "best")


def test_timm_lists_them():
    assert set(timm.list_models("sret_*")) == set(CONFIGS)
    assert set(timm.list_models("sret_*", pretrained=True)) == set(RELEASES)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_default_cfg_speaks_of_the_model(name):
    model = timm.create_model(name)
    cfg = model.default_cfg
    assert cfg["input_size"] == (3, *config_of(name).input_size)
    assert cfg["pool_size"] == config_of(name).grids()[-1]
    keys = model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in keys
    assert f"{cfg['first_conv']}.weight" in keys
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.875


def test_options_of_create_model():
    x = torch.randn(2, 1, 64, 96)
    model = timm.create_model("sret_t", num_classes=5, in_chans=1, img_size=(64, 96), drop_path_rate=0.1)
    assert isinstance(model, SReT)
    assert model(x).shape == (2, 5)
    assert model.pos_embed.weight.shape[-2:] == (8, 12)
    assert model.config.drop_path_rate == 0.1
    assert timm.create_model("sret_t", num_classes=0)(x.expand(-1, 3, -1, -1)).shape == (2, 256)
    with pytest.raises(InputError, match=r"'drop_path'.*did you mean 'drop_path_rate'"):
        timm.create_model("sret_t", drop_path=0.1)


def test_features_only():
    backbone = timm.create_model("sret_lt_unsliced", features_only=True).eval()
    assert backbone.feature_info.channels() == [64, 128, 256]
    assert backbone.feature_info.reduction() == [8, 16, 32]
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 12, 8), (128, 6, 4), (256, 3, 2)]
    two = timm.create_model("sret_lt_unsliced", features_only=True, out_indices=(0, 2))
    assert len(two(torch.randn(1, 3, 64, 64))) == 2


def test_the_error_of_a_wrong_name_or_tag_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown model 'sret_tt'.*did you mean 'sret_t'"):
        config_of("sret_tt")
    with pytest.raises(InputError, match=r"sret_s has no weights tagged 'dist_in1k'.*it has in1k"):
        config_of("sret_s.dist_in1k")


def image_for(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *config_of(name).input_size)


def check_one_graph(model: torch.nn.Module, x: torch.Tensor, backend: str) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_variant_is_one_graph(name):
    check_one_graph(timm.create_model(name).eval(), image_for(name, 1), "aot_eager")


@pytest.mark.slow
def test_sizes_the_slices_do_not_divide_are_one_graph_without_gathers_too():
    model = timm.create_model("sret_t", permutation="strided").eval()
    check_one_graph(model, torch.randn(1, 3, 232, 200), "aot_eager")


@pytest.mark.slow
def test_inductor_compiles_it():
    check_one_graph(timm.create_model("sret_t").eval(), image_for("sret_t", 1), "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_variant_exports_with_any_batch(name):
    model, x = timm.create_model(name).eval(), image_for(name)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for batch in (1, 3):
            x = image_for(name, batch)
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-4, rtol=1e-4)
    assert not [key for key in program.state_dict if key not in model.state_dict()]
