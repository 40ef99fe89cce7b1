"""Files of the authors' release into ours and back."""

import io
from pathlib import Path

import torch
from timm.models import get_pretrained_cfg

from sret.checkpoints.card import Card, load_weights, save_weights
from sret.checkpoints.download import drive_url, fetch
from sret.checkpoints.official import load_official, to_official
from sret.data.preprocess import Preprocessing
from sret.errors import InputError
from sret.files import write_atomically
from sret.models.sret import SReT
from sret.models.variants import RELEASES, config_of


def convert(source: str, target: Path, variant: str | None = None) -> str:
    """Converts a checkpoint and returns a line that says what was written.

    Args:
        source: one of the authors' files or a published name (then fetched); or, for a `.pth` target, a file of ours.
        target: a new file, `.safetensors` for ours or `.pth` for the authors' format.
        variant: which model the authors' file is; by default told from its shapes and name.

    Raises `InputError` if the source cannot be read or the target exists.
    """
    if target.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{target}: OUT ends in .safetensors (ours) or .pth (the authors' format)")
    if target.exists():
        raise InputError(f"{target} exists already; remove it, or name another file")
    if target.suffix == ".pth":
        if variant is not None:
            raise InputError("--variant is for reading the authors' files; ours say which model they are")
        model, card = load_weights(source)
        buffer = io.BytesIO()
        torch.save({"model": to_official(model.state_dict(), card.config)}, buffer)
        write_atomically(target, buffer.getvalue())
    else:
        model, card = load_published(source, variant)
        save_weights(target, model.state_dict(), card)
    size = target.stat().st_size / 2**20
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{target}: {parameters:,} parameters, {model.num_classes} classes, {size:.1f} MiB"


def load_published(source: str, variant: str | None = None) -> tuple[SReT, Card]:
    """The model of one of the authors' files, or of a published name (then fetched), and a card for it.

    Raises `InputError` for a file that cannot be read and for a name that was not published.
    """
    path = Path(source)
    if not path.exists() and not path.suffix.startswith(".p"):  # a name, then, and not a .pth or .pt that is missing
        config_of(source)
        name = source if source in RELEASES else next(name for name in RELEASES if name.startswith(f"{source}."))
        if variant is not None:
            raise InputError(f"{source} is a published name and says which model it is; leave --variant out")
        path, variant = fetch(drive_url(RELEASES[name].drive_id)), name.partition(".")[0]
    model = load_official(path, variant)
    return model, imagenet_card(model, source)


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
