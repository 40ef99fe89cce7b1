"""Translates the authors' checkpoints into ours and back; no other module contains their key names.

The authors' files are pickles of `{"model": state dict, maybe "args": argparse.Namespace, ...}`. A shared block is
stored once per pass, under each position of its stage at which it is used: with R passes, pass r of block i is position
2 (i R + r), and the projection after it is the next position.

No checksums are published, so files are checked key by key and shape by shape.
"""

import functools
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from sret.checkpoints.files import StateDict, read_pickle
from sret.errors import InputError, InputWarning, error_prefix, first_few
from sret.layers.position import resize
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.variants import PUBLISHED, config_of
from sret.ranges import fits

_STEM = {f"patch_embed.{name}.": f"stem.{name}." for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")}
_BLOCK = {
    "norm1.": "attn.norm.",
    "attn.": "attn.branch.",
    "coefficient1.bias": "attn.alpha",
    "coefficient2.bias": "attn.beta",
    "norm2.": "mlp.norm.",
    "mlp.": "mlp.branch.",
    "coefficient3.bias": "mlp.alpha",
    "coefficient4.bias": "mlp.beta",
}
_PROJECTION = {
    "norm1.": "norm.",
    "mlp.": "branch.",
    "coefficient1.bias": "alpha",
    "coefficient2.bias": "beta",
}
EXITS = ("exits.", "exit_norms.")  # ours alone
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def official_keys(config: ModelConfig) -> dict[str, list[str]]:
    """Our key -> the authors' keys of the same tensor, in the order of use; more than one where a block is shared."""
    with torch.device("meta"):
        ours = SReT(config).state_dict()
    return {key: _official_names(key, config) for key in ours}


def _official_names(key: str, config: ModelConfig) -> list[str]:
    if key == "pos_embed.weight":
        return ["pos_embed"]
    if match := re.fullmatch(r"stages\.(\d+)\.pool\.(.*)", key):
        return [f"pools.{int(match[1]) - 1}.{match[2]}"]
    if match := re.fullmatch(r"stages\.(\d+)\.recursions\.(\d+)\.(block|projections\.(\d+))\.(.*)", key):
        stage, recursion, num_passes = int(match[1]), int(match[2]), config.stages[int(match[1])].num_passes
        if match[3] == "block":
            positions = [2 * (recursion * num_passes + i) for i in range(num_passes)]
            name = _renamed(match[5], _BLOCK)
        else:
            positions = [2 * (recursion * num_passes + int(match[4])) + 1]
            name = _renamed(match[5], _PROJECTION)
        return [f"transformers.{stage}.blocks.{position}.{name}" for position in positions]
    return [_renamed(key, _STEM)]


def _renamed(key: str, official_to_ours: Mapping[str, str]) -> str:
    for official, ours in official_to_ours.items():
        if key.startswith(ours):
            return official + key[len(ours) :]
    return key


def to_official(state_dict: Mapping[str, Tensor], config: ModelConfig) -> StateDict:
    """Our state dict under the authors' names, a shared tensor under each of its positions.

    Raises `InputError` for a model with exits.
    """
    if config.exits != "none":
        raise InputError("the authors' format has no exits; use a .safetensors file")
    return {name: state_dict[key] for key, names in official_keys(config).items() for name in names}


def from_official(state_dict: Mapping[str, Tensor], config: ModelConfig) -> StateDict:
    """The authors' state dict under our names, every tensor once.

    Raises `InputError` if keys or shapes are not those of `config`, naming them and the most similar variant, or if two
    positions of a shared block hold different values.
    """
    names = official_keys(config)
    wrong = _differences({key: tensor.shape for key, tensor in state_dict.items()}, _shapes(config))
    if wrong:
        raise InputError(f"the checkpoint does not fit this model: {first_few(wrong)}. {_most_similar(state_dict)}")
    converted = {}
    for key, duplicates in names.items():
        first = state_dict[duplicates[0]]
        for other in duplicates[1:]:
            if not torch.equal(first, state_dict[other]):
                raise InputError(
                    f"{duplicates[0]} and {other} should be one shared tensor but differ; "
                    "this checkpoint was not trained with shared weights, or was altered"
                )
        converted[key] = first
    return converted


@functools.cache
def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Key -> shape of the authors' state dict for this configuration."""
    with torch.device("meta"):
        ours = SReT(config).state_dict()
    return {name: tensor.shape for name, tensor in to_official(ours, config).items()}


def _differences(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """The differences between two sets of named shapes, one phrase each."""
    wrong = [f"missing {key}" for key in expected if key not in found]
    wrong += [f"unexpected {key}" for key in found if key not in expected]
    wrong += [
        f"{key} is {tuple(found[key])}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    return wrong


def _most_similar(state_dict: Mapping[str, Tensor]) -> str:
    fitting = fitting_variants(state_dict)
    if fitting:
        return f"It fits {' or '.join(fitting)}"

    def matches(variant: str) -> int:
        return sum(key in state_dict and state_dict[key].shape == s for key, s in _shapes(PUBLISHED[variant]).items())

    best = max(PUBLISHED, key=matches)
    if not matches(best):
        return "It fits no published SReT; is it a checkpoint of the authors' release?"
    return f"The most similar variant is {best}: {matches(best)} of {len(state_dict)} tensors fit"


def fitting_variants(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Variants whose keys and shapes the authors' state dict has, whatever its number of classes.

    Weights do not depend on slices, so the sliced and unsliced models of one size all fit.
    """
    shapes = {key: tensor.shape for key, tensor in state_dict.items() if not key.startswith("head.")}
    return [
        variant
        for variant, config in PUBLISHED.items()
        if {key: shape for key, shape in _shapes(config).items() if not key.startswith("head.")} == shapes
    ]


def has_shapes_of(config: ModelConfig, official: Mapping[str, Tensor]) -> bool:
    """Whether the authors' state dict is one of `config`, with any classes, channels and size of images."""
    found = {key: tensor.shape for key, tensor in official.items()}
    try:
        return not _differences(found, _shapes(matching_config(config, official)))
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
        raise InputError(f"the checkpoint fits no published SReT. {_most_similar(state_dict)}")
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


def matching_config(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> ModelConfig:
    """`config` with the classes, channels, exits and image size that a state dict, ours or the authors', is for."""
    changes: dict[str, Any] = {"num_classes": 0, "global_pool": "avg"}
    if not any(key.startswith(EXITS) for key in state_dict):
        changes["exits"] = "none"
    for key, tensor in state_dict.items():
        if key == "head.weight" and tensor.ndim > 0:
            changes["num_classes"] = tensor.shape[0]
        elif key in ("patch_embed.conv1.weight", "stem.conv1.weight") and tensor.ndim > 1:
            changes["in_chans"] = tensor.shape[1]
        elif key in ("pos_embed", "pos_embed.weight") and tensor.ndim == 4:
            changes["img_size"] = tuple(tokens * config.stem_stride for tokens in tensor.shape[2:])
    return replace(config, **changes)


def load_pretrained(model: SReT, state_dict: Mapping[str, Tensor]) -> None:
    """Loads our state dict into a model that may differ in image size, input channels and number of classes.

    The position embedding is resized, the first convolution is adapted to the channels, and a classifier for another
    number of classes keeps its initial values, as exits do if the weights have none or others. Raises `InputError` if
    anything else does not fit.
    """
    expected = model.state_dict()
    adapted = dict(state_dict)
    ours, theirs = ({k: v.shape for k, v in values.items() if k.startswith(EXITS)} for values in (expected, adapted))
    if ours != theirs:
        adapted = {key: value for key, value in adapted.items() if key not in theirs}
        adapted |= {key: expected[key] for key in ours}
    head = state_dict.get("head.weight")
    if model.num_classes != (0 if head is None else head.shape[0]):
        adapted = {key: value for key, value in adapted.items() if not key.startswith("head.")}
        adapted |= {key: value for key, value in expected.items() if key.startswith("head.")}
    if "pos_embed.weight" in adapted:
        grid = model.pos_embed.weight.shape[-2:]
        adapted["pos_embed.weight"] = resize(adapted["pos_embed.weight"], (grid[0], grid[1]))
    if "stem.conv1.weight" in adapted and adapted["stem.conv1.weight"].shape[1] != model.in_chans:
        weight = adapted["stem.conv1.weight"]
        if weight.shape[1] == 3:
            adapted["stem.conv1.weight"] = adapt_input_conv(model.in_chans, weight)
        else:  # timm adapts only from three channels; otherwise every channel gets the mean weight
            grey = weight.sum(1, keepdim=True)
            adapted["stem.conv1.weight"] = grey.repeat(1, model.in_chans, 1, 1) / model.in_chans
    load_strictly(model, adapted)


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads our state dict into a model with exactly its keys and shapes; raises `InputError` with the differences."""
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)


def check_fit(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises `InputError` if keys, shapes or kinds of numbers differ from the model's, or values are not finite."""
    expected = model.state_dict()
    wrong = _differences(*({key: tensor.shape for key, tensor in state.items()} for state in (state_dict, expected)))
    wrong += [
        f"{key} is of {value.dtype}, not {expected[key].dtype}"
        for key, value in state_dict.items()
        if key in expected and expected[key].is_floating_point() and value.dtype not in _FLOATS
    ]
    if wrong:
        raise InputError(f"these weights do not fit the model: {first_few(wrong)}")
    if non_finite := [key for key, value in state_dict.items() if not value.isfinite().all()]:
        raise InputError(f"values are not finite in {first_few(non_finite)}; the file is damaged")
