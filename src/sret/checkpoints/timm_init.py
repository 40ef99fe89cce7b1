"""Gives a model of timm its first weights: timm's pretrained ones, or those of a file, before or after blocks share."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from sret.checkpoints.card import METADATA_KEY, read_card
from sret.checkpoints.files import read_safetensors, refuse_code
from sret.checkpoints.fit import load_strictly
from sret.checkpoints.resolve import find_source
from sret.errors import InputError, error_prefix, first_few
from sret.models.build import build, everywhere, make_timm, share
from sret.models.timm.config import Sharing, TimmConfig
from sret.network import hub_cache_if_unreachable, hub_host, is_unreachable

PRETRAINED = Path("pretrained")  # in place of a file: the weights that timm publishes


def initialise(config: TimmConfig, source: str | os.PathLike[str]) -> tuple[nn.Module, list[str]]:
    """The model with weights of a source, and what was reused, one phrase for each part.

    Args:
        source: "pretrained"; a weights file of sret with this model, whose blocks share weights in the same way or not
            at all; or a file of timm for the model before sharing. Position embeddings of another image size are
            resized, and a classifier for other classes begins anew.

    Raises `InputError` for weights that cannot be read, or are not those of this model.
    """
    if source == PRETRAINED:
        return share(_pretrained(config), config), [f"weights of timm for {config.timm}"]
    path, _ = find_source(source)
    tensors, metadata = read_safetensors(path) if path.suffix == ".safetensors" else ({}, {})
    if METADATA_KEY not in metadata:
        refuse_code(path)
        with error_prefix(path):
            model, new = _of_timm(config, path, tensors)
        return share(model, config), [f"weights of {path}", *new]
    found = read_card(path, metadata[METADATA_KEY]).config
    with error_prefix(path):
        if not isinstance(found, TimmConfig):
            raise InputError(f"it has an SReT; give weights of {config.timm}")
        if found.sharing not in (Sharing(), config.sharing):
            ways = [one.sharing.changed or "no sharing" for one in (found, config)]
            raise InputError(f"its blocks have {ways[0]}, those of the model {ways[1]}")
        is_shared = found.sharing == config.sharing
        model = build(config) if is_shared else make_timm(config)
        lines = [f"weights of {path}", *_load(model, tensors)]
    return model if is_shared else share(model, config), lines


def _pretrained(config: TimmConfig) -> nn.Module:
    try:
        with hub_cache_if_unreachable():
            return make_timm(config, pretrained=True)
    except InputError as error:
        if error.__cause__ is not None and is_unreachable(error.__cause__):
            raise InputError(
                f"no connection to {hub_host()}, for the weights of {config.timm}; init can name a file with them"
            ) from error
        raise


def _of_timm(config: TimmConfig, path: Path, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """The model before sharing with the weights of a file of timm, and what was not loaded.

    Args:
        tensors: of a safetensors file; other files are read here.
    """
    if path.suffix in (".npz", ".npy"):
        return make_timm(config, checkpoint_path=os.fspath(path)), []
    state = tensors or load_state_dict(os.fspath(path))
    if not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"not weights of timm, it has {first_few(list(map(str, state)))}")
    model = make_timm(config)
    return model, _load(model, state)


@torch.no_grad()
def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Loads weights; those that depend on the image size are resized, and a classifier of another size keeps its own.

    Returns what was not loaded as it is, as phrases.
    """
    state, own = everywhere(model, tensors), model.state_dict()
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    other = [name for name in own if name in state and state[name].shape != own[name].shape]
    new = [name for name in other if name.startswith(heads)]
    resized = [name for name in other if name not in new]
    if resized:
        state = _resized(model, state)
    load_strictly(model, {**state, **{name: own[name] for name in new}})
    lines = [f"{first_few(resized)}: resized to the model's image size"] if resized else []
    return [*lines, f"{', '.join(new)}: new, for {own[new[-1]].shape[0]} classes"] if new else lines


def _resized(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of another image size, as timm resizes position embeddings when it loads published ones."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return convert(state, model)
    except Exception:  # of weights of another model, anything; the check of shapes says what differs
        return state
