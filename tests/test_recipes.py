"""Every recipe trains for an epoch on real images by the command in its first line.

The recipes keep their augmentation, mixing, averaging, clipping, optimizer and precision. Published models are replaced
by small ones, and the images are 200 crops of scikit-learn's two photos, or its digits.
"""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_config
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from sret import SReT
from sret.checkpoints.card import Card, save_weights
from sret.cli.main import main
from sret.data.preprocess import Preprocessing
from sret.models import variants
from sret.training.run_dir import BEST

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TEACHER = "test_efficientnet"


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """200 crops of two photos, in two folders: 100 flowers and 100 temples."""
    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        image = Image.fromarray(photo)
        for i in range(100):
            left, top = 53 * i % (image.width - 100), 37 * i % (image.height - 100)
            image.crop((left, top, left + 80 + i % 20, top + 80)).save(root / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(TEACHER, num_classes=2).state_dict(), path)
    return path


def command(recipe: Path) -> list[str]:
    """The arguments of the command in a recipe's first line."""
    first = recipe.read_text().splitlines()[0].removeprefix("# ")
    program, *arguments = shlex.split(first)
    assert program == "sret", first
    return arguments


@pytest.fixture
def small_models(monkeypatch) -> None:
    """The published models by their names, but small: of 64 pixels and 8 layers, or 20 layers where they are deep."""
    for name, config in variants.CONFIGS.items():
        small = variants.CONFIGS["sret_deep_20_32"] if name in variants.DEEP else small_config()
        monkeypatch.setitem(variants.CONFIGS, name, replace(small, in_chans=config.in_chans))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_for_an_epoch(recipe, photos, teacher_weights, small_models, tmp_path, monkeypatch):
    arguments = [str(recipe.parents[1] / a) if a.endswith(".yaml") else a for a in command(recipe)]
    text = "".join(Path(a).read_text() for a in arguments if a.endswith(".yaml"))
    monkeypatch.chdir(tmp_path)
    arguments += ["--epochs", "1", "--batch_size", "32", "--out", "run"]
    if "data: digits" not in text:
        arguments += ["--data", str(photos)]
    if "--init" in arguments:
        path = tmp_path / "init.safetensors"
        arguments[arguments.index("--init") + 1] = str(path)  # instead of a published name or of another recipe's run
        card = Card(
            config=small_config(), preprocessing=Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(1,) * 3)
        )
        save_weights(path, SReT(small_config()).state_dict(), card)
    if "distillation:" in text:
        arguments += ["--distillation.teacher", TEACHER, "--distillation.teacher_weights", str(teacher_weights)]
    assert main(arguments) == 0
    assert (tmp_path / "run" / BEST).exists()
