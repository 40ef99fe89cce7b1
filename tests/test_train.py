"""Training by its properties: it learns, resumes to the bit, selects on validation only, and overwrites nothing."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file
from test_data import make_folder

from sret import InputError, ModelConfig, StageConfig, run
from sret.checkpoint import load_state, load_weights
from sret.optim import adamw, cosine_with_warmup
from sret.recipe import TrainConfig, changes
from sret.run import BEST, CONTENTS, LAST, METRICS, STATE
from sret.train import train
from sret.variants import config_of

MODEL = ModelConfig(
    stages=(
        StageConfig(embed_dim=16, num_heads=2, num_blocks=1, groups=(4, 2), mlp_ratio=2.0),
        StageConfig(embed_dim=32, num_heads=2, num_blocks=1, groups=(1, 1), mlp_ratio=2.0),
    ),
    img_size=16,
    in_chans=1,
    num_classes=10,
    stem_stride=2,
    drop_rate=0.1,
    drop_path_rate=0.2,
)
RECIPE = TrainConfig(
    model=MODEL, epochs=2, batch_size=256, learning_rate=3e-3, warmup_epochs=0.5, augmentation="affine"
)
STEPS = 2 * (1222 // 256)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / LAST)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(RECIPE, out)
    return out


def test_a_run_leaves_what_it_promises(whole):
    assert {p.name for p in whole.iterdir()} == set(CONTENTS)
    rows = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["step"] == STEPS
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    for name in CONTENTS[-2:]:
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    model, card = load_weights(whole / BEST)
    assert model.config == MODEL
    assert card.class_names == tuple("0123456789")
    assert card.training["recipe"]["epochs"] == 2
    best = max(rows, key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert card.training["metrics"] == best


@pytest.mark.parametrize("stops", [[3], [4], [1, 2, 5, 7]])
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(whole, tmp_path, stops):
    for stop in stops:
        train(RECIPE, tmp_path / "run", resume="auto", max_steps=stop)
        assert load_state(tmp_path / "run" / STATE)["step"] == stop
        torch.manual_seed(stop)  # what happens between has no say
        torch.rand(stop)
    train(RECIPE, tmp_path / "run", resume="auto")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "run").items())
    best = load_file(whole / BEST)
    assert all(torch.equal(tensor, best[key]) for key, tensor in load_file(tmp_path / "run" / BEST).items())

    def numbers(out: Path) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]

    assert numbers(tmp_path / "run") == numbers(whole)


def test_workers_do_not_change_the_result(whole, tmp_path):
    train(RECIPE, tmp_path / "run", num_workers=2, max_steps=STEPS)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "run").items())


def after_one_step(out: Path, **changes: object) -> dict[str, torch.Tensor]:
    train(replace(RECIPE, **changes), out, max_steps=1)
    return weights(out)


def test_every_setting_counts(tmp_path):
    """One step under another value of each setting ends elsewhere; under the same values it ends in the same bits."""
    settings = {
        "seed": 1,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "warmup_epochs": 0,
        "weight_decay": 5.0,
        "label_smoothing": 0.0,
        "clip_grad": 1e-6,
        "augmentation": "none",
        "mixed_precision": "bf16",
    }
    plain = after_one_step(tmp_path / "plain")
    again = after_one_step(tmp_path / "again")
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    for name, value in settings.items():
        changed = after_one_step(tmp_path / name, **{name: value})
        assert not torch.equal(changed["head.weight"], plain["head.weight"]), name


def test_the_rate_follows_the_schedule(tmp_path):
    recipe = replace(RECIPE, epochs=3, warmup_epochs=1)
    seen = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        train(recipe, tmp_path / "run")
    assert seen == [recipe.learning_rate * cosine_with_warmup(k, 12, 4) for k in range(12)]
    assert seen[-1] < 0.1 * max(seen)


def test_a_run_killed_while_saving_goes_on_to_the_same_bits(whole, tmp_path):
    """SIGKILL in the middle of writing a file, at each file of the first epoch's save in turn."""
    script = """
import os, signal, sys
from pathlib import Path
from sret import checkpoint
from test_train import RECIPE
from sret.train import train
written = 0
fsync = os.fsync
def kill(fd):
    global written
    written += 1
    if written == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)
os.fsync = kill
train(RECIPE, Path(sys.argv[1]), resume="auto")
"""
    expected = weights(whole)
    for write in (1, 3, 4, 6):  # the first state's metrics; then last, best and state of epoch 1
        out = tmp_path / str(write)
        command = [sys.executable, "-c", script, str(out), str(write)]
        killed = subprocess.run(command, capture_output=True, cwd=Path(__file__).parent, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        train(RECIPE, out, resume="auto")
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(out).items())
        assert {path.name for path in out.iterdir()} == set(CONTENTS)


def test_a_run_that_did_no_step_yet_can_be_begun_again(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, tmp_path / "run")
    assert load_state(tmp_path / "run" / STATE)["step"] == 0  # written before any work
    train(replace(RECIPE, seed=3), tmp_path / "run", max_steps=1)
    assert load_state(tmp_path / "run" / STATE)["config"]["seed"] == 3


def test_folders_that_lead_astray_are_refused(tmp_path):
    folder = make_folder(tmp_path / "photos", {"cat": 9, "dog": 9})
    recipe = TrainConfig(model=small_config(num_classes=2), data=f"{folder}/", batch_size=4)
    assert recipe.data == str(folder)
    with pytest.raises(InputError, match=r"run lies in the data"):
        train(recipe, folder / "runs" / "run")
    make_folder(tmp_path / "deep" / "one", {"cat": 9})
    with pytest.raises(InputError, match="has one class, 'cat'"):
        train(replace(recipe, data=str(tmp_path / "deep" / "one")), tmp_path / "run")


def test_git_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.versions()["commit"] == ""


def test_data_that_changed_is_not_resumed(tmp_path):
    folder = make_folder(tmp_path / "photos", {"cat": 9, "dog": 9})
    recipe = TrainConfig(model=small_config(num_classes=2), data=str(folder), epochs=4, batch_size=4)
    train(recipe, tmp_path / "run", max_steps=1)
    (folder / "cat").rename(folder / "zebra")
    with pytest.raises(InputError, match=r"has changed since .* was begun: .*class_names was \['cat', 'dog'\]"):
        train(recipe, tmp_path / "run", resume="auto")


def test_a_finished_run_is_only_reported(whole):
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.suffix != ".png"}
    assert train(RECIPE, whole, resume="auto") == whole / BEST
    assert {p.name: p.read_bytes() for p in whole.iterdir() if p.suffix != ".png"} == before


def test_nothing_of_another_run_is_overwritten(whole, tmp_path):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    with pytest.raises(InputError, match=r"holds a run already \(step 8 of 8\); add --resume auto"):
        train(RECIPE, whole)
    with pytest.raises(InputError, match=r"begun with another recipe: learning_rate was 0.003, now 0.1"):
        train(replace(RECIPE, learning_rate=0.1), whole, resume="auto")
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / BEST).write_bytes(b"precious")
    with pytest.raises(InputError, match=r"holds best.safetensors of another run, without its state"):
        train(RECIPE, tmp_path / "half", resume="auto")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        train(RECIPE, tmp_path / "file")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / STATE).write_bytes((whole / STATE).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"state.pt: not a PyTorch checkpoint, or"):
        train(RECIPE, tmp_path / "cut", resume="auto")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(InputError, match=r"the loss became (nan|inf) at step \d+ \(epoch \d\).*lower learning_rate"):
        train(replace(RECIPE, learning_rate=1e12, warmup_epochs=0, epochs=8), tmp_path / "run")


def test_model_and_data_must_fit(tmp_path):
    with pytest.raises(InputError, match=r"the model has 7 classes, digits has 10; set model.num_classes to 10"):
        train(replace(RECIPE, model=replace(MODEL, num_classes=7)), tmp_path / "run")
    with pytest.raises(InputError, match=r"the model takes 3 channels, digits has 1; set model.in_chans to 1"):
        train(replace(RECIPE, model=replace(MODEL, in_chans=3)), tmp_path / "run")
    with pytest.raises(InputError, match="batch_size 5000 is more than the 1222 training pictures"):
        train(replace(RECIPE, batch_size=5000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_photos_and_weights_to_start_from(tmp_path):
    make_folder(tmp_path / "photos", {"cat": 12, "dog": 12, "emu": 12})
    model = small_config(num_classes=3)
    recipe = TrainConfig(model=model, data=str(tmp_path / "photos"), epochs=1, batch_size=8, warmup_epochs=0)
    best = train(recipe, tmp_path / "run")
    assert load_weights(best)[1].class_names == ("cat", "dog", "emu")
    tuned = replace(recipe, init=best, learning_rate=1e-9)
    train(tuned, tmp_path / "tuned", max_steps=1)
    start, end = load_file(best)["head.weight"], weights(tmp_path / "tuned")["head.weight"]
    torch.testing.assert_close(end, start, atol=1e-6, rtol=0)


def test_a_named_variant_takes_classes_and_channels_from_the_data(tmp_path):
    train(TrainConfig(model="sret_t", data="digits", batch_size=4, augmentation="none"), tmp_path, max_steps=1)
    config = load_weights(tmp_path / LAST)[0].config
    assert (config.num_classes, config.in_chans) == (10, 1)


def test_a_named_variant_can_be_changed():
    recipe = TrainConfig(model={"name": "sret_t", "img_size": 96, "drop_path_rate": 0.1})
    config = recipe.model_config(num_classes=7, in_chans=1)
    assert (config.num_classes, config.in_chans, config.input_size, config.drop_path_rate) == (7, 1, (96, 96), 0.1)
    assert config.stages == config_of("sret_t").stages
    assert TrainConfig(model="sret_t").model_config(7, 1).num_classes == 7
    assert TrainConfig(model=MODEL.to_dict()).model == MODEL
    with pytest.raises(InputError, match="did you mean 'img_size'"):
        TrainConfig(model={"name": "sret_t", "imgsize": 96})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("label_smoothing", 1.0),
        ("seed", -1),
        ("seed", 2**31),
        ("warmup_epochs", -1),
        ("weight_decay", -0.1),
        ("clip_grad", 0.0),
    ],
)
def test_recipes_that_cannot_be_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}"):
        replace(RECIPE, **{field: value})


def test_changes_between_recipes_are_named_with_their_place():
    other = replace(RECIPE, epochs=3, model=replace(MODEL, drop_rate=0.0))
    assert changes(RECIPE.to_dict(), other.to_dict()) == ["epochs was 2, now 3", "model.drop_rate was 0.1, now 0.0"]


def test_the_schedule_warms_up_and_falls_to_nothing():
    rates = [cosine_with_warmup(step, 100, 10) for step in range(100)]
    assert rates[0] > 0
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert cosine_with_warmup(0, 5, 0) == 1


def test_the_optimizer_decays_matrices_only(model):
    groups = adamw(model, 1e-3, 0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and name != "pos_embed.weight"), name
