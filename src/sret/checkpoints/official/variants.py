"""Reads the authors' files, and finds which of the published models one is.

The files are pickles of `{"model": state dict, maybe "args": argparse.Namespace, ...}`. No checksums are published, so
they are checked key by key and shape by shape.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sret.checkpoints.files import StateDict, read_pickle
from sret.checkpoints.fit import differences, load_strictly
from sret.checkpoints.official.keys import fitting_variants, from_official, matching_config, most_similar, shapes_of
from sret.errors import InputError, InputWarning, error_prefix, first_few
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.variants import config_of
from sret.ranges import fits


def has_shapes_of(config: ModelConfig, official: Mapping[str, Tensor]) -> bool:
    """Whether the authors' state dict is one of `config`, with any classes, channels and size of images."""
    found = {key: tensor.shape for key, tensor in official.items()}
    try:
        return not differences(found, shapes_of(matching_config(config, official)))
    except InputError:  # an image size that this model cannot slice
        return False


def read_official(path: str | os.PathLike[str]) -> tuple[StateDict, str | None]:
    """Reads the authors' state dict from a file, and the name of its model if the file has it.

    Raises `InputError` as `read_pickle` does, or if there is no state dict inside.
    """
    content = read_pickle(path)
    state_dict = content.get("model", content)
    if not fits(state_dict, dict[str, Tensor]):
        if {"sha256", "content"} <= content.keys():
            raise InputError(f"{path}: the state of a run, for --resume; give its best.safetensors or last.safetensors")
        raise InputError(f"{path}: no state dict under 'model'; the file has {', '.join(map(str, list(content)[:8]))}")
    if views := [
        key for key, x in state_dict.items() if x.layout != torch.strided or x.nbytes > x.untyped_storage().nbytes()
    ]:
        raise InputError(f"{path}: refused, {first_few(views)} have more values than the file")
    trained_as = getattr(content.get("args"), "model", None)
    return state_dict, trained_as if isinstance(trained_as, str) else None


def identify(state_dict: Mapping[str, Tensor], hint: str) -> str:
    """The variant of the authors' state dict; `hint`, a file or model name, distinguishes models of equal shapes.

    Warns if the hint does not decide; raises `InputError` if nothing fits.
    """
    fitting = fitting_variants(state_dict)
    if not fitting:
        raise InputError(f"the checkpoint fits no published SReT. {most_similar(state_dict)}")
    hint = hint.lower()
    if "wo_slice" in hint or "unsliced" in hint:
        return next(variant for variant in fitting if "unsliced" in variant)
    sliced = [variant for variant in fitting if "unsliced" not in variant]
    if re.search(r"16[-_]14[-_]1", hint) and "sret_lt_16_14_1" in sliced:
        return "sret_lt_16_14_1"
    # A size alone means its sliced model. Two sliced LT models are published, but only one is distilled.
    is_named = re.search(r"sret_(t|s)(?![a-z0-9])|sret_lt.*dist", hint) is not None
    if len(fitting) > 1 and not is_named:
        warnings.warn(
            f"the weights do not show the number of slices: loading them as {fitting[0]}, but they also fit "
            f"{' and '.join(fitting[1:])}; to load them as one of these, give the variant",
            InputWarning,
            stacklevel=3,
        )
    return fitting[0]


def load_official(path: str | os.PathLike[str], variant: str | None = None) -> SReT:
    """A model with the weights of one of the authors' files, in evaluation mode.

    Args:
        path: a file of the authors' release, or of training with their code, with any number of classes; or a file
            that `sret convert` wrote in their format.
        variant: which model it is; by default found from shapes, the file's name and the arguments saved inside.

    Raises `InputError` if the file cannot be read safely, fits no variant, or does not fit the given one.
    """
    from sret.checkpoints.card import load_converted  # which imports this module

    if variant is None and (converted := load_converted(path)) is not None:
        return converted[0]
    state_dict, trained_as = read_official(path)
    with error_prefix(path):
        if variant is None:
            variant = identify(state_dict, f"{trained_as or ''} {Path(path).name}")
        config = matching_config(config_of(variant), state_dict)
        ours = from_official(state_dict, config)  # checks the shapes, before a model takes memory
        model = SReT(config)
        load_strictly(model, ours)
    return model.eval()
