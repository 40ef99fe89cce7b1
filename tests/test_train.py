"""Training by its properties: it learns, resumes to the bit, selects on validation only, and overwrites nothing."""

import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file
from test_data import make_folder

from sret import InputError, ModelConfig, SReT, StageConfig
from sret.checkpoints.card import load_weights
from sret.checkpoints.state import load_state
from sret.data.config import Augmentation
from sret.data.sources import load_data
from sret.errors import describe_changes
from sret.models.variants import config_of
from sret.training import distributed as parallel
from sret.training.config import Distillation, Optimizer, RuntimeConfig, TrainConfig
from sret.training.distillation.precompute import write_soft_labels
from sret.training.loop import train
from sret.training.metrics import is_best
from sret.training.optim import make_ema, make_optimizer, make_schedule
from sret.training.run_dir import BEST, CONTENTS, LAST, METRICS, REPORT, STATE
from sret.version import versions

pytestmark = pytest.mark.usefixtures("quick_report")

AFFINE = Augmentation(geometry="affine", flip=False)
NONE = Augmentation(geometry="none", flip=False)
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
RECIPE = TrainConfig(model=MODEL, epochs=2, batch_size=256, learning_rate=3e-3, warmup_epochs=0.5, augmentation=AFFINE)
STEPS = 2 * (1222 // 256)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / LAST)


@pytest.fixture(scope="module")
def whole(quick_report, tmp_path_factory) -> Path:
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
    model, card = load_weights(whole / BEST)
    assert model.config == MODEL
    assert card.class_names == tuple("0123456789")
    assert card.training["recipe"]["epochs"] == 2
    best = [row for i, row in enumerate(rows) if is_best(rows[: i + 1], card.training["val_images"])]
    assert card.training["metrics"] == best[-1]


@pytest.mark.parametrize("stops", [[3], [4], [1, 2, 5, 7]])
@pytest.mark.slow
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


@pytest.mark.slow
def test_workers_do_not_change_the_result(whole, tmp_path):
    train(RECIPE, tmp_path / "run", max_steps=STEPS, runtime=RuntimeConfig(num_workers=2))
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "run").items())


def after(steps: int, out: Path, **changes: object) -> dict[str, torch.Tensor]:
    train(replace(RECIPE, **changes), out, max_steps=steps)
    return weights(out)


# Another value of every field of a recipe, and of the fields it holds, by which three steps end elsewhere.
OTHER_VALUES = {
    "model": replace(MODEL, drop_rate=0.5),
    "init": "weights of a run",
    "epochs": 3,
    "recursion_start": 0.9,
    "pass_weights": (1.0, 2.0),
    "batch_size": 128,
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "min_learning_rate": 2e-3,
    "warmup_epochs": 0,
    "weight_decay": 5.0,
    "layer_decay": 0.5,
    "freeze": ("stages.1",),
    "clip_grad": 1e-6,
    "augmentation.geometry": "pad",
    "augmentation.min_scale": 0.9,
    "augmentation.flip": True,
    "augmentation.random_erasing": 1.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.0,
    "distillation.teacher": "weights of a run",
    "distillation.temperature": 9.0,
    "soft_labels": "labels by a run",
    "seed": 1,
    "mixed_precision": "bf16",
}
# What these decide is shown by a test of their own, in this file or another.
SHOWN_ELSEWHERE = {
    "data",
    "exif_orientation",  # test_photos.py
    "class_balance",  # needs unequal classes: test_sampling.py
    "augmentation.auto_augment",  # needs colours: test_augment.py
    "augmentation.on_device",  # test_device_data.py
    "distillation.teacher_weights",  # test_distill.py
    "ema_decay",
    "patience",
}


def test_the_state_is_written_last_and_the_weights_first(tmp_path, monkeypatch):
    """Whenever a run is killed, the weights and metrics beside its state are complete, and not older than it."""
    written, replace_file = [], Path.replace

    def record(self, target):
        written.append(Path(target).name)
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", record)
    train(replace(RECIPE, epochs=1, warmup_epochs=0), tmp_path / "run", runtime=RuntimeConfig(save_every=3))
    saves = [[STATE], [LAST, METRICS, STATE], [LAST, BEST, METRICS, STATE]]
    assert [name for name in written if name != REPORT] == [name for save in saves for name in save]


@pytest.mark.slow
def test_every_setting_counts(whole, tmp_path):
    """Three steps under another value of each setting end elsewhere, and under the same values in the same bits."""
    plain, again = after(3, tmp_path / "plain"), after(3, tmp_path / "again")
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    cropped = after(3, tmp_path / "cropped", augmentation=Augmentation())
    distilled = after(
        2, tmp_path / "distilled", label_smoothing=0.0, distillation=Distillation(teacher=str(whole / BEST))
    )
    list(write_soft_labels(tmp_path / "labels", "digits", Distillation(teacher=str(whole / BEST)), crops=1))
    for name, value in OTHER_VALUES.items():
        field, _, part = name.partition(".")
        before = plain
        if name == "init":
            changes: dict[str, object] = {"init": whole / BEST}
        elif name == "soft_labels":
            changes = {"soft_labels": tmp_path / "labels", "augmentation": NONE, "label_smoothing": 0.0}
        elif field == "augmentation":
            changes = {"augmentation": replace(AFFINE, **{part: value})}
            if part == "min_scale":  # of the geometry that has one
                changes, before = {"augmentation": Augmentation(min_scale=value)}, cropped
        elif field == "distillation":
            temperature = value if part == "temperature" else 1.0
            changes = {"label_smoothing": 0.0}
            changes["distillation"] = Distillation(teacher=str(whole / BEST), temperature=temperature)
            before = distilled if part == "temperature" else plain
        else:
            changes = {name: value}
        changed = after(3, tmp_path / name, **changes)
        assert not torch.equal(changed["head.weight"], before["head.weight"]), name


def test_no_field_of_a_recipe_is_without_effect():
    """Of every field a test shows what it does: a new one belongs in a list above."""
    nested = {"augmentation": Augmentation, "distillation": Distillation}
    names = {field.name for field in fields(TrainConfig)} - nested.keys()
    names |= {f"{name}.{field.name}" for name, kind in nested.items() for field in fields(kind)}
    assert names == OTHER_VALUES.keys() | SHOWN_ELSEWHERE


@pytest.mark.slow
def test_the_rate_follows_the_schedule(tmp_path):
    recipe = replace(RECIPE, epochs=3, warmup_epochs=1, min_learning_rate=1e-4)
    seen = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        train(recipe, tmp_path / "run")
    peak, low = recipe.learning_rate, recipe.min_learning_rate
    warm = [peak * (0.001 + 0.999 * k / 4) for k in range(4)]
    cosine = [low + (peak - low) * (1 + math.cos(math.pi * k / 12)) / 2 for k in range(4, 12)]
    assert seen == pytest.approx(warm + cosine)


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
    with pytest.raises(InputError, match=r"run is inside the data folder"):
        train(recipe, folder / "runs" / "run")
    make_folder(tmp_path / "deep" / "one", {"cat": 9})
    with pytest.raises(InputError, match="has only one class, 'cat'"):
        train(replace(recipe, data=str(tmp_path / "deep" / "one")), tmp_path / "run")


def test_git_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["commit"] == ""


def test_data_that_changed_is_not_resumed(tmp_path):
    folder = make_folder(tmp_path / "photos", {"cat": 9, "dog": 9})
    recipe = TrainConfig(model=small_config(num_classes=2), data=str(folder), epochs=4, batch_size=4)
    train(recipe, tmp_path / "run", max_steps=1)
    (folder / "cat").rename(folder / "zebra")
    with pytest.raises(InputError, match=r"has changed.* class_names was \['cat', 'dog'\]"):
        train(recipe, tmp_path / "run", resume="auto")


def test_a_finished_run_is_only_reported(whole):
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.suffix != ".png"}
    assert train(RECIPE, whole, resume="auto") == whole / BEST
    assert {p.name: p.read_bytes() for p in whole.iterdir() if p.suffix != ".png"} == before


def test_what_a_recipe_left_out_is_called_so():
    assert describe_changes({"model": {}, "init": None}, {"model": {"img_size": 32}, "init": "a"}) == [
        "init was None, now 'a'",
        "model.img_size was missing, now 32",
    ]


def test_nothing_of_another_run_is_overwritten(whole, tmp_path):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    with pytest.raises(InputError, match=r"already has a run \(step 8 of 8\).* finished"):
        train(RECIPE, whole)
    with pytest.raises(InputError, match=r"another recipe: learning_rate was 0.003, now 0.1"):
        train(replace(RECIPE, learning_rate=0.1), whole, resume="auto")
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / BEST).write_bytes(b"precious")
    with pytest.raises(InputError, match=r"has best.safetensors of another run, but no state"):
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
        train(replace(RECIPE, learning_rate=1e9, warmup_epochs=0, epochs=8), tmp_path / "run")


def spoil(monkeypatch, in_step: int) -> None:
    """From that step on (counted from 1) the gradients are not finite, though the losses of earlier steps were."""
    step, count = torch.optim.AdamW.step, 0

    def spoiling(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == in_step:
            self.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)


@pytest.mark.parametrize("in_step", [2, 4])  # within an epoch, and in its last step, before the evaluation
@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, in_step):
    with monkeypatch.context() as patch:
        spoil(patch, in_step)
        with pytest.raises(InputError, match=rf"not finite after step {in_step}:"):
            train(RECIPE, tmp_path / "run", runtime=RuntimeConfig(save_every=1))
    assert load_state(tmp_path / "run" / STATE)["step"] == in_step - 1
    train(RECIPE, tmp_path / "run", resume="auto", max_steps=in_step)  # and can go on


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.slow
def test_every_optimizer_resumes_to_the_same_bits(tmp_path, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, learning_rate=1e-3)
    train(recipe, tmp_path / "whole", max_steps=3)
    train(recipe, tmp_path / "run", max_steps=2)
    train(recipe, tmp_path / "run", resume="auto", max_steps=3)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "run").items())


def test_an_optimizer_that_did_no_step_yet_resumes_as_a_fresh_one(tmp_path):
    """As after a save while fp16 still looks for its scale: torch alone would make up a step."""
    model = SReT(MODEL)
    optimizer = make_optimizer(model, RECIPE)
    assert parallel.optimizer_state(model, optimizer) == {}
    parallel.load_optimizer_state(model, optimizer, {})
    assert not optimizer.state


def test_a_teacher_that_changed_is_not_resumed(whole, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes((whole / BEST).read_bytes())
    recipe = replace(RECIPE, label_smoothing=0.0, distillation=Distillation(teacher=str(teacher)))
    train(recipe, tmp_path / "run", max_steps=1)
    train(recipe, tmp_path / "run", max_steps=2, resume="auto")
    train(replace(RECIPE, seed=5), tmp_path / "other", max_steps=1)
    teacher.write_bytes((tmp_path / "other" / LAST).read_bytes())
    with pytest.raises(InputError, match=r"teacher.safetensors has changed"):
        train(recipe, tmp_path / "run", resume="auto")


def test_accelerate_does_not_scale_the_loss_a_second_time(tmp_path, monkeypatch):
    plain = replace(RECIPE, optimizer="sgd")
    train(plain, tmp_path / "plain", max_steps=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(plain, tmp_path / "run", max_steps=2)
    expected = weights(tmp_path / "plain")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "run").items())


def test_model_and_data_must_fit(tmp_path):
    with pytest.raises(InputError, match=r"7 classes, digits has 10.* model.num_classes"):
        train(replace(RECIPE, model=replace(MODEL, num_classes=7)), tmp_path / "run")
    with pytest.raises(InputError, match=r"3 channels, digits has 1.* model.in_chans"):
        train(replace(RECIPE, model=replace(MODEL, in_chans=3)), tmp_path / "run")
    with pytest.raises(InputError, match="batch_size 5000 is more than the 1222 training images"):
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


@pytest.mark.slow
def test_a_named_variant_takes_classes_and_channels_from_the_data(tmp_path):
    train(TrainConfig(model="sret_t", data="digits", batch_size=4, augmentation=NONE), tmp_path, max_steps=1)
    config = load_weights(tmp_path / LAST)[0].config
    assert (config.num_classes, config.in_chans) == (10, 1)


def test_a_named_variant_can_be_changed():
    recipe = TrainConfig(model={"name": "sret_t", "img_size": 96, "drop_path_rate": 0.1})
    config = recipe.model_config(num_classes=7, in_chans=1)
    assert (config.num_classes, config.in_chans, config.input_size, config.drop_path_rate) == (7, 1, (96, 96), 0.1)
    assert config.stages == config_of("sret_t").stages
    assert TrainConfig(model="sret_t").model_config(7, 1).num_classes == 7
    assert TrainConfig(model=MODEL.to_dict()).model_config() == MODEL
    stages = {key: value for key, value in MODEL.to_dict().items() if key not in ("num_classes", "in_chans")}
    assert TrainConfig(model=stages).model_config(7, 1) == replace(MODEL, num_classes=7)
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
        ("min_learning_rate", 1.0),
        ("layer_decay", 1.0),
        ("ema_decay", 0.0),
        ("patience", 0),
        ("mixup", -1.0),
    ],
)
def test_invalid_recipes_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}"):
        replace(RECIPE, **{field: value})


def test_changes_between_recipes_are_named_with_their_place():
    other = replace(RECIPE, epochs=3, model=replace(MODEL, drop_rate=0.0))
    assert describe_changes(RECIPE.to_dict(), other.to_dict()) == [
        "epochs was 2, now 3",
        "model.drop_rate was 0.1, now 0.0",
    ]


def groups_of(model: SReT, **changes: object) -> list[dict]:
    return make_optimizer(model, replace(RECIPE, **changes)).param_groups


def test_the_optimizer_decays_matrices_only(model):
    decayed = {id(p) for group in groups_of(model) if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and name != "pos_embed.weight"), name


def test_layer_decay_slows_the_lower_layers(model):
    optimizer = make_optimizer(model, replace(RECIPE, layer_decay=0.5))
    make_schedule(optimizer, replace(RECIPE, warmup_epochs=0), 4).step_update(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rate = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert rate["head.weight"] == RECIPE.learning_rate
    blocks = [f"stages.{s}.recursions.{i}.block.attn.branch.qkv.weight" for s, i in ((0, 0), (1, 0), (1, 1), (2, 0))]
    path = [rate["stem.conv1.weight"], *(rate[name] for name in blocks), rate["head.weight"]]
    ratios = [a / b for a, b in pairwise(path)]
    assert ratios == pytest.approx([0.5] * len(ratios))


def test_the_moving_average_soon_forgets_the_first_weights():
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    ema = make_ema(model, decay=0.9999)
    ema.update(model, 1)
    torch.nn.init.ones_(model.weight)
    for step in range(2, 100):
        ema.update(model, step)
    assert ema.module.weight > 0.9  # with the full decay it would be 0.01


def test_frozen_parts_stay(tmp_path):
    """Weights and BatchNorm statistics alike; a part that is not there is refused."""
    train(RECIPE, tmp_path / "first", max_steps=1)
    recipe = replace(RECIPE, init=tmp_path / "first" / LAST, freeze=("stem", "stages.0"))
    train(recipe, tmp_path / "run", max_steps=3)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "run")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if not key.startswith(("stem.", "stages.0."))}
    with pytest.raises(InputError, match=r"the model has no part 'stage'; it has stem, pos_embed, stages, norm, head"):
        train(replace(RECIPE, freeze=("stage",)), tmp_path / "no")
    with pytest.raises(InputError, match="nothing is left to train"):
        train(replace(RECIPE, freeze=("stem", "pos_embed", "stages", "norm", "head")), tmp_path / "no")


@pytest.mark.slow
def test_the_moving_average_is_evaluated_kept_and_resumed(tmp_path):
    recipe = replace(RECIPE, ema_decay=0.9)
    train(recipe, tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / METRICS).read_text().splitlines()]
    assert all(row["ema_loss"] != row["val_loss"] for row in rows)
    state = load_state(tmp_path / "whole" / STATE)
    last = load_file(tmp_path / "whole" / LAST)
    assert all(torch.equal(last[key], tensor) for key, tensor in state["ema"].items())
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])
    training = load_weights(tmp_path / "whole" / BEST)[1].training
    best = [row for i, row in enumerate(rows) if is_best(rows[: i + 1], training["val_images"])]
    assert training["metrics"] == best[-1]
    train(recipe, tmp_path / "run", max_steps=3)
    train(recipe, tmp_path / "run", resume="auto")
    assert all(torch.equal(last[key], tensor) for key, tensor in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    recipe = replace(RECIPE, epochs=9, learning_rate=1e-12, freeze=("stem",), patience=2)
    train(recipe, tmp_path / "run")
    rows = (tmp_path / "run" / METRICS).read_text().splitlines()
    state = load_state(tmp_path / "run" / STATE)
    highest = max(state["rows"], key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert len(rows) == highest["epoch"] + 2 < 9
    train(recipe, tmp_path / "run", resume="auto")  # has ended, and stays so
    assert (tmp_path / "run" / METRICS).read_text().splitlines() == rows


@pytest.mark.slow
def test_unreadable_images_are_skipped_up_to_the_limit(tmp_path, capsys):
    folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 12})
    for split in ("train", "val"):
        broken = load_data(str(folder)).split(split).images[0]
        broken.write_text("no image")
    recipe = TrainConfig(model=small_config(num_classes=2), data=str(folder), epochs=2, batch_size=8, warmup_epochs=0)
    with pytest.warns(UserWarning, match=r"skipped \(2 of at most 2\)"):
        train(recipe, tmp_path / "run", runtime=RuntimeConfig(max_corrupt=2))
    assert len(load_state(tmp_path / "run" / STATE)["unreadable"]) == 2
    readable = len(load_data(str(folder)).split("val")) - 1
    assert load_weights(tmp_path / "run" / BEST)[1].training["val_images"] == readable
    assert f"({readable} images, epoch" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match="more images than max_corrupt 1 cannot be read"):
        train(recipe, tmp_path / "strict", runtime=RuntimeConfig(max_corrupt=1))
    with pytest.raises(InputError, match=r"png: not an image"):
        train(recipe, tmp_path / "stricter")
    train(recipe, tmp_path / "strict", resume="auto", runtime=RuntimeConfig(max_corrupt=2))  # as the message advises


@pytest.mark.slow
def test_accumulation_computes_the_same_step(tmp_path):
    """With the stem's BatchNorm frozen, and without dropout, parts of a step add up to the step; mixing included."""
    plain = replace(MODEL, drop_rate=0.0, drop_path_rate=0.0)
    recipe = replace(RECIPE, model=plain, optimizer="sgd", freeze=("stem",), mixup=0.8, cutmix=1.0)
    train(recipe, tmp_path / "whole", max_steps=4)
    train(recipe, tmp_path / "parts", max_steps=4, runtime=RuntimeConfig(grad_accum_steps=4))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("memory", ["pass", "nested"])
@pytest.mark.slow
def test_recomputing_passes_changes_nothing_but_rounding(tmp_path, memory):
    """Without gradients a pass takes kernels that round otherwise in float32; test_memory.py has float64."""
    recipe = replace(RECIPE, optimizer="sgd", learning_rate=1e-2)
    train(recipe, tmp_path / "plain", max_steps=3)
    train(replace(recipe, model=replace(MODEL, memory=memory)), tmp_path / "other", max_steps=3)
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "other")
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_trackers_receive_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(RECIPE, tmp_path / "run", runtime=RuntimeConfig(trackers=("tensorboard",)))
    log = EventAccumulator(str(tmp_path / "run" / "sret")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [event.value for event in log.Scalars("val/top1")] == pytest.approx([row["val_top1"] for row in rows])
    assert log.Scalars("train/loss")[-1].step == STEPS
    with pytest.raises(InputError, match="nonesuch"):
        train(RECIPE, tmp_path / "no", runtime=RuntimeConfig(trackers=("nonesuch",)))
    with pytest.raises(InputError, match="wandb is not installed"):
        train(RECIPE, tmp_path / "no", runtime=RuntimeConfig(trackers=("tensorboard", "wandb")))


@pytest.mark.parametrize("memory", ["none", "nested"])
@pytest.mark.slow
def test_compiled_passes_train_to_the_same_weights(whole, tmp_path, monkeypatch, memory):
    compiled, compiler = [], torch.compile

    def trace(function, **options):  # and run the graphs as they are: generating code takes a minute
        compiled.append(function.__name__)
        return compiler(function, **options, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", trace)
    recipe = replace(RECIPE, optimizer="sgd", learning_rate=1e-2)
    train(recipe, tmp_path / "plain", max_steps=3)
    assert not compiled
    recipe = replace(recipe, model=replace(MODEL, memory=memory))
    train(recipe, tmp_path / "compiled", max_steps=3, runtime=RuntimeConfig(compile=True))
    assert compiled == ["one_pass"] * 2  # a recursion each
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_engines_that_would_not_be_used_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"fsdp .* only one"):
        train(RECIPE, tmp_path / "run", runtime=RuntimeConfig(fsdp=True))
    with pytest.raises(InputError, match="compile and fsdp cannot be used together"):
        RuntimeConfig(compile=True, fsdp=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes were started, but accelerate sees 1"):
        train(RECIPE, tmp_path / "run")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="configured for FSDP"):
        train(RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name, value in (("num_workers", -1), ("grad_accum_steps", 0), ("save_every", 0), ("max_corrupt", -1)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            RuntimeConfig(**{name: value})
