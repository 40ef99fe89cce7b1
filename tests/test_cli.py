"""The command line as a user meets it: what it prints, its exit codes, and that nothing is lost."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import small_config
from PIL import Image
from test_data import make_folder
from test_weights import Evil, official_state_dict

from sret import SReT
from sret.checkpoints import official as weights
from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.card import Card, load_weights, save_weights
from sret.cli import main as cli
from sret.data.preprocess import Preprocessing
from sret.data.sources import load_data
from sret.errors import first_line
from sret.files import STATE
from sret.models.variants import CONFIGS
from sret.training import dry_run

pytestmark = pytest.mark.usefixtures("quick_report")

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "recipes" / "digits.yaml")
IMAGENET = str(ROOT / "recipes" / "imagenet.yaml")
SMALL = ["--epochs=1", "--batch-size=256", "--model.img_size=16"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("wrong shape\nat line 3", "wrong shape"),
        ("\nsizes do not match:\n  copying 3, now 4\nmore", "sizes do not match: copying 3, now 4"),
        ("nothing follows:", "nothing follows:"),
        ("", "RuntimeError"),
    ],
)
def test_an_error_of_a_library_becomes_one_line(text, line):
    assert first_line(RuntimeError(text)) == line


@pytest.fixture
def sret(capsys):
    """Runs a command; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def make_checkpoint(path: Path, config=None, class_names=(), training=None) -> Path:
    config = config or small_config()
    torch.manual_seed(0)
    preprocessing = Preprocessing(
        img_size=config.input_size, mean=(0.5,) * config.in_chans, std=(0.5,) * config.in_chans
    )
    card = Card(config=config, preprocessing=preprocessing, class_names=class_names, training=training or {})
    save_weights(path, SReT(config).state_dict(), card)
    return path


@pytest.fixture(scope="module")
def run_folder(quick_report, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--config", DIGITS, "--out", str(out), *SMALL]) == 0
    return out


def test_train_then_eval_then_predict(run_folder, sret):
    best = run_folder / "best.safetensors"
    code, out, _ = sret("eval", "--checkpoint", best)
    assert code == 0
    assert out.startswith("digits, test: 359 images, top-1 ")
    code, out, _ = sret("eval", "--checkpoint", best, "--json", "--split=val", "--batch-size", 7)
    metrics = json.loads(out)
    assert metrics["count"] == 216
    expected = load_weights(best)[1].training["metrics"]
    assert metrics["top1"] == pytest.approx(expected["val_top1"])
    assert metrics["loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    images = sorted((ROOT / "examples" / "digits").glob("*.png"))
    code, out, err = sret("predict", *images, "--checkpoint", best)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [str(p) for p in images]
    code, out, _ = sret("predict", images[0], "--checkpoint", best, "--json", "--top_k", 10)
    assert sum(json.loads(out)["classes"].values()) == pytest.approx(1, abs=1e-4)


def test_a_second_run_into_the_same_folder_needs_to_say_so(run_folder, sret):
    before = (run_folder / "best.safetensors").read_bytes()
    code, _, err = sret("train", "--config", DIGITS, "--out", run_folder, *SMALL)
    assert code == 2
    assert "it is finished: choose another --out" in err
    code, out, _ = sret("train", "--config", DIGITS, "--out", run_folder, *SMALL, "--resume", "auto")
    assert code == 0
    assert out.splitlines()[-1].endswith(f"weights in {run_folder}/best.safetensors, report in {run_folder}/report.png")
    assert (run_folder / "best.safetensors").read_bytes() == before


def test_the_recipe_is_shown_with_its_overrides(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--config", DIGITS, "--model.drop_path_rate", "0.3", "--out", "x", "--print_config"])
    assert not stopped.value.code
    assert "drop_path_rate: 0.3" in capsys.readouterr().out


def test_bad_images_are_named_and_the_others_classified(tmp_path, sret):
    checkpoint = make_checkpoint(tmp_path / "m.safetensors")
    good = tmp_path / "good.png"
    Image.new("RGB", (30, 20)).save(good)
    (tmp_path / "bad.png").write_text("no image")
    code, out, err = sret("predict", tmp_path / "bad.png", good, tmp_path / "gone.png", "--checkpoint", checkpoint)
    assert code == 1
    assert len(out.splitlines()) == 1
    assert out.startswith(str(good))
    assert [line.split(": ")[2] for line in err.splitlines()] == [
        str(tmp_path / "bad.png"),
        str(tmp_path / "gone.png"),
    ]


def one_line(err: str) -> str:
    assert err.startswith("sret: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        ([], f"give a command: {', '.join(cli.COMMANDS)}"),
        (["info", "sret_tt"], "unknown model 'sret_tt'"),
        (["info", "sret_t", "--img_size", "8"], "stage 1 at 8x8 pixels"),
        (["info", "--img-sise", "8"], "unknown option '--img_sise'; did you mean '--img_size'?"),
        (["train", "--config", DIGITS], "missing --out"),
        (["export", "x"], "missing OUT"),
        (["eval", "best.safetensors"], "unexpected argument 'best.safetensors'; did you mean --checkpoint best.safe"),
        (["eval", "--checkpoint", "x", "--split", "tst"], "split: must be one of train, val, test, all; given tst"),
        (
            ["train", "--optimizer", "adam"],
            "optimizer: must be one of adamw, sgd, lamb, lion, nadamw, adopt; given adam",
        ),
        (["export", "m.safetensors", "--out", "m.onnx"], "unknown option '--out'; OUT is given by its place"),
        (["train", "--lr", "1e-3"], "unknown option '--lr'; did you mean '--learning_rate'?"),
        (["info", "sret_t", "sret_s"], "unexpected argument 'sret_s'"),
        (["train", "--config", "none.yaml", "--out", "x"], "none.yaml"),
        (["train", "--out", "x"], "no model; give a recipe (--config FILE), or the name of a model (--model sret_t)"),
        (["train", "--out", "x", "--model", "null"], "no model; give a recipe"),
        (
            ["train", "--out", "x", "--config", DIGITS, "--batch_size", "5000"],
            "use at most 1222; 152 gives 8 steps per epoch",
        ),
        (
            ["train", "--config", DIGITS, "--out", "x", "--epoch", "3"],
            "unknown option '--epoch'; did you mean '--epochs'?",
        ),
        (
            ["train", "--config", DIGITS, "--out", "x", "--epochs", "many"],
            "epochs: must be a whole number > 0; given many",
        ),
        (["train", "--config", DIGITS, "--out", "x", "--model.num_head", "3"], "ModelConfig has no field 'num_head'"),
        (["train", "--config", DIGITS, "--out", "x", "--model.img_size", "4"], "1 token cannot form 4 slices"),
        (["train", "--config", IMAGENET, "--out", "x", "--model", "sret_x"], "unknown model 'sret_x'"),
        (
            ["train", "--config", DIGITS, "--out", "x", "--model", "sret_t"],
            "model has name and also stages; give only one of them",
        ),
        (["train", "--config", DIGITS, "--out", "x", "--img_size", "64"], "did you mean '--model.img_size'?"),
        (["train", "--config", DIGITS, "--out", "x", "--grad-checkpointing"], "did you mean '--model.memory'?"),
        (["train", "--config", DIGITS, "--out", "x", "--data", "nowhere"], "no data 'nowhere'"),
        (["train", "--config", DIGITS, "--out", "x", "--model.num_classes", "9"], "set model.num_classes to 10"),
        (
            ["train", "--config", DIGITS, "--out", "x", "--augmentation.geometry", "x"],
            "must be one of crop, pad, affine, none; given x",
        ),
        (
            ["train", "--config", DIGITS, "--out", "x", "--max-steps", "0"],
            "max_steps: must be a whole number > 0; given 0",
        ),
        (
            ["train", "--config", DIGITS, "--out", "x", "--label_smoothing", "1"],
            "must be a number >= 0 and < 1; given 1",
        ),
        (["train", "--config", DIGITS, "--out", "x", "--flip", "no"], "did you mean '--augmentation.flip'?"),
        (["--help-me"], "unknown option '--help-me'"),
        (["--versoin"], "did you mean '--version'?"),
        (["export", "sret_t", "x.onnx", "--image_size", "64"], "did you mean '--img_size'?"),
        (["eval", "--checkpoint", "gone.safetensors"], "gone.safetensors: no such file"),
        (["predict", "a.png"], "missing --checkpoint"),
        (["predict", "a.png", "--checkpoint", "x", "--top_k", "-1"], "top_k"),
        (["eval", "--checkpoint", "x", "--num-workers", "-1"], "num_workers"),
        (["info", "sret_t_unsliced", "--img_size", "-224"], "both sides must be at least 1"),
        (
            ["train", "--config", str(ROOT / "examples/digits/two.png"), "--out", "x"],
            "two.png: the recipe is not a text file",
        ),
        (
            ["train", "--config", DIGITS, "--out", "x", "--data", "nowhere", "--init", "gone.safetensors"],
            "gone.safetensors: no such file",  # before the data are read
        ),
        (["convert", "sret_tt", "x.safetensors"], "did you mean 'sret_t'?"),
        (["convert", "sret_s.dist", "x.safetensors"], "sret_s has no weights tagged 'dist'"),
        (["convert", "gone.pth", "x.safetensors"], "gone.pth: no such file"),
        (["convert", "gone.pth", "x.onnx"], "OUT ends in .safetensors"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, sret, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = sret(*arguments)
    assert code == 2
    assert out == ""
    assert message in one_line(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs:", "epoch:"), "unknown option 'epoch'; did you mean 'epochs'?"),
        (("img_size:", "image_size:"), "ModelConfig has no field 'image_size'"),
        (("num_heads: 2", "num_head: 2"), "did you mean 'num_heads'?"),
        (("groups: [4, 2]", "groups: [400, 2]"), "64 tokens cannot form 400 slices; try at most 64"),
        (("drop_path_rate: 0.05", "drop_path_rate: 5"), "drop_path_rate is 5; it must be a number "),
        (("epochs: 60", "epochs: ["), "Problems parsing config"),
        (("img_size: 32", "img_size: big"), "img_size 'big' is not a number of pixels"),
    ],
)
def test_a_wrong_recipe_is_one_line(change, message, sret, tmp_path):
    assert change[0] in Path(DIGITS).read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(DIGITS).read_text().replace(*change))
    code, _, err = sret("train", "--config", recipe, "--out", tmp_path / "x")
    assert code == 2
    assert message in one_line(err)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["cut", "foreign", "evil"])
def test_weights_to_start_from_are_read_as_carefully(content, sret, tmp_path):
    whole = make_checkpoint(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / ("init.pth" if content == "evil" else "init.safetensors")
    path.write_bytes(whole[: len(whole) // 2] if content == "cut" else whole)
    if content == "evil":
        torch.save({"model": {}, "args": Evil()}, path)
    code, _, err = sret("train", "--config", DIGITS, "--out", tmp_path / "x", "--init", path)
    assert code == 2
    foreign = "init.safetensors: the weights of stage 1 are for 1 block of width 16"
    assert {"cut": "truncated", "foreign": foreign, "evil": "refused"}[content] in one_line(err)
    assert not (tmp_path / "x").exists()


def test_a_bad_image_in_a_worker_is_one_line_too(sret, tmp_path):
    folder = make_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    (folder / "cat" / "001.png").write_text("no image")
    two = make_checkpoint(tmp_path / "two.safetensors", small_config(num_classes=2), ("cat", "dog"))
    for workers in (0, 1):
        code, _, err = sret("eval", "--checkpoint", two, "--data", folder, "--num-workers", workers)
        assert code == 2
        assert one_line(err) == (
            f"sret: error: {folder}/cat/001.png: not an image that can be read; repair or remove these images, or "
            "set a larger --max_corrupt\n"
        )


@pytest.mark.slow
def test_two_processes_count_every_image_once(run_folder, sret):
    best = run_folder / "best.safetensors"
    alone = json.loads(sret("eval", "--checkpoint", best, "--json")[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "sret.cli", "eval", "--checkpoint", str(best), "--json", "--batch-size", "32"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = processes.run(command, env=environment)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, result.stderr[-2000:]
    assert lines[0]["count"] == alone["count"] == 359  # an odd number
    assert lines[0]["top1"] == pytest.approx(alone["top1"])
    assert lines[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_checkpoint_for_other_classes_is_refused(sret, tmp_path):
    folder = make_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    ten = make_checkpoint(tmp_path / "ten.safetensors")
    code, _, err = sret("eval", "--checkpoint", ten, "--data", folder)
    assert code == 2
    assert "has 10 classes" in one_line(err)
    two = make_checkpoint(tmp_path / "two.safetensors", small_config(num_classes=2), ("cow", "dog"))
    code, _, err = sret("eval", "--checkpoint", two, "--data", folder)
    assert code == 2
    assert "other classes than the checkpoint: 'cat', not 'cow'" in one_line(err)
    code, _, err = sret("eval", "--checkpoint", two)
    assert code == 2
    assert "give images with --data" in one_line(err)


def test_an_undivided_folder_is_evaluated_whole_unless_it_was_trained_on(sret, tmp_path):
    folder = make_folder(tmp_path / "pets", {"cat": 10, "dog": 10})
    config = small_config(num_classes=2)
    foreign = make_checkpoint(tmp_path / "a.safetensors", config, ("cat", "dog"))
    training = {"recipe": {"data": str(folder)}, "data": load_data(str(folder)).fingerprint()}
    own = make_checkpoint(tmp_path / "b.safetensors", config, ("cat", "dog"), training)
    assert "all: 20 images" in sret("eval", "--checkpoint", foreign, "--data", folder)[1]
    assert "test: 4 images" in sret("eval", "--checkpoint", own, "--data", f"{folder}/../pets")[1]
    assert "test: 4 images" in sret("eval", "--checkpoint", own)[1]
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "pets"))  # the same images under another path
    assert "test: 4 images" in sret("eval", "--checkpoint", own, "--data", moved)[1]
    Image.new("RGB", (8, 8)).save(folder / "cat" / "new.png")  # which moves others between the splits
    code, _, err = sret("eval", "--checkpoint", own)
    assert code == 2
    assert "has changed since training (all was '20 images" in one_line(err)
    assert "all: 21 images" in sret("eval", "--checkpoint", own, "--split", "all")[1]


def test_a_teacher_predicts_once_and_a_student_learns_from_it(run_folder, sret, tmp_path):
    labels, student = tmp_path / "labels", tmp_path / "student"
    best = run_folder / "best.safetensors"
    code, out, _ = sret("soft-labels", "--data", "digits", "--teacher", best, "--out", labels, "--crops", 1)
    assert code == 0
    assert out.endswith(f"{labels}: complete; train with: --soft_labels {labels}\n")
    learn = ["train", "--config", DIGITS, *SMALL, "--label_smoothing", 0, "--soft-labels", labels]
    code, _, err = sret(*learn, "--out", student)
    assert code == 2
    assert "have their own crops" in one_line(err)
    assert sret(*learn, "--out", student, "--augmentation.geometry", "none")[0] == 0
    assert load_weights(student / "best.safetensors")[1].training["recipe"]["soft_labels"] == str(labels)


def test_a_teacher_can_be_named_on_the_line(run_folder, sret, tmp_path):
    teacher = ["--distillation.teacher", run_folder / "best.safetensors", "--distillation.temperature", 2]
    code, _, err = sret("train", "--config", DIGITS, *SMALL, "--out", tmp_path / "x", *teacher, "--label_smoothing", 0)
    assert code == 0, err
    recipe = load_weights(tmp_path / "x" / "best.safetensors")[1].training["recipe"]
    assert recipe["distillation"]["temperature"] == 2


@pytest.mark.parametrize("line", [["--model", "sret_lt"], ["--model=sret_lt"], ["--model.name", "sret_lt"]])
def test_a_model_s_name_leaves_the_recipe_s_changes(line, monkeypatch):
    seen = []
    monkeypatch.setattr("sret.training.loop.train", lambda recipe, *_, **__: seen.append(recipe))
    assert cli.main(["train", "--config", IMAGENET, "--out", "x", *line, "--model.img_size", "96"]) == 0
    assert seen[0].model == {"name": "sret_lt", "drop_path_rate": 0.1, "img_size": 96}


def test_names_need_no_brackets(monkeypatch):
    seen = []
    monkeypatch.setattr("sret.training.loop.train", lambda recipe, *rest, **__: seen.append((recipe, rest[-1])))
    assert cli.main(["train", "--config", DIGITS, "--out", "x", "--freeze", "stem", "--trackers", "tensorboard"]) == 0
    assert seen[0][0].freeze == ("stem",)
    assert seen[0][1].trackers == ("tensorboard",)


def test_a_dry_run_tells_the_cost_and_leaves_nothing(sret, tmp_path):
    code, out, _ = sret("train", "--config", DIGITS, "--out", tmp_path / "runs" / "x", "--dry-run")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "Data",
        "Model",
        "Read",
        "Read",
        "Read",
        "Step",
        "Speed",
        "Time",
        "Disk",
    ]
    assert "1,140 steps" in out
    speed = float(re.search(r"Speed   ([\d,]+) images/s", out)[1].replace(",", ""))
    minutes, seconds = map(int, re.search(r"Time    0:(\d\d):(\d\d) ", out).groups())
    assert 60 * minutes + seconds == pytest.approx(1140 * 64 / speed, rel=0.1, abs=1)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_slow_steps_ends_after_one(sret, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "STEP_SECONDS", 0)
    monkeypatch.setattr(dry_run, "READ_SECONDS", 0)
    code, out, _ = sret("train", "--config", DIGITS, "--out", tmp_path / "x", "--dry-run")
    assert code == 0
    assert "Read    0 of 1,222 train images" in out
    assert "images/s in one step" in out


def test_a_dry_run_finds_what_would_stop_the_run(run_folder, sret, tmp_path):
    code, _, err = sret("train", "--config", DIGITS, "--out", run_folder, "--dry-run")
    assert code == 2
    assert "already has a run" in one_line(err)
    folder = make_folder(tmp_path / "pets", {"cat": 9, "dog": 9})
    for image in folder.glob("cat/*"):
        image.write_text("no image")
    dry = ["train", "--model.name", "sret_t", "--data", folder, "--batch_size", 4, "--out", tmp_path / "x", "--dry-run"]
    code, _, err = sret(*dry, "--model.img_size", 64, "--max_corrupt", 2)
    assert code == 2
    assert "more images than max_corrupt 2 cannot be read" in err
    assert {path.name for path in tmp_path.iterdir()} == {"pets"}


def test_convert_reads_the_authors_files_and_writes_them(sret, tmp_path):
    official = official_state_dict("SReT_T")
    torch.save({"model": official}, tmp_path / "SReT_T.pth")
    code, out, err = sret("convert", tmp_path / "SReT_T.pth", tmp_path / "t.safetensors")
    assert (code, err) == (0, "")
    assert "4,755,979 parameters, 1000 classes" in out
    model, card = load_weights(tmp_path / "t.safetensors")
    assert model.config == CONFIGS["sret_t"]
    assert card.preprocessing.crop_pct == 0.875
    assert card.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))
    code, _, _ = sret("convert", tmp_path / "t.safetensors", tmp_path / "back.pth")
    assert code == 0
    back, _ = weights.read_official(tmp_path / "back.pth")
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in back)
    code, _, err = sret("convert", tmp_path / "SReT_T.pth", tmp_path / "t.safetensors")
    assert code == 2
    assert "already exists" in one_line(err)
    code, _, err = sret("convert", tmp_path / "SReT_T.pth", tmp_path / "s.safetensors", "--variant", "sret_s")
    assert code == 2
    assert "It fits sret_t or sret_t_unsliced" in one_line(err)


def test_a_model_of_ones_own_is_converted_to_the_authors_format_and_back(sret, tmp_path):
    ours = make_checkpoint(tmp_path / "ours.safetensors", class_names=tuple("abcdefghij"), training={"step": 3})
    pth, back = tmp_path / "ours.pth", tmp_path / "back.safetensors"
    assert sret("convert", ours, pth)[0] == 0
    assert sret("convert", pth, back)[::2] == (0, "")
    (model, card), (expected, expected_card) = load_weights(back), load_weights(ours)
    assert card == expected_card
    for other in (model, weights.load_official(pth)):
        assert all(torch.equal(other.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert transfer_file(SReT(card.config), pth)[0].startswith("stage 1: 1 block reused")
    content = torch.load(pth)
    content["model"].popitem()
    torch.save(content, pth)
    code, _, err = sret("convert", pth, tmp_path / "damaged.safetensors")
    assert code == 2
    assert f"{pth}: the checkpoint does not fit this model: missing head.bias" in one_line(err)


def test_convert_warns_of_a_guess_and_refuses_code(sret, tmp_path):
    torch.save({"model": official_state_dict("SReT_T")}, tmp_path / "checkpoint.pth")
    code, _, err = sret("convert", tmp_path / "checkpoint.pth", tmp_path / "a.safetensors")
    assert code == 0
    assert err.startswith("sret: warning: the weights do not show the number of slices: loading them as sret_t")
    torch.save({"model": {}, "args": Evil()}, tmp_path / "evil.pth")
    code, _, err = sret("convert", tmp_path / "evil.pth", tmp_path / "b.safetensors")
    assert code == 2
    assert "refused" in one_line(err)
    assert not (tmp_path / "b.safetensors").exists()


def test_info_lists_all_and_details_one(sret, tmp_path):
    code, out, _ = sret("info")
    assert code == 0
    assert all(name in out for name in CONFIGS)
    assert "20,899,692" in out
    assert "76.0 [77.6]" in out
    assert max(map(len, out.splitlines())) <= 88
    code, out, _ = sret("info", "sret_t", "--img-size", "[256,192]")
    assert code == 0
    assert "sret_t at 256x192" in out
    assert "32x24" in out
    assert "76.0 % top-1 on ImageNet-1K as published" in out
    assert "On a GPU: PyTorch's kernels: the Triton kernels are off; SRET_TRITON=1 turns them on" in out
    code, out, _ = sret("info", make_checkpoint(tmp_path / "m.safetensors"))
    assert code == 0
    assert "Classes: 10: without names\n" in out
    assert f"{sum(t.numel() for t in SReT(small_config()).parameters()):,} parameters" in out


def test_info_of_a_file_shows_its_classes_and_how_it_prepares_images(sret, tmp_path):
    names = tuple(f"[b]class {k}" for k in range(12))
    path = make_checkpoint(tmp_path / "m.safetensors", small_config(num_classes=12, in_chans=1), names)
    *_, classes, images = sret("info", path)[1].splitlines()
    assert classes == f"Classes: 12: {'; '.join(names[:10])} and 2 more"
    assert images == (
        "Images: grey, 64x64 pixels, bicubic, the central 100 % of each side; in 0..1, mean [0.5], std [0.5]"
    )


def test_an_interrupted_command_exits_with_130(sret, monkeypatch):
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sret.cli.commands.info.run", interrupt)
    code, _, err = sret("info")
    assert code == 130
    assert "interrupted" in err


@pytest.mark.parametrize("form", [("--out", "{}"), ("--out={}",)])
def test_an_interrupted_run_says_whether_it_can_continue(sret, monkeypatch, tmp_path, form):
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sret.cli.commands.train.run", interrupt)
    arguments = ("train", "--model", "sret_t", *(part.format(tmp_path) for part in form))
    assert sret(*arguments)[2] == "sret: interrupted; nothing was saved yet\n"
    (tmp_path / STATE).touch()
    assert sret(*arguments)[2] == "sret: interrupted; --resume auto continues from the last saved state\n"


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (["--help"], 0, "write a teacher's predictions for many crops"),
        (["--version"], 0, "sret 0.1.0\n"),
        (["trian"], 2, "did you mean 'train'?"),
        (["train", "--epoch", "3"], 2, "did you mean '--epochs'?"),
        (["train", "--help"], 0, "--augmentation.min_scale"),
        *[([name, "--help"], 0, f"usage: sret {name} ") for name in list(cli.COMMANDS)[1:]],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_misspellings_do_not_wait_for_torch(arguments, code, output):
    program = (
        "import sys\n"
        "from sret.cli.main import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as stopped:\n"
        "    code = stopped.code or 0\n"
        "heavy = {'torch', 'timm', 'accelerate', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    result = processes.run(command)
    assert result.returncode == code, result.stderr
    assert output in result.stdout + result.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_plain_text(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].endswith("[options]")
    assert not re.search("<class|typing|Path to a configuration|None|True|False", text)
    if "--checkpoint" in text or name == "train":
        assert "sret_t.dist_in1k" in " ".join(text.split())


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("sret")
    result = processes.run([command, "nothing"])
    assert result.returncode == 2
    assert one_line(result.stderr).startswith("sret: error: unknown command 'nothing'")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_opens_with_a_command_that_works(path, monkeypatch, tmp_path):
    """Its first line is a command that parses, names the recipe, and gives a model that its data set fits."""
    monkeypatch.chdir(ROOT)
    first, *rest = path.read_text().splitlines()
    assert first.startswith("# sret train --config recipes/")
    assert f" --config recipes/{path.name} " in first
    assert " --out " in first
    comment = " ".join(line for line in rest if line.startswith("#"))
    assert "Cost: " in comment
    assert "Expect: " in comment
    seen = []
    monkeypatch.setattr("sret.training.loop.train", lambda recipe, *_, **__: seen.append(recipe))
    assert cli.main(shlex.split(first.removeprefix("# sret "))) == 0
    classes = {"cifar100": 100, "imagenet": 1000}.get(seen[0].data, 10)
    assert seen[0].model_config(classes, 1 if seen[0].data == "digits" else 3).num_classes == classes
