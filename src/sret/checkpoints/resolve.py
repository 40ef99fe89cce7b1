"""Loads the model, or only the weights, of a weights file, of one of the authors' files, or of a published name."""

import os
from dataclasses import replace
from pathlib import Path

from timm.models import get_pretrained_cfg
from torch import nn

from sret.checkpoints import download
from sret.checkpoints.card import METADATA_KEY, Card, as_sret, load_any, load_converted, read_card
from sret.checkpoints.files import ENGINES, StateDict, read_safetensors
from sret.checkpoints.hub import fetch_hub, is_hub
from sret.checkpoints.official import from_official, load_official, read_official
from sret.checkpoints.official.keys import matching_config
from sret.checkpoints.official.variants import has_shapes_of
from sret.data.preprocess import Preprocessing
from sret.errors import InputError, did_you_mean, error_prefix
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.variants import CONFIGS, PUBLISHED, RELEASES, config_of

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", *ENGINES)
_TAGS = {name.partition(".")[2] for name in RELEASES}


def resolve(source: str | os.PathLike[str], variant: str | None = None) -> tuple[nn.Module, Card]:
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
    ours = load_any(path) if named is None and _is_ours(path) else load_converted(path)
    if ours is not None:
        if variant is not None:
            raise InputError("--variant is only for the authors' files; ours contain their configuration")
        return ours
    model = load_official(path, named or variant)
    return model, imagenet_card(model, os.fspath(source))


def resolve_sret(source: str | os.PathLike[str], variant: str | None = None) -> tuple[SReT, Card]:
    """As `resolve`, for what only models of ours can do. Raises `InputError` also for a model of timm."""
    model, card = resolve(source, variant)
    with error_prefix(source):
        return as_sret(model), card


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


def find_source(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """`find_file` for weights to start from. Raises `InputError` also for a folder and for an exported model."""
    if Path(source).is_dir():
        best = Path(source) / "best.safetensors"
        raise InputError(f"{source} is a folder; give a weights file in it, such as {best}")
    if Path(source).suffix in ENGINES:
        raise InputError(
            f"{source} is an exported model, which is for inference only; use the weights it was exported from"
        )
    return find_file(source)


def read_source(source: str | os.PathLike[str], config: ModelConfig) -> tuple[StateDict, ModelConfig]:
    """The weights of a file (ours or the authors') or of a published name, as our state dict, and their configuration.

    `config`, that of the target model, is used if the file has none: a safetensors file without our metadata, or one
    that was trained with the authors' code and fits no published model.
    Raises `InputError` if the file cannot be read safely, or holds no weights of a model.
    """
    path, variant = find_source(source)
    if path.suffix == ".safetensors":
        state_dict, metadata = read_safetensors(path)
        if METADATA_KEY not in metadata:
            with error_prefix(path):
                return state_dict, matching_config(config, state_dict)
        card = read_card(path, metadata[METADATA_KEY])
        card.check_unfused(path)
        return state_dict, card.sret_config
    if (converted := load_converted(path)) is not None:
        return converted[0].state_dict(), converted[1].sret_config
    official, _ = read_official(path)
    if "stem.conv1.weight" in official:
        raise InputError(
            f"{path} has weights of sret, but is not a weights file; use a run's best.safetensors, or save them with "
            "safetensors.torch.save_file"
        )
    with error_prefix(path):
        if variant is not None:
            published: ModelConfig | None = config_of(variant)
        else:
            published = next((known for known in PUBLISHED.values() if has_shapes_of(known, official)), None)
        found = matching_config(published or replace(config, residual_scale="one"), official)
        return from_official(official, found), found


def is_name(source: str | os.PathLike[str]) -> bool:
    """Whether this is the name of a model, known or unknown, and not the path of a file, existing or missing."""
    path = Path(source)
    if path.exists() or path.name != os.fspath(source) or path.suffix in _FILE_SUFFIXES:
        return False
    name, _, tag = path.name.partition(".")
    return not tag or tag in _TAGS or name in CONFIGS


def _is_ours(path: Path) -> bool:
    """Whether `load_any` can read it, or gives the best error for it."""
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
