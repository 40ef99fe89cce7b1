"""Reads and writes weights, with all that is needed to rebuild the model, and the state of a training run.

A weights file is safetensors; its metadata says what the weights are (a `Card`). The state of a run is a `torch.save`
file of tensors and plain values, read with `weights_only=True`. Both are written aside, synchronised and renamed, so
that an interrupted save leaves the previous file whole.
"""

import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sret.checkpoints.files import read_pickle, read_safetensors
from sret.checkpoints.official import load_strictly
from sret.data.preprocess import Preprocessing
from sret.errors import InputError, error_prefix, first_few
from sret.files import write_atomically
from sret.models.config import ModelConfig
from sret.models.fuse import fuse
from sret.models.sret import SReT

METADATA_KEY = "sret"
FORMAT = 2  # of a card; another one is refused


class _OtherFormat(InputError):
    """A card that another version of sret wrote."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a weights file says of itself.

    Attributes:
        config: rebuilds the model.
        preprocessing: what turns an image into its input.
        class_names: in the order of the logits; empty if unknown.
        training: where the weights come from: data, epoch, metrics, versions, as plain values.
        is_fused: whether the weights are those of `fuse(model)`.
    """

    config: ModelConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    is_fused: bool = False

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.config.num_classes:
            raise InputError(f"{len(self.class_names)} class names for {self.config.num_classes} classes")

    def name_of(self, label: int) -> str:
        return self.class_names[label] if self.class_names else str(label)

    def check_classes(self, data_name: str, class_names: tuple[str, ...]) -> None:
        """Raises `InputError` if the classes of some data, in the order of their labels, are not these."""
        if self.config.num_classes != len(class_names):
            raise InputError(
                f"the checkpoint knows {self.config.num_classes} classes, {data_name} has {len(class_names)}; "
                "give data with the same classes"
            )
        if self.class_names and self.class_names != class_names:
            pairs = [f"{a!r}, not {b!r}" for a, b in zip(class_names, self.class_names, strict=True) if a != b]
            raise InputError(f"{data_name} has other classes than the checkpoint: {first_few(pairs)}")

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "format": FORMAT})

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """What `to_json` wrote. Raises `InputError` for another format; other errors if it is not a card at all."""
        values = json.loads(text)
        found = values.get("format", 1)
        if found != FORMAT:
            age, cure = ("a newer", "update sret") if found > FORMAT else ("an older", "train or convert again")
            raise _OtherFormat(
                f"written in format {found} by {age} version of sret; this version reads format {FORMAT}: {cure}"
            )
        return cls(
            config=ModelConfig.from_dict(values["config"]),
            preprocessing=Preprocessing(**values["preprocessing"]),
            class_names=tuple(values["class_names"]),
            training=values["training"],
            is_fused=values["is_fused"],
        )


def save_weights(path: Path, state_dict: dict[str, Tensor], card: Card) -> None:
    """A safetensors file of the weights, each tensor once, with the card in its metadata."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    write_atomically(path, save(tensors, metadata={"format": "pt", METADATA_KEY: card.to_json()}))


def load_weights(path: str | os.PathLike[str]) -> tuple[SReT, Card]:
    """The model of a weights file, in evaluation mode, and its card.

    Raises `InputError` for a file that is missing, truncated or not of `sret`.
    """
    state_dict, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise InputError(f"{path}: a safetensors file, but without the metadata that `sret train` and `convert` write")
    card = read_card(path, metadata[METADATA_KEY])
    model = fuse(SReT(card.config)) if card.is_fused else SReT(card.config)
    with error_prefix(path):
        load_strictly(model, state_dict)
    return model.eval(), card


def read_card(path: str | os.PathLike[str], text: str) -> Card:
    """The card in the metadata of a file. Raises `InputError` naming the file if it cannot be read."""
    try:
        return Card.from_json(text)
    except _OtherFormat as error:
        raise InputError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its metadata cannot be read by this version of sret ({error})") from error


def load(path: str | os.PathLike[str]) -> SReT:
    """The model of a weights file written by `sret train` or `sret convert`, in evaluation mode.

    Raises `InputError` for a file that is missing, truncated or not of `sret`.
    """
    return load_weights(path)[0]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of a run: tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises `InputError` for a file that is truncated or holds code."""
    return read_pickle(path)
