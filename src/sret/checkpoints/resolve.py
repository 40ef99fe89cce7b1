"""Loads the model of a weights file, of one of the authors' files, or of a published name."""

import os
from pathlib import Path

from timm.models import get_pretrained_cfg

from sret.checkpoints import download
from sret.checkpoints.card import Card, load_converted, load_weights
from sret.checkpoints.files import ENGINES
from sret.checkpoints.hub import fetch_hub, is_hub
from sret.checkpoints.official import load_official
from sret.data.preprocess import Preprocessing
from sret.errors import InputError, did_you_mean
from sret.models.sret import SReT
from sret.models.variants import CONFIGS, RELEASES, config_of

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", *ENGINES)
_TAGS = {name.partition(".")[2] for name in RELEASES}


def resolve(source: str | os.PathLike[str], variant: str | None = None) -> tuple[SReT, Card]:
    """Loads a model by name or path: the model, in evaluation mode, and its card.

    Args:
        source: a weights file of ours; one of the authors' files; or a published name such as `sret_t.dist_in1k`,
            whose weights are downloaded; or `hf-hub:owner/name`. An existing file takes precedence over a name.
        variant: the model of the authors' file; by default its shapes and its name decide.

    Raises `InputError` for a file that is missing or cannot be read, and for a name that was not published.
    """
    path, named = find_file(source)
    if named is not None and variant is not None:
        raise InputError(f"{source} is a published name, which includes the variant; leave --variant out")
    ours = load_weights(path) if named is None and _is_ours(path) else load_converted(path)
    if ours is not None:
        if variant is not None:
            raise InputError("--variant is only for the authors' files; ours contain their configuration")
        return ours
    model = load_official(path, named or variant)
    return model, imagenet_card(model, os.fspath(source))


def find_file(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The file that a name or path stands for, and the variant if it is a published name (downloaded).

    Raises `InputError` for a missing file, and for a name that was not published.
    """
    if is_hub(source):
        return fetch_hub(source), None
    if not is_name(source):
        path = Path(source)
        if not path.exists():
            raise InputError(f"{source}: no such file{did_you_mean(os.fspath(source), RELEASES)}")
        return path, None
    name = os.fspath(source)
    config_of(name)
    released = next((known for known in RELEASES if known == name or known.startswith(f"{name}.")), None)
    if released is None:
        raise InputError(f"{name} has no published weights; train it, and give the weights file of that run")
    return download.fetch(download.drive_url(RELEASES[released].drive_id)), released.partition(".")[0]


def is_name(source: str | os.PathLike[str]) -> bool:
    """Whether this is the name of a model, known or unknown, and not the path of a file, existing or missing."""
    path = Path(source)
    if path.exists() or path.name != os.fspath(source) or path.suffix in _FILE_SUFFIXES:
        return False
    name, _, tag = path.name.partition(".")
    return not tag or tag in _TAGS or name in CONFIGS


def _is_ours(path: Path) -> bool:
    """Whether `load_weights` can read it, or gives the best error for it."""
    if not path.is_file() or path.suffix in (".safetensors", *ENGINES):  # reading a pipe would block
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # a safetensors file under another name


def imagenet_card(model: SReT, source: str) -> Card:
    """The card of one of the authors' checkpoints: their preprocessing, and where the file came from."""
    cfg = get_pretrained_cfg("sret_t")
    assert cfg is not None
    return Card(
        config=model.config,
        preprocessing=Preprocessing(
            img_size=model.config.input_size,
            mean=cfg.mean,
            std=cfg.std,
            crop_pct=cfg.crop_pct,
            interpolation=cfg.interpolation,
        ),
        training={"converted_from": Path(source).name},
    )
