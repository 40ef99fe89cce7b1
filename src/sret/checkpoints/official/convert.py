"""Converts the authors' checkpoints into our weights files, and back."""

import io
from pathlib import Path

import torch

from sret.checkpoints.card import METADATA_KEY, save_weights
from sret.checkpoints.official import to_official
from sret.checkpoints.resolve import resolve
from sret.errors import InputError
from sret.files import format_bytes, write_atomically
from sret.models.build import each_once


def convert(source: str, target: Path, variant: str | None = None) -> str:
    """Converts a checkpoint and returns a line that says what was written.

    Args:
        source: as in `resolve`: one of the authors' files, a published name (downloaded), or one of our files.
        target: a new file, `.safetensors` for ours or `.pth` for the authors' format.
        variant: which model the authors' file is; by default found from its shapes and name.

    Raises `InputError` if the source cannot be read or the target exists.
    """
    if target.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{target}: OUT ends in .safetensors, or in .pth for the authors' format")
    if target.exists():
        raise InputError(f"{target} already exists; delete it, or choose another name")
    model, card = resolve(source, variant)
    if target.suffix == ".pth":
        card.check_unfused(source)
        buffer = io.BytesIO()
        # The authors' code reads only "model"; the card lets sret read any model back, not only the published ones.
        content = {"model": to_official(model.state_dict(), card.sret_config), METADATA_KEY: card.to_json()}
        torch.save(content, buffer)
        write_atomically(target, buffer.getvalue())
    else:
        save_weights(target, each_once(model, model.state_dict()), card)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{target}: {parameters:,} parameters, {model.num_classes} classes, {format_bytes(target.stat().st_size)}"
