"""Elastic passes: a model runs the first passes of its recursions, and is trained for any number of them."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_train import MODEL, RECIPE, STEPS

from sret import InputError, ModelConfig, SReT, StageConfig, fuse
from sret.checkpoints.adapt import with_passes
from sret.checkpoints.card import Card, save_weights
from sret.cli.main import main
from sret.data.preprocess import Preprocessing
from sret.elastic import ExitPolicy
from sret.errors import InputWarning
from sret.export.runtime import load_model
from sret.training import step
from sret.training.config import RuntimeConfig
from sret.training.distributed import make_accelerator
from sret.training.loop import train
from sret.training.run_dir import BEST, LAST
from sret.training.setup import Setup


def config_of(*groups: tuple[int, ...]) -> ModelConfig:
    stages = (StageConfig(embed_dim=8 * 2**i, num_heads=2, num_blocks=2, groups=g) for i, g in enumerate(groups))
    return ModelConfig(stages=tuple(stages), img_size=64, num_classes=10)


CONFIG = config_of((2, 1, 1), (2, 2))
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ELASTIC = replace(RECIPE, pass_weights=(1, 1))


def make_model() -> SReT:
    torch.manual_seed(0)
    model = SReT(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("passes", "expected"), [(1, (1, 1)), (np.int64(2), (2, 2)), ((3, 1), (3, 1)), ([1, np.int8(2)], (1, 2))]
)
def test_the_first_passes_are_a_model_that_has_no_others(passes, expected):
    model, short = make_model(), SReT(CONFIG.first_passes(passes)).eval()
    names = short.state_dict().keys()
    short.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    whole = model(IMAGES)
    found = model(IMAGES, passes=passes)
    assert torch.equal(found, short(IMAGES))
    assert not torch.allclose(found, whole)
    assert torch.equal(model(IMAGES), whole), "a call must not change the model"
    model.set_passes(passes)
    assert model.passes == expected
    assert torch.equal(model(IMAGES), found)
    assert torch.allclose(fuse(model)(IMAGES), found, atol=1e-5)
    model.set_passes(3)
    assert CONFIG.passes_by_stage(3) == (3, 2) == model.passes
    assert torch.equal(model(IMAGES), whole)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (0, "passes is 0; the model has 3: use 1 to 3"),
        (4, "passes is 4; the model has 3"),
        ((1,), "give one number, or 2"),
        ((1, 3), "stage 2 has 2: use 1 to 2"),
        (True, "passes is True"),
        (1.0, "passes is 1.0; the model has 3: use 1 to 3"),
        ((1.0, 1), "stage 1 has 3: use 1 to 3"),
    ],
)
def test_a_number_that_the_model_does_not_have_is_refused(passes, message):
    with pytest.raises(InputError, match=message):
        make_model().set_passes(passes)


def test_more_passes_are_shorter_steps_of_all_of_them():
    model = make_model()
    card = Card(config=CONFIG, preprocessing=Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.warns(InputWarning, match=r"trained with \(3, 2\) passes; 4 are untrained"):
        longer, found = with_passes(model, card, 4)
    assert longer.passes == (4, 4)
    assert found.config.stages[0].groups == (2, 1, 1, 1)
    assert torch.isfinite(longer(IMAGES)).all()
    with pytest.warns(InputWarning, match=r"trained with all passes, \(3, 2\); with 1 they are less accurate"):
        shorter, found = with_passes(model, card, 1)
    assert (shorter.passes, found.config.max_passes) == ((1, 1), 1)


def test_exits_after_added_passes_are_left_out():
    config = replace(CONFIG, exits="passes")
    card = Card(
        config=config,
        preprocessing=Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3),
        exit_policy=ExitPolicy(threshold=0.5),
    )
    with pytest.warns(InputWarning, match="4 are untrained; exits are left out"):
        longer, found = with_passes(SReT(config).eval(), card, 4)
    assert (len(longer.exits), found.config.exits, found.exit_policy) == (0, "none", None)
    with pytest.warns(InputWarning):
        assert with_passes(SReT(config).eval(), card, 1)[1].exit_policy == card.exit_policy
    config = replace(CONFIG, exits="stages")
    with pytest.warns(InputWarning, match="the stored threshold for early exit was chosen without them"):
        found = with_passes(SReT(config).eval(), replace(card, config=config), 4)[1]
    assert found.exit_policy == card.exit_policy


@pytest.mark.parametrize("passes", [5.0, [5.0, 1], [None, 1], [5, 0], True, "3"])
def test_a_card_with_passes_that_are_no_numbers_is_refused(passes):
    card = Card(config=CONFIG, preprocessing=Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(InputError, match="give a whole number >= 1, or one for each stage"):
        with_passes(make_model(), card, passes)
    with pytest.raises(InputError, match="makes 40,002 layers"):
        with_passes(make_model(), card, [20_000, 1])


@pytest.mark.usefixtures("quick_report")
def test_a_run_resumes_before_its_first_step_with_all_passes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Setup, "passes_of", lambda _, step: 1 if step < 2 else None)
    train(ELASTIC, tmp_path / "run", max_steps=1)
    train(ELASTIC, tmp_path / "run", resume="auto", max_steps=3)
    train(ELASTIC, tmp_path / "whole", max_steps=3)
    expected = load_file(tmp_path / "whole" / LAST)
    assert all(torch.equal(value, expected[key]) for key, value in load_file(tmp_path / "run" / LAST).items())


def test_predictions_of_all_passes_have_the_temperature_of_the_loss():
    model = make_model()
    setup = SimpleNamespace(
        model=model, accelerator=Accelerator(), temperature=4.0, start_training=model.train, graph=None
    )
    expected = (model(IMAGES) / 4).softmax(1)
    model.set_passes(1)
    torch.testing.assert_close(Setup.predictions_of_all_passes(setup, IMAGES), expected)
    assert (model.passes, model.training) == ((1, 1), True)


@pytest.mark.usefixtures("quick_report")
def test_training_draws_passes_and_every_number_learns(tmp_path: Path, monkeypatch):
    drawn, lessons = [], []
    draw, teach = step.gradients, Setup.predictions_of_all_passes

    def watched(setup, images, targets):
        drawn.append(setup.model.passes[0])
        assert setup.model.training
        return draw(setup, images, targets)

    def predictions(setup, images):
        found = teach(setup, images)
        with torch.no_grad():
            expected = copy.deepcopy(setup.model).eval()(images, passes=2).softmax(1)
        torch.testing.assert_close(found, expected)
        lessons.append(setup.model.passes[0])
        return found

    monkeypatch.setattr(step, "gradients", watched)
    monkeypatch.setattr(Setup, "predictions_of_all_passes", predictions)
    train(ELASTIC, tmp_path / "whole")
    assert set(drawn) == {1, 2}
    assert len(drawn) == STEPS
    assert lessons == [1] * drawn.count(1)
    for stop in (2, 5):
        train(ELASTIC, tmp_path / "run", resume="auto", max_steps=stop)
    train(ELASTIC, tmp_path / "run", resume="auto")
    for file in (LAST, BEST):
        expected = load_file(tmp_path / "whole" / file)
        assert all(torch.equal(value, expected[key]) for key, value in load_file(tmp_path / "run" / file).items())


def test_weights_that_cannot_be_drawn_are_refused():
    for weights, message in {
        (1,): "give 2 numbers",
        (1, 0): "> 0 for the last",
        (-1, 1): "use numbers >= 0",
        (1e308, 1e308): "of finite sum",
        (float("nan"), 1): "use numbers >= 0",
    }.items():
        with pytest.raises(InputError, match=message):
            replace(RECIPE, pass_weights=weights)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="pass_weights is"):
        make_accelerator(ELASTIC, RuntimeConfig(), tmp_path)


def test_commands_run_the_first_passes(tmp_path: Path, capsys):
    model = SReT(MODEL).eval()
    card = Card(
        config=MODEL,
        preprocessing=Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,)),
        training={"recipe": {"pass_weights": [1, 1]}},
    )
    path = tmp_path / "model.safetensors"
    save_weights(path, model.state_dict(), card)
    losses = []
    for passes in ("2", "1", "[1,2]"):
        assert main(["eval", "--checkpoint", str(path), "--data", "digits", "--passes", passes, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert len(set(losses)) == 3
    for wrong in ("passes=[2,,1]", "passes=two", "passes=[]"):
        assert main(["bench", f"{path}:{wrong}"]) == 2
        assert "write passes=2, or a number for each stage" in capsys.readouterr().err
    assert main(["bench", f"{path}:exit=auto"]) == 2
    assert "the only option of a file is passes" in capsys.readouterr().err
    assert main(["export", str(path), str(tmp_path / "one.onnx"), "--passes", "1"]) == 0
    assert main(["bench", f"{path}:passes=2", f"{path}:passes=[1,2]", "--json", "--rounds", "1"]) == 0
    capsys.readouterr()
    exported, found = load_model(tmp_path / "one.onnx")
    images = torch.randn(2, 1, 16, 16)
    assert found.config.max_passes == 1
    assert torch.allclose(exported(images), model(images, passes=1), atol=1e-4)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(tmp_path / "one.onnx"), "--data", "digits", "--passes", "1"]) == 2
    assert "whose passes are fixed" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", str(path), "--data", "digits", "--passes", "99999"]) == 2
    assert "passes is 99999, which makes " in capsys.readouterr().err


@pytest.mark.usefixtures("quick_report")
def test_a_step_with_fewer_passes_has_targets_of_all_passes(tmp_path: Path, monkeypatch):
    seen = {}
    monkeypatch.setattr(Setup, "passes_of", lambda _setup, _step: 1)
    monkeypatch.setattr(Setup, "predictions_of_all_passes", lambda setup, images: torch.eye(10)[[3] * len(images)])

    def stop(setup, images, targets):
        seen["targets"] = targets
        raise InterruptedError

    monkeypatch.setattr(step, "gradients", stop)
    for share in (0.0, 0.5):
        monkeypatch.setattr(step, "SHARE_OF_ALL_PASSES", share)
        with pytest.raises(InterruptedError):
            train(ELASTIC, tmp_path / str(share))
        seen[share] = seen["targets"]
    torch.testing.assert_close(seen[0.5], (seen[0.0] + torch.eye(10)[3]) / 2)
