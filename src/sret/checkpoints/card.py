"""Reads and writes weights files, with everything that is needed to rebuild the model.

A weights file is safetensors; its metadata holds a `Card` and the checksum of the weights. It is written to a temporary
file, synchronised and renamed, so that an interrupted save leaves the previous file complete.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sret.checkpoints.files import CHECKSUM_KEY, checksum, read_pickle, read_safetensors
from sret.checkpoints.fit import check_fit, load_strictly
from sret.checkpoints.official import from_official, read_official
from sret.data.preprocess import Preprocessing
from sret.elastic.policy import ExitPolicy
from sret.errors import InputError, error_prefix, first_few
from sret.files import write_atomically
from sret.models.build import build_to_load, everywhere
from sret.models.config import ModelConfig, known_fields
from sret.models.fuse import fuse
from sret.models.sret import SReT
from sret.models.timm.cfg import timm_cfg
from sret.models.timm.config import TimmConfig

METADATA_KEY = "sret"
FORMAT = 2  # of a card; another one is refused


class _OtherFormat(InputError):
    """A card that another version of sret wrote."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """The metadata of a weights file: what the weights are and how to use them.

    Attributes:
        config: the configuration of the model: of ours, or of one of timm's.
        preprocessing: how images are prepared for the model.
        class_names: in the order of the logits; empty if unknown.
        training: the origin of the weights as plain values: recipe, data, epoch, metrics, versions.
        is_fused: whether the weights are those of `fuse(model)`.
        exit_policy: when images leave a model with exits early, as `sret calibrate-exit` chose it.
    """

    config: ModelConfig | TimmConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    is_fused: bool = False
    exit_policy: ExitPolicy | None = None

    def __post_init__(self) -> None:
        if self.exit_policy is not None and (isinstance(self.config, TimmConfig) or self.config.exits == "none"):
            raise InputError("a policy for early exit, but the model has no exits")
        if self.exit_policy is not None:
            self.exit_policy.check_exits(self.sret_config.num_exits + 1)
        if self.class_names and len(self.class_names) != self.config.num_classes:
            raise InputError(f"{len(self.class_names)} class names for {self.config.num_classes} classes")

    @property
    def sret_config(self) -> ModelConfig:
        """The configuration of a model of ours. Raises `InputError` for one of timm's."""
        if isinstance(self.config, TimmConfig):
            raise InputError(f"this is for models of sret; the file has {self.config.timm}, a model of timm")
        return self.config

    def name_of(self, label: int) -> str:
        """The name of a class, or its number if the names are unknown."""
        return self.class_names[label] if self.class_names else str(label)

    def check_classes(self, data_name: str, class_names: tuple[str, ...]) -> None:
        """Raises `InputError` if the classes of a data set, in the order of their labels, are not those of the card."""
        if self.config.num_classes != len(class_names):
            raise InputError(
                f"the checkpoint has {self.config.num_classes} classes, {data_name} has {len(class_names)}; "
                "give data with the same classes"
            )
        if self.class_names and self.class_names != class_names:
            pairs = [f"{a!r}, not {b!r}" for a, b in zip(class_names, self.class_names, strict=True) if a != b]
            raise InputError(f"{data_name} has other classes than the checkpoint: {first_few(pairs)}")

    def check_unfused(self, source: object) -> None:
        """Raises `InputError` if the weights, of a file called `source`, are those of a fused model."""
        if self.is_fused:
            raise InputError(
                f"{source} has a fused model, which is for inference only; use the weights of the model before fusing"
            )

    def to_json(self) -> str:
        """The card as text; `from_json` reads it back."""
        values = {**asdict(self), "config": self.config.to_dict(), "format": FORMAT}
        if self.exit_policy is None:  # so that earlier versions can read the file
            del values["exit_policy"]
        elif not self.exit_policy.coefficients:
            del values["exit_policy"]["coefficients"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads what `to_json` wrote. Raises `InputError` for another format, and other errors for other texts."""
        values = json.loads(text)
        found = values.get("format", 1)
        if found != FORMAT:
            age, advice = ("a newer", "update sret") if found > FORMAT else ("an older", "train or convert again")
            raise _OtherFormat(
                f"written in format {found} by {age} version of sret; this version reads format {FORMAT}: {advice}"
            )
        kind = TimmConfig if "timm" in values["config"] else ModelConfig
        config, preprocessing = kind.from_dict(values["config"]), Preprocessing(**values["preprocessing"])
        if (config.in_chans, *config.input_size) != (len(preprocessing.mean), *preprocessing.img_size):
            raise InputError(
                f"the model takes {config.in_chans} channels and {config.input_size} pixels, but preprocessing gives "
                f"{len(preprocessing.mean)} channels and {preprocessing.img_size} pixels"
            )
        names, training = values["class_names"], values["training"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("class_names is not a list of names")
        for key in ("recipe", "data", "metrics", "versions"):
            if not isinstance(training.get(key, {}), dict):
                raise InputError(f"{key} of its training is {training[key]!r}")
        if not isinstance(training.get("recipe", {}).get("data", ""), str):
            raise InputError(f"the data of its training is {training['recipe']['data']!r}, which is not a name")
        return cls(
            config=config,
            preprocessing=preprocessing,
            class_names=tuple(names),
            training=training,
            is_fused=values["is_fused"] is True,
            exit_policy=_policy_of(values),
        )


def _policy_of(values: dict[str, Any]) -> ExitPolicy | None:
    if "exit_policy" not in values:
        return None
    if not isinstance(values["exit_policy"], dict):
        raise InputError(f"exit_policy is {values['exit_policy']!r}")
    return ExitPolicy(**known_fields(ExitPolicy, values["exit_policy"]))


def save_weights(path: str | os.PathLike[str], state_dict: dict[str, Tensor], card: Card) -> None:
    """Writes weights to a safetensors file, with the card in its metadata.

    Args:
        state_dict: each shared tensor once (`each_once`).
        card: its `config` is what `load` builds: for a changed model, such as that of `merge_tokens`, the model's own.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    metadata = {"format": "pt", METADATA_KEY: card.to_json()}
    metadata[CHECKSUM_KEY] = checksum(tensors, metadata)
    write_atomically(Path(path), save(tensors, metadata=metadata))


def load_weights(path: str | os.PathLike[str]) -> tuple[SReT, Card]:
    """Loads a weights file of an `SReT`: the model, in evaluation mode, and its card.

    Raises `InputError` as `load_any` does, and for a model of timm.
    """
    model, card = load_any(path)
    with error_prefix(path):
        return as_sret(model), card


def as_sret(model: nn.Module) -> SReT:
    """The same model. Raises `InputError` for a model of timm."""
    if not isinstance(model, SReT):
        raise InputError(f"this is for models of sret, and the file has a {type(model).__name__} of timm")
    return model


def load_any(path: str | os.PathLike[str]) -> tuple[nn.Module, Card]:
    """Loads a weights file: the model, in evaluation mode, and its card. It is an `SReT`, or a model of timm.

    Raises `InputError` for a file that is missing, damaged, or was not written by `sret`.
    """
    state_dict, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise InputError(
            f"{path}: a safetensors file without the metadata that `sret train` and `convert` write; load it into a "
            "model with safetensors.torch.load_model"
        )
    card = read_card(path, metadata[METADATA_KEY])
    with error_prefix(path):
        num_tensors, state_dict = len(state_dict), _checked(card, state_dict)
        model = _build(card, num_tensors)
        load_strictly(model, state_dict)
    return _with_cfg(model, card), card


def load_converted(path: str | os.PathLike[str]) -> tuple[SReT, Card] | None:
    """As `load_weights`, for a file in the authors' format that `sret convert` wrote; None for the authors' own files.

    Raises `InputError` for a file that is missing, damaged, or would run code.
    """
    text = read_pickle(path).get(METADATA_KEY)
    if not isinstance(text, str):
        return None
    card, (official, _) = read_card(path, text), read_official(path)
    with error_prefix(path):
        _check_blocks(card, official)
        model = SReT(card.sret_config)
        load_strictly(model, from_official(official, card.sret_config))
    return as_sret(_with_cfg(model, card)), card


def _with_cfg(model: nn.Module, card: Card) -> nn.Module:
    """The model in evaluation mode, with the card's preprocessing and class names as its `pretrained_cfg`."""
    used, names = card.preprocessing, {"label_names": card.class_names or None}
    cfg: dict[str, Any]
    if isinstance(card.config, TimmConfig):
        size = {"input_size": (card.config.in_chans, *used.img_size), "num_classes": card.config.num_classes}
        how = {"mean": used.mean, "std": used.std, "crop_pct": used.crop_pct, "interpolation": used.interpolation}
        cfg = {**dict(getattr(model, "pretrained_cfg", {})), **size, **how, **names}
    else:
        cfg = {**timm_cfg(card.config, used.mean, used.std, used.crop_pct, used.interpolation), **names}
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    return model.eval()


def _build(card: Card, num_tensors: int) -> nn.Module:
    """The model for the weights of a file, which are so many tensors."""
    return fuse(SReT(card.sret_config)) if card.is_fused else build_to_load(card.config, num_tensors)


def _checked(card: Card, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole state dict, with shared tensors under all their names.

    Raises `InputError` if the weights are not those of the card's model, before building it takes memory or time.
    """
    _check_blocks(card, state_dict)
    with torch.device("meta"):
        model = _build(card, len(state_dict))
        state_dict = everywhere(model, state_dict)
        check_fit(state_dict, model)
    return state_dict


def _check_blocks(card: Card, state_dict: dict[str, Tensor]) -> None:
    """Raises `InputError` if the card has far more blocks than there are tensors."""
    blocks = sum(stage.num_blocks for stage in card.config.stages) if isinstance(card.config, ModelConfig) else 0
    if blocks > 100 + len(state_dict):  # a block takes 5 ms to build, even without memory
        raise InputError(f"the weights do not fit the model: {blocks:,} blocks, but only {len(state_dict):,} tensors")


def read_card(path: str | os.PathLike[str], text: str) -> Card:
    """The card in the metadata of a file. Raises `InputError` naming the file if it cannot be read."""
    try:
        return Card.from_json(text)
    except _OtherFormat as error:
        raise InputError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path}: its metadata cannot be read by this version of sret ({error})") from error


def load(path: str | os.PathLike[str]) -> Any:
    """Loads the model of a weights file written by `sret`, in evaluation mode: an `SReT`, or a model of timm.

    Raises `InputError` for a file that is missing, damaged, or was not written by `sret`.
    """
    return load_any(path)[0]
