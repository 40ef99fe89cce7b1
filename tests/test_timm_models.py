"""Models of timm in recipes and weights files: trained, resumed, evaluated, exported and loaded like models of sret."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_recursify import IMAGES, PLAIN, WINDOWS

import sret
from sret import InputError
from sret.checkpoints.card import Card, load_any, save_weights
from sret.checkpoints.timm_init import initialise
from sret.cli import main as cli
from sret.data.preprocess import Preprocessing
from sret.models.build import build, each_once, everywhere, owners_of, totals_of
from sret.models.timm.config import TimmConfig
from sret.training.distillation.teacher import load_teacher
from sret.training.optim import make_ema

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
MODEL = {
    "timm": "vit_tiny_patch16_224",
    "img_size": 8,
    "args": SMALL,
    "sharing": {"passes": 2, "init": "mean", "rank": 2},
}
RECIPE = {"model": MODEL, "epochs": 2, "warmup_epochs": 1, "batch_size": 256, "augmentation": {"geometry": "affine"}}
# Arguments that make a small member by its name; the others have fixed sizes, and so are larger.
ARGS = {
    **dict.fromkeys(("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"), PLAIN),
    **dict.fromkeys(("beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"), PLAIN),
    **dict.fromkeys(("vit_small_patch16_dinov3", "cait_xxs24_224"), PLAIN),
    "xcit_nano_12_p8_224": {**PLAIN, "num_heads": 4},
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"), WINDOWS),
    "pvt_v2_b0": {"img_size": 32, "num_classes": 5},
    "pit_ti_224": {"img_size": 32, "num_classes": 5},
    "tiny_vit_5m_224": {"img_size": 32, "num_classes": 5},
    "mixer_s32_224": {"img_size": 32, "num_classes": 5},
    "resmlp_12_224": {"img_size": 32, "num_classes": 5},
    "convmixer_768_32": {"img_size": 32, "num_classes": 5},
    "convnext_atto": {"img_size": 32, "num_classes": 5},
}

VIT, BEIT = "vit_tiny_patch16_224", "beit_base_patch16_224"

FILES = ("best.safetensors", "last.safetensors")


def config_of(name, **sharing):
    own = {"img_size": ARGS[name]["img_size"], "num_classes": ARGS[name]["num_classes"]}
    args = {key: value for key, value in ARGS[name].items() if key not in own}
    return TimmConfig.from_dict({"timm": name, "args": args, "sharing": sharing, **own})


def save(path, model, config):
    card = Card(config=config, preprocessing=Preprocessing(img_size=config.input_size, mean=(0.5,) * 3, std=(0.5,) * 3))
    save_weights(path, each_once(model, model.state_dict()), card)
    return card


@pytest.fixture
def run(capsys, quick_report):
    """Runs a command; returns its exit code and what it wrote."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return code, found.out + found.err

    return run


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with changed settings; returns its path."""

    def recipe(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**RECIPE, **changes}))  # JSON is YAML too
        return path

    return recipe


@pytest.mark.parametrize("name", ARGS)
def test_a_file_of_any_family_gives_the_same_model(name, tmp_path):
    torch.manual_seed(0)
    config = config_of(name, passes=2)
    model = build(config).eval()
    card = save(tmp_path / "m.safetensors", model, config)
    loaded, found = load_any(tmp_path / "m.safetensors")
    assert found.to_json() == card.to_json()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    parameters, macs = totals_of(config)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert macs > 0


def test_loading_spends_no_time_on_corrections_that_the_file_has(tmp_path, monkeypatch):
    config = config_of("vit_tiny_patch16_224", passes=2, rank=2)
    model = build(config).eval()
    save(tmp_path / "w.safetensors", model, config)
    decompose = torch.linalg.svd

    def on_meta_only(matrix, **options):
        assert matrix.is_meta
        return decompose(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", on_meta_only)
    assert torch.equal(load_any(tmp_path / "w.safetensors")[0](IMAGES), model(IMAGES))


def test_shared_tensors_are_named_once_and_come_back_everywhere():
    model = build(config_of("vit_tiny_patch16_224", passes=2))
    once = each_once(model, model.state_dict())
    assert len({id(x) for x in model.state_dict(keep_vars=True).values()}) == len(once) < len(model.state_dict())
    assert not [name for name in once if owners_of(model)[name] != name]
    whole = everywhere(model, once)
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(whole[name], x) for name, x in model.state_dict().items())


def test_a_moving_average_counts_shared_weights_once():
    model = build(config_of("vit_tiny_patch16_224", passes=2))
    ema = make_ema(model, 0.9)
    before = ema.module.get_parameter("blocks.0.mlp.fc1.weight").clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    assert torch.allclose(ema.module.get_parameter("blocks.0.mlp.fc1.weight"), before + 0.1)


def test_the_commands_take_a_model_of_timm(recipe, run, tmp_path):
    out, best = tmp_path / "out", tmp_path / "out" / "best.safetensors"
    code, text = run("train", "--config", recipe(ema_decay=0.9), "--out", out)
    assert code == 0, text
    assert "vit_tiny_patch16_224" in text
    model = sret.load(best)
    assert len(load_file(best)) == len(set(owners_of(model).values())) < len(model.state_dict())
    assert model.pretrained_cfg["num_classes"] == 10
    results = [run("eval", "--checkpoint", best)]
    assert run("export", best, tmp_path / "m.onnx")[0] == 0
    results.append(run("eval", "--checkpoint", tmp_path / "m.onnx"))
    assert run("convert", best, tmp_path / "again.safetensors")[0] == 0
    results.append(run("eval", "--checkpoint", tmp_path / "again.safetensors"))
    assert [code for code, _ in results] == [0, 0, 0]
    assert len({text for _, text in results}) == 1
    for path in (best, tmp_path / "m.onnx"):
        code, text = run("info", path)
        assert (code, "shared blocks: {'passes': 2, 'init': 'mean', 'rank': 2}" in text) == (0, True), text
    code, text = run("features", "--data", "digits", "--checkpoint", best, "--out", tmp_path / "f.parquet")
    assert (code, "24 features" in text) == (0, True), text
    for arguments in (("convert", best, tmp_path / "m.pth"), ("push", best, "me/mine", "--out", tmp_path / "p")):
        code, text = run(*arguments)
        assert (code, "this is for models of sret" in text, text.count("\n")) == (2, True, 1), text
    for option in (("--passes", 1), ("--exit", 0.5)):
        code, text = run("eval", "--checkpoint", best, *option)
        assert (code, text.count("\n")) == (2, 1), text


def test_a_stopped_run_ends_with_the_same_bits(recipe, run, tmp_path):
    path = recipe(ema_decay=0.9)
    assert run("train", "--config", path, "--out", tmp_path / "whole")[0] == 0
    assert run("train", "--config", path, "--out", tmp_path / "parts", "--max_steps", 5)[0] == 0
    code, text = run("train", "--config", path, "--out", tmp_path / "parts", "--resume", "auto")
    assert (code, "at step 5" in text) == (0, True), text
    for name in FILES:
        whole, parts = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_weights_to_start_from(recipe, run, tmp_path, monkeypatch):
    torch.manual_seed(1)
    plain = {**MODEL, "sharing": {}}
    original = timm.create_model(MODEL["timm"], **SMALL, img_size=8, num_classes=10, in_chans=1)
    save_file(original.state_dict(), tmp_path / "timm.safetensors")
    wanted = sret.recursify(original, **MODEL["sharing"]).state_dict()
    start = ("--max_steps", 1, "--learning_rate", 1e-9, "--epochs", 2)

    def reused(source, name, model=MODEL):
        code, text = run("train", "--config", recipe(model=model), "--init", source, "--out", tmp_path / name, *start)
        assert code == 0, text
        loaded = sret.load(tmp_path / name / "last.safetensors").state_dict()
        return text, all(torch.allclose(loaded[key], wanted[key], atol=1e-5) for key in wanted if key in loaded)

    assert reused(tmp_path / "timm.safetensors", "a")[1]  # timm's weights, shared afterwards
    assert reused(tmp_path / "timm.safetensors", "b", plain)[0].startswith("Init    weights of")
    assert reused(tmp_path / "b" / "last.safetensors", "c")[1]  # ours without shared blocks
    assert reused(tmp_path / "a" / "last.safetensors", "d")[1]  # ours, shared in the same way
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: original if pretrained else create(*a, **k)
    )
    assert reused("pretrained", "e")[1]


def test_options_change_one_value_of_a_mapping(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr("sret.training.loop.train", lambda recipe, *_, **__: seen.append(recipe))
    line = ["--model.args.depth=8", "--model.sharing.rank", "4", "--model.sharing.slices", "[2,1]"]
    assert cli.main(["train", "--config", str(recipe()), "--out", "x", *line, "--model.img_size", "16"]) == 0
    changed = {"args": {**SMALL, "depth": 8}, "sharing": {"passes": 2, "init": "mean", "rank": 4, "slices": [2, 1]}}
    assert seen[0].model == {**MODEL, **changed, "img_size": 16}
    line = ["--model.timm", "vit_tiny_patch16_224", "--model.sharing.passes", "2", "--model.sharing.rank", "4"]
    assert cli.main(["train", "--out", "x", *line]) == 0
    assert seen[1].model == {"timm": "vit_tiny_patch16_224", "sharing": {"passes": 2, "rank": 4}}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_timm_for_other_classes_has_a_new_classifier(suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    config = config_of("vit_tiny_patch16_224", passes=2)
    original = timm.create_model(config.timm, **ARGS[config.timm])
    (save_file if suffix == ".safetensors" else torch.save)(original.state_dict(), path)
    model, lines = initialise(replace(config, num_classes=3), path)
    assert lines == [f"weights of {path}", "head.weight, head.bias: new, for 3 classes"]
    assert torch.equal(model.get_parameter("blocks.1.mlp.fc1.weight"), original.blocks[0].mlp.fc1.weight)
    with pytest.raises(InputError, match=r"m\..*: these weights do not fit the model: missing blocks.4"):
        initialise(replace(config, args={**config.args, "depth": 6}), path)
    if suffix == ".pth":
        torch.save({"epoch": 3, "rows": [1]}, path)
        with pytest.raises(InputError, match=r"m.pth: not weights of timm, it has epoch; rows"):
            initialise(config, path)


@pytest.mark.parametrize("is_timm", [True, False])
@pytest.mark.parametrize(("name", "position"), [(VIT, "pos_embed"), (BEIT, "relative_position_bias_table")])
def test_weights_of_another_image_size_are_resized(name, position, is_timm, tmp_path):
    path, config = tmp_path / "m.safetensors", config_of(name)
    original = build(config)
    for key, values in original.state_dict().items():
        if key.endswith(position):
            values.copy_(values[..., :1, :].clone())  # the same at every position, so also between these
    if is_timm:
        save_file(original.state_dict(), path)
    else:
        save(path, original, config)
    model, lines = initialise(replace(config, img_size=2 * ARGS[name]["img_size"]), path)
    assert re.fullmatch(rf".*{position}.*: resized to the model's image size", lines[1])
    for key, values in original.state_dict().items():
        loaded = model.get_parameter(key)
        assert (loaded.shape == values.shape) != key.endswith(position)
        torch.testing.assert_close(loaded, values[..., :1, :].expand_as(loaded) if key.endswith(position) else values)


def test_a_classifier_of_another_size_is_new(tmp_path):
    config = config_of("deit_tiny_distilled_patch16_224", passes=2)
    save(tmp_path / "m.safetensors", build(config), config)
    model, lines = initialise(replace(config, num_classes=3), tmp_path / "m.safetensors")
    assert model.head.weight.shape == model.head_dist.weight.shape == (3, 32)
    assert lines[1] == "head.weight, head.bias, head_dist.weight, head_dist.bias: new, for 3 classes"


def test_bad_input_is_one_line(recipe, run, tmp_path):
    def error(*arguments, **changes):
        code, text = run("train", "--config", recipe(**changes), "--out", tmp_path / "x", *arguments)
        assert (code, text.count("\n")) == (2, 1), text
        assert not (tmp_path / "x").exists()
        return text

    assert "model.sharing.passes: not YAML" in error("--model.sharing.passes", "[")
    assert "passes is 'two'; it must be a whole number" in error("--model.sharing.passes", "two")
    assert "did you mean '--model.sharing'?" in error("--sharing", "2")
    assert "did you mean 'vit_tiny_patch16_224'" in error(model={"timm": "vit_tinny_patch16_224"})
    assert "sret_t is a model of sret, whose blocks share weights already" in error(model={"timm": "sret_t"})
    assert "no option 'loops'" in error(model={**MODEL, "sharing": {"loops": 2}})
    assert "has name and also timm" in error(model={**MODEL, "name": "sret_t"})
    assert "TimmConfig has no field 'stem_stride'" in error(model={**MODEL, "stem_stride": 2})
    assert "give img_size as a setting" in error(model={**MODEL, "args": {"img_size": 8}})
    assert "pretrained is not an argument" in error(model={**MODEL, "args": {"pretrained": True}})
    assert "`sret recursify` finds groups" in error(model={**MODEL, "sharing": {"passes": 2, "share": "similar"}})
    assert "pass_weights and recursion_start are for models of sret" in error(recursion_start=0.5)
    assert "fsdp is for models of sret" in error("--fsdp", "true")
    assert "init pretrained is for models of timm" in error("--init", "pretrained", model={"name": "sret_deep_20_32"})
    assert "--model.timm deit_tiny_patch16_224" in error(model="deit_tiny_patch16_224")
    save(tmp_path / "m.safetensors", build(TimmConfig.from_dict(MODEL)), TimmConfig.from_dict(MODEL))
    other = {**MODEL, "in_chans": 3, "sharing": {"passes": 4}}
    for change, message in (
        ({"sharing": {2: 2}}, "recursify has no option 2"),
        ({2: 2}, r"TimmConfig has no field 2 \(it has timm"),
        ({"args": {2: 2}}, r"args is {2: 2}; it must be a mapping of names to values"),
    ):
        with pytest.raises(InputError, match=message):
            TimmConfig.from_dict({**MODEL, **change})
    with pytest.raises(InputError, match=r"its blocks have {'passes': 2, .*those of the model {'passes': 4}"):
        initialise(TimmConfig.from_dict(other), tmp_path / "m.safetensors")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_file_with_code_is_refused_before_timm_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "args": Evil()}, "evil.pth")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm read the file"))
    for read in (
        lambda: initialise(TimmConfig.from_dict(MODEL), Path("evil.pth")),
        lambda: load_teacher("test_vit", Path("evil.pth"), ("a", "b")),
    ):
        with pytest.raises(InputError, match=r"evil.pth: refused, it holds \S*system"):
            read()
    assert not Path("evil").exists()
