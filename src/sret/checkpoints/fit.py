"""Loads a state dict into a model that it fits: exactly, or with another image size, other channels or classes."""

from collections.abc import Mapping

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from sret.errors import InputError, first_few
from sret.layers.position import resize
from sret.models.sret import SReT

EXITS = ("exits.", "exit_norms.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def differences(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """The differences between two sets of named shapes, one phrase each."""
    wrong = [f"missing {key}" for key in expected if key not in found]
    wrong += [f"unexpected {key}" for key in found if key not in expected]
    wrong += [
        f"{key} is {tuple(found[key])}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    return wrong


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
    wrong = differences(*({key: tensor.shape for key, tensor in state.items()} for state in (state_dict, expected)))
    wrong += [
        f"{key} is of {value.dtype}, not {expected[key].dtype}"
        for key, value in state_dict.items()
        if key in expected and expected[key].is_floating_point() and value.dtype not in _FLOATS
    ]
    if wrong:
        raise InputError(f"these weights do not fit the model: {first_few(wrong)}")
    if non_finite := [key for key, value in state_dict.items() if not value.isfinite().all()]:
        raise InputError(f"values are not finite in {first_few(non_finite)}; the file is damaged")
