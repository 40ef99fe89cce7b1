"""`sret recursify` and its weights files: round trips, resumed runs, wrong input."""

import json
import os
import signal
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sret import InputError, recursify
from sret.bench.recovery import Quality, peak_bytes
from sret.checkpoints.card import Card, load_any, load_weights, save_weights
from sret.cli import main as cli
from sret.cli.recovery import warn_if_worse
from sret.data.config import Augmentation
from sret.data.preprocess import Preprocessing
from sret.errors import InputWarning
from sret.models.build import each_once
from sret.models.timm.config import Sharing, TimmConfig
from sret.training.recovery.config import Recovery
from sret.training.recovery.distill import Pair, compared_blocks, losses, parameter_groups

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 8, "num_classes": 10, "embed_dim": 24, "depth": 4, "num_heads": 2}
PREPROCESSING = Preprocessing(img_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


ARGS_ONLY = {key: value for key, value in ARGS.items() if key not in ("img_size", "num_classes")}


def a_card(**options):
    sharing = Sharing(**options)
    config = TimmConfig(timm=NAME, args=ARGS_ONLY, img_size=16, num_classes=10, sharing=sharing)
    return Card(config=config, preprocessing=PREPROCESSING)


def save(path, model, card):
    save_weights(path, each_once(model, model.state_dict()), card)


@pytest.mark.parametrize(
    "options",
    [
        {"passes": 2},
        {"passes": 2, "init": "mean", "rank": 3, "share": "cycle"},
        {"extra_passes": 1, "scale": "vector"},
        {"projection": True},
        {"passes": 2, "slices": (2, 1)},
    ],
)
def test_a_file_holds_each_tensor_once_and_gives_the_same_model(tmp_path, options):
    torch.manual_seed(0)
    model = recursify(timm.create_model(NAME, **ARGS), **options).eval()
    save(tmp_path / "m.safetensors", model, a_card(**options))
    loaded, card = load_any(tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert card == a_card(**options)
    stored = sum(x.numel() for x in load_file(tmp_path / "m.safetensors").values())
    assert stored == sum(p.numel() for p in model.parameters())


def changed(path, change, *, is_damaged=False):
    """Writes a file of a shared model with changed metadata or tensors."""
    model = recursify(timm.create_model(NAME, **ARGS), passes=2)
    save(path, model, a_card(passes=2))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, values = load_file(path), json.loads(metadata["sret"])
    change(tensors, values)
    metadata["sret"] = json.dumps(values)
    if not is_damaged:
        del metadata["sha256"]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: v["config"].update(timm="vit_tiny_patch16_225"), "no model 'vit_tiny_patch16_225'; did you mean"),
        (lambda t, v: v["config"].update(timm=f"{NAME}.tag"), f"no weights 'tag' of {NAME}; it has {NAME}.augreg"),
        (lambda t, v: v["config"]["args"].update(depth=6), "do not fit the model: missing blocks.4"),
        (lambda t, v: v["config"]["args"].update(depth=3000), "more than 164 tensors, which does not fit the 32 of"),
        (
            lambda t, v: (v["config"]["args"].update(depth=9999), v["config"]["sharing"].update(passes=9999)),
            "more than 500 tensors, which is more than is possible",
        ),
        (lambda t, v: v["config"]["args"].update(depth=10**9), "args: depth is 1000000000; numbers are at most"),
        (lambda t, v: v["config"]["args"].update(depth=[[10**9]]), "args: depth is .*; numbers are at most"),
        (lambda t, v: v["config"]["args"].update(depths=[1] * 101), "args: depths has more than 100 values"),
        (lambda t, v: v["config"]["sharing"].update(slices=None), "slices is None; it must be a list of whole numbers"),
        (lambda t, v: v["config"]["sharing"].update(parts={"a": 1}), "parts is {'a': 1}; it must be a list of text"),
        (lambda t, v: v["config"]["sharing"].update(share="cycle"), "do not fit the model: missing blocks.1"),
        (lambda t, v: v["config"]["sharing"].update(loops=3), "no option 'loops'"),
        (lambda t, v: v["config"]["sharing"].update(init="closest"), 'init="closest" needs images'),
        (lambda t, v: v["config"]["args"].update(embed_dim=26), "do not fit the model: .*cls_token"),
        (lambda t, v: v["config"]["args"].update(embed_dim=10**5), "do not fit the model: .*cls_token"),
        (lambda t, v: v["config"]["args"].update(wheels=4), "timm cannot make"),
        (lambda t, v: v["config"]["args"].update(checkpoint_path="x.pth"), "checkpoint_path is not an argument"),
        (lambda t, v: v["config"].update(exits="passes"), "no field 'exits'"),
        (lambda t, v: t.pop("norm.weight"), "norm.weight"),
        (lambda t, v: v.update(format=9), "by a newer version of sret"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr("sret.models.build.MAX_PARAMETERS", 500)
    changed(tmp_path / "m.safetensors", change)
    with pytest.raises(InputError, match=message) as caught:
        load_any(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds_are_told_apart(tmp_path):
    changed(tmp_path / "m.safetensors", lambda t, v: t["cls_token"].add_(1), is_damaged=True)
    with pytest.raises(InputError, match="damaged"):
        load_any(tmp_path / "m.safetensors")
    changed(tmp_path / "m.safetensors", lambda t, v: None)
    with pytest.raises(InputError, match=r"for models of sret, and the file has a .*VisionTransformer of timm"):
        load_weights(tmp_path / "m.safetensors")


COMMAND = ["--passes", "2", "--data", "digits", "--flip", "false", "--geometry", "none", "--rounds", "2"]
COMMAND += ["--batch_size", "256"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The arguments of a small model, and a file with weights that tell the digits apart a little."""
    folder = tmp_path_factory.mktemp("weights")
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10, **arguments)
    save_file(model.state_dict(), folder / "tiny.safetensors")
    return [NAME, "--model_args", json.dumps(arguments), "--weights", str(folder / "tiny.safetensors")]


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes longer than the rest; one test draws."""
    from sret.bench import recovery

    monkeypatch.setattr(recovery, "_draw", lambda *_: None)


def test_the_command_distils_and_writes_a_file_that_loads(trained, tmp_path, capsys):
    arguments = ["recursify", *trained, *COMMAND, "--extra_passes", "1", "--init", "mean", "--epochs", "1"]
    arguments += ["--scale", "vector"]
    assert cli.main([*arguments, "--out", str(tmp_path / "x")]) == 0
    assert "agreement, %" in capsys.readouterr().out
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    model, card = load_any(tmp_path / "x" / "model.safetensors")
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "x" / "model.safetensors")]) == 0
    assert f"top-1 {report['quality']['after']['top1']:.2f} %" in capsys.readouterr().out
    assert report["costs"]["shared"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["costs"]["shared"]["parameters"] < report["costs"]["original"]["parameters"]
    assert report["costs"]["shared"]["macs"] > report["costs"]["original"]["macs"]  # of the extra passes
    assert report["costs"]["shared"]["peak_bytes"] < report["costs"]["original"]["peak_bytes"]
    assert report["quality"]["original"]["agreement"] == 100
    assert card.class_names == tuple("0123456789")
    assert card.preprocessing.crop_pct == 1  # the digits are squares of one size
    assert (tmp_path / "x" / "report.png").stat().st_size > 10_000
    assert cli.main([*arguments, "--out", str(tmp_path / "x")]) == 2
    assert "add --resume auto" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figure")
def test_groups_found_from_images_are_stored(trained, tmp_path, capsys):
    options = ["--epochs", "0", "--share", "similar", "--init", "closest", "--out", str(tmp_path / "out")]
    assert cli.main(["recursify", *trained, *COMMAND, *options]) == 0, capsys.readouterr().err
    model, card = load_any(tmp_path / "out" / "model.safetensors")
    assert sum(card.config.sharing.group_sizes) == ARGS["depth"]
    assert len(card.config.sharing.group_sizes) == ARGS["depth"] // 2
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_a_resumed_run_gives_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    arguments = ["recursify", *trained, *COMMAND, "--epochs", "2", "--geometry", "affine"]
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    from sret.training.recovery import distill

    steps, step = [], distill.train_step

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 6:  # in the second epoch; each has 4 steps
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(distill, "train_step", interrupted)
    assert cli.main([*arguments, "--out", str(tmp_path / "parts")]) == 130
    assert len(steps) == 6
    assert "--resume auto" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(distill, "train_step", step)
    assert cli.main([*arguments, "--learning_rate", "0.1", "--resume", "auto", "--out", str(tmp_path / "parts")]) == 2
    text = capsys.readouterr()
    assert "settings.learning_rate was 0.001, now 0.1" in text.err
    assert not text.out  # nothing was measured before
    assert cli.main([*arguments, "--init", "closest", "--resume", "auto", "--out", str(tmp_path / "parts")]) == 2
    assert "other settings: model.sharing.init was 'first', now 'closest'" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "auto", "--out", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.usefixtures("no_figure")
def test_a_model_of_timm_may_take_grey_images(tmp_path, capsys):
    model = timm.create_model(NAME, **ARGS_ONLY, img_size=8, in_chans=1, num_classes=10)
    save_file(model.state_dict(), tmp_path / "grey.safetensors")
    arguments = json.dumps({**ARGS_ONLY, "img_size": 8, "in_chans": 1})
    files = ("--weights", str(tmp_path / "grey.safetensors"), "--out", str(tmp_path / "x"))
    assert cli.main(["recursify", NAME, "--model_args", arguments, *files, *COMMAND, "--epochs", "0"]) == 0, (
        capsys.readouterr().err
    )
    card = load_any(tmp_path / "x" / "model.safetensors")[1]
    assert (card.config.in_chans, card.preprocessing.mean) == (1, (0.5,))


@pytest.mark.usefixtures("no_figure")
def test_a_run_of_no_epochs_is_not_replaced_by_another(trained, tmp_path, capsys):
    out = tmp_path / "x"
    arguments = ["recursify", *trained, *COMMAND, "--epochs", "0", "--out", str(out), "--resume", "auto"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    before = (out / "model.safetensors").read_bytes()
    assert cli.main([*arguments, "--init", "mean"]) == 2
    assert "model.sharing.init was 'first', now 'mean'" in capsys.readouterr().err
    (out / "state.pt").unlink()
    assert cli.main([*arguments, "--init", "mean"]) == 2
    assert "model.safetensors, report.json, but no state.pt to continue from" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("no_figure")
def test_a_run_that_fails_in_its_first_epoch_can_begin_again_with_other_settings(trained, tmp_path, capsys):
    arguments = ["recursify", *trained, *COMMAND, "--epochs", "1", "--out", str(tmp_path / "x")]
    assert cli.main([*arguments, "--learning_rate", "2e9"]) == 2
    assert "use a smaller --learning_rate" in capsys.readouterr().err
    assert cli.main(arguments) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("no_figure")
def test_a_weights_file_is_taken_with_its_preprocessing(tmp_path, capsys, caplog):
    config = TimmConfig.from_dict({"timm": NAME, "args": ARGS_ONLY, "img_size": 8, "in_chans": 1, "num_classes": 10})
    how = Preprocessing(img_size=(8, 8), mean=(0.25,), std=(0.5,), crop_pct=1.0)
    model = timm.create_model(NAME, **ARGS_ONLY, img_size=8, in_chans=1, num_classes=10)
    card = Card(config=config, preprocessing=how, class_names=tuple("0123456789"))
    save(tmp_path / "plain.safetensors", model, card)
    arguments = ["recursify", str(tmp_path / "plain.safetensors"), *COMMAND, "--epochs", "0"]
    caplog.set_level("INFO")
    assert cli.main([*arguments, "--out", str(tmp_path / "x"), "--batch_size", "5000"]) == 0, capsys.readouterr().err
    assert not caplog.messages  # of timm's schedule
    shared, found = load_any(tmp_path / "x" / "model.safetensors")
    assert found.preprocessing == how
    assert found.config == replace(config, sharing=Sharing(passes=2))
    assert torch.equal(shared.cls_token, model.cls_token)
    for other, message in (
        ([str(tmp_path / "x" / "model.safetensors"), *COMMAND], "have {'passes': 2} already"),
        ([NAME, "--weights", str(tmp_path / "plain.safetensors"), *COMMAND], f"give it in place of {NAME}"),
        ([str(tmp_path / "plain.safetensors"), *COMMAND, "--model_args", "{depth: 2}"], "leave --weights and"),
    ):
        assert cli.main(["recursify", *other, "--out", str(tmp_path / "y")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "y").exists()


def test_bad_input_is_one_line(trained, tmp_path, capsys, monkeypatch):
    def error(*arguments):
        assert cli.main(["recursify", *arguments, "--out", str(tmp_path / "x")]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert not (tmp_path / "x").exists()
        return text

    assert "passes=3 does not divide 4; passes can be 2 or 4" in error(*trained, "--data", "digits", "--passes", "3")
    assert "rank has no effect without passes" in error(*trained, "--data", "digits", "--rank", "3")
    assert "has no model 'vit_tinny'" in error("vit_tinny", "--data", "digits", "--passes", "2")
    assert "share: must be one of sequence, cycle, middle, similar; given odd" in error(
        *trained, "--data", "digits", "--passes", "2", "--share", "odd"
    )
    assert "slices: must be a list, such as [7,1]; given 7,1" in error(*trained, "--data", "digits", "--slices", "7,1")
    assert "must be a mapping, such as {a: 1}; given {a" in error(NAME, "--model_args", "{a", "--data", "digits")
    other = [NAME, "--weights", trained[-1], "--data", "digits", "--passes", "2"]
    assert "should hold timm's weights for it, with 10 classes" in error(*other)
    assert "no such file" in error(NAME, "--weights", "gone.pth", "--data", "digits", "--passes", "2")
    assert "nothing would change; give --passes 2" in error(*trained, "--data", "digits", "--parts", "[blocks]")
    wheels = [NAME, "--model_args", "{wheels: 4}", *trained[3:], "--data", "digits", "--passes", "2"]
    assert "timm cannot make vit_tiny_patch16_224 with these arguments" in error(*wheels)
    for name in ("gone.safetensors", "gone.pth"):
        assert f"{name}: no such file" in error(name, "--data", "digits", "--passes", "2")
    assert f"{tmp_path}: a folder, not a file" in error(str(tmp_path), "--data", "digits", "--passes", "2")
    large = ["--data", "digits", "--passes", "2", "--batch_size", "5000"]
    monkeypatch.setattr("sret.cli.recovery.comparison", None)  # refused before anything is measured
    assert "batch_size 5000 is more than the" in error(*trained, *large)
    for label in "ab":
        (tmp_path / "two" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / "two" / label / f"{i}.png")
    assert "with 2 classes" in error(*trained, "--data", str(tmp_path / "two"), "--passes", "2")


def test_the_distance_of_equal_models_is_zero_and_features_do_not_depend_on_the_scale():
    original = timm.create_model(NAME, **ARGS).eval()
    blocks = compared_blocks(original, 2, ())
    assert blocks == ("blocks.1", "blocks.3")
    images = torch.randn(2, 3, 16, 16)
    _, distance, agreement = losses(Pair(original, recursify(original), PREPROCESSING, blocks), images).tolist()
    assert (distance, agreement) == (0, 1)
    shared = recursify(original, passes=2).eval()
    _, distance, _ = losses(Pair(original, shared, PREPROCESSING, blocks), images).tolist()
    assert 0 < distance < 4


def test_training_that_makes_a_model_worse_is_told():
    with pytest.warns(InputWarning, match="lowered the agreement from 79.17 % to 62.50 %"):
        warn_if_worse(Quality(37.5, 79.17), Quality(33.3, 62.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_worse(Quality(37.5, 79.17), Quality(33.3, 79.17))


def test_the_peak_counts_what_exists_at_the_same_time():
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    weights = 8 * 16 + 16 + 16 * 4 + 4
    assert peak_bytes(layers, torch.zeros(1, 8)) == 4 * (weights + 8 + 16 + 4)
    layers.append(nn.Identity()).append(nn.Linear(4, 4))  # the 16 values are freed before the last layer
    assert peak_bytes(layers, torch.zeros(1, 8)) == 4 * (weights + 20 + 8 + 16 + 4)
    layers[3] = nn.Linear(4, 20)
    assert peak_bytes(layers, torch.zeros(1, 8)) == 4 * (weights + 100 + max(8 + 16 + 4, 8 + 4 + 20))
    original = timm.create_model(NAME, **ARGS)
    weights = sum(p.nbytes for p in original.blocks[:2].parameters())
    peaks = [peak_bytes(model, torch.zeros(1, 3, 16, 16)) for model in (original, recursify(original, passes=2))]
    assert peaks[0] - peaks[1] == weights


def test_gates_have_a_learning_rate_of_their_own():
    model = recursify(timm.create_model(NAME, **ARGS), passes=2, extra_passes=1)
    groups = parameter_groups(model, Recovery(learning_rate=0.01, gate_rate=5, augmentation=Augmentation()))
    assert groups[-1]["lr"] == 0.05
    assert len(groups[-1]["params"]) == 4
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
