"""Distillation from a teacher, as the SReT authors do it: only soft labels, no hard labels.

    L = mean over images of  -sum_k softmax(teacher / T)_k log softmax(student / T)_k

Source: the authors' release, which trained the published distilled models; there is no factor T^2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from sret.checkpoints.files import refuse_code
from sret.checkpoints.resolve import resolve
from sret.data.preprocess import Preprocessing
from sret.errors import InputError, did_you_mean, first_line
from sret.network import hub_cache_if_unreachable, hub_host, is_unreachable


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(B,) class indices -> (B, K) probabilities; (B, K) probabilities stay as they are."""
    if labels.is_floating_point():
        return labels
    return one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def soft_predictions(model: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """(B, C, H, W) normalised for the model -> (B, K) probabilities of the logits divided by a temperature."""
    return (model(images).float() / temperature).softmax(dim=1)


class Teacher(nn.Module):
    """A frozen model in evaluation mode, which takes the student's images and preprocesses them itself.

    Args:
        model: any classifier.
        preprocessing: the image size and the normalisation that it was trained with.
        in_chans: channels of the student's images.
        temperature: T.

    Raises `InputError` for a teacher of grey images and a student of colour images.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, in_chans: int, temperature: float) -> None:
        super().__init__()
        if len(preprocessing.mean) == 1 < in_chans:
            raise InputError("the teacher takes grey images, but the data has colour images; choose another teacher")
        self.model = model.requires_grad_(False).eval()
        self.preprocessing, self.temperature = preprocessing, temperature

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 -> (B, K) probabilities."""
        return soft_predictions(self.model, self.preprocess(images), self.temperature)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in 0..1 with the teacher's channels, size and normalisation."""
        if len(self.preprocessing.mean) == 3:
            images = images.expand(-1, 3, -1, -1)
        if tuple(images.shape[-2:]) != tuple(self.preprocessing.img_size):
            images = interpolate(images, self.preprocessing.img_size, mode="bicubic", antialias=True)
        return self.preprocessing.normalize(images)


def load_teacher(name: str, weights: Path | None, class_names: Sequence[str]) -> tuple[nn.Module, Preprocessing]:
    """A teacher and its preprocessing.

    Args:
        name: a weights file, ours or the authors'; or a name for `timm.create_model`, with its pretrained weights.
        weights: a file to use instead of timm's pretrained weights.
        class_names: the student's.

    Raises `InputError` if the teacher cannot be loaded, or has other classes.
    """
    model: nn.Module
    if Path(name).is_file():
        if weights is not None:
            raise InputError(f"{name} is a weights file itself; leave teacher_weights out")
        model, card = resolve(name)
        if card.class_names and tuple(card.class_names) != tuple(class_names):
            raise InputError(f"the teacher {name} has other classes than the data, or another order of classes")
        preprocessing = card.preprocessing
    else:
        model, preprocessing = _from_timm(name, weights, len(class_names))
    if model.num_classes != len(class_names):
        raise InputError(f"the teacher {name} has {model.num_classes} classes, the data has {len(class_names)}")
    return model, preprocessing


def load_original(
    name: str, weights: Path | None, class_names: Sequence[str], arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    """A timm model whose classes are those of the data, and its preprocessing.

    Args:
        weights: a file to use instead of timm's pretrained weights.
        arguments: of `timm.create_model`, such as img_size.

    Raises `InputError` if the model cannot be loaded, or has another number of classes.
    """
    count = len(class_names)
    model, preprocessing = _from_timm(name, weights, count, arguments, ("model", "--weights"))
    if model.num_classes != count:
        raise InputError(
            f"{name} has {model.num_classes} classes, the data has {count}; train it on the data first (`sret train "
            f"--model.timm {name} --init pretrained`), and give its weights file in place of the name"
        )
    return model, preprocessing


def _from_timm(
    name: str,
    weights: Path | None,
    num_classes: int,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    words: tuple[str, str] = ("teacher", "teacher_weights"),
) -> tuple[nn.Module, Preprocessing]:
    """`words` are what errors call the model, and the option that names a file of weights."""
    role, option = words
    known = timm.list_models() + timm.list_pretrained()
    if ":" not in name and name not in known:
        raise InputError(f"unknown {role} {name!r}; give a weights file or a timm model{did_you_mean(name, known)}")
    if weights is not None:
        if not weights.is_file():
            raise InputError(f"{weights}: no such file, for the weights of the {role} {name}")
        refuse_code(weights)
    try:
        if weights is None:
            with hub_cache_if_unreachable():
                model = timm.create_model(name, pretrained=True, **arguments)
        else:
            model = timm.create_model(name, **{"num_classes": num_classes, **arguments}, checkpoint_path=str(weights))
    except InputError:
        raise
    except Exception as error:  # timm passes on errors of the hub, of the network and of checkpoints
        reason = first_line(error)
        if is_unreachable(error):
            reason = f"no connection to {hub_host()}"
        hint = (
            f"{option} can name a file with its weights"
            if weights is None
            else f"{weights} should hold timm's weights for it, with {num_classes} classes"
        )
        raise InputError(f"could not load the {role} {name}: {reason}; {hint}") from error
    wanted = resolve_model_data_config(model)
    size = arguments.get("img_size", wanted["input_size"][1:])
    mean, std = tuple(wanted["mean"]), tuple(wanted["std"])
    if arguments.get("in_chans", 3) == 1:  # timm has those of colours only
        mean, std = (fmean(mean),), (fmean(std),)
    return model, Preprocessing(
        img_size=(size, size) if isinstance(size, int) else tuple(size),
        mean=mean,
        std=std,
        crop_pct=wanted["crop_pct"],
        interpolation=wanted["interpolation"],
    )
