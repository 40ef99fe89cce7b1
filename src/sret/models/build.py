"""Builds the model of a configuration, counts its cost, and names its tensors once where parts share weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.flop_counter import FlopCounterMode

from sret.errors import InputError, first_line
from sret.models.config import ModelConfig
from sret.models.cost import model_cost
from sret.models.recursify import recursify
from sret.models.sret import SReT
from sret.models.timm.config import TimmConfig, published_size

StateDict = Mapping[str, Tensor]
MAX_PARAMETERS = 20_000  # tensors of a model of timm. Each takes about a millisecond; the deepest have a few thousand


def build(config: ModelConfig | TimmConfig) -> nn.Module:
    """The model, with random weights. Raises `InputError` if timm cannot make it, or its blocks cannot be shared."""
    return SReT(config) if isinstance(config, ModelConfig) else share(make_timm(config), config)


def build_to_load(config: ModelConfig | TimmConfig, num_tensors: int) -> nn.Module:
    """As `build`, for weights that follow: no time is spent on corrections of low rank, or on too many blocks.

    Args:
        num_tensors: of the weights, each shared one once.
    """
    if isinstance(config, ModelConfig):
        return SReT(config)
    uses = max(config.sharing.passes, *config.sharing.group_sizes, 1)  # of a shared tensor
    with at_most(100 + uses * num_tensors, f"which does not fit the {num_tensors:,} of the weights"):
        model = make_timm(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return share(model, config)


def share(model: nn.Module, config: TimmConfig) -> nn.Module:
    """A model of timm with the configuration's shared blocks. Raises `InputError` as `recursify` does."""
    options = config.sharing.changed
    return recursify(model, **options) if options else model


def make_timm(config: TimmConfig, **options: Any) -> nn.Module:
    """The configuration's model before its blocks are shared.

    Args:
        options: further arguments of `timm.create_model`, such as pretrained.

    Raises `InputError` if timm cannot make it.
    """
    arguments = {**config.args, "num_classes": config.num_classes, "in_chans": config.in_chans, **options}
    has_other_size = config.input_size != published_size(config.timm)
    try:
        with at_most(MAX_PARAMETERS, "which is more than is possible"):
            return _create(config.timm, arguments, config.input_size if has_other_size else None)
    except InputError:
        raise
    except Exception as error:  # wrong arguments fail anywhere in timm
        raise InputError(f"timm cannot make {config.timm} with these arguments ({first_line(error)})") from error


def _create(name: str, arguments: Mapping[str, Any], size: tuple[int, int] | None) -> nn.Module:
    """A model of timm, for images of a size if it depends on one."""
    if size is not None:
        try:
            return timm.create_model(name, **arguments, img_size=size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise  # otherwise the model takes images of any size
    return timm.create_model(name, **arguments)


@contextmanager
def at_most(parameters: int, reason: str) -> Iterator[None]:
    """Within this context building a model with more parameters (tensors) raises `InputError`, before it takes long."""
    count, thread = 0, get_ident()

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += thread == get_ident()
        if count > parameters:
            raise InputError(f"the model would have more than {parameters:,} tensors, {reason}")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def totals_of(config: ModelConfig | TimmConfig) -> tuple[int, int]:
    """Parameters, each shared one once, and multiply-adds for one image. Raises `InputError` as `build` does."""
    if isinstance(config, ModelConfig):
        cost = model_cost(config)
        return cost.parameters, cost.macs
    with torch.device("meta"):
        model = build(config).eval()
        macs = count_macs(model, torch.zeros(1, config.in_chans, *config.input_size))
    return sum(parameter.numel() for parameter in model.parameters()), macs


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds for one image (1, C, H, W): convolutions, linear layers, attention products."""
    # PyTorch's counter knows neither the fused kernels of oneDNN nor those of attention, and fails with gradients if a
    # module returns tuples.
    model, counter = copy.deepcopy(model).requires_grad_(False), FlopCounterMode(display=False)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    return counter.get_total_flops() // 2


def owners_of(model: nn.Module) -> dict[str, str]:
    """For each name in the state dict, the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(x), name) for name, x in model.state_dict(keep_vars=True).items()}


def each_once(model: nn.Module, state: StateDict) -> dict[str, Tensor]:
    """A state dict of the model with each shared tensor under its first name only."""
    return {name: state[name] for name in dict.fromkeys(owners_of(model).values()) if name in state}


def everywhere(model: nn.Module, state: StateDict) -> dict[str, Tensor]:
    """What `each_once` was given: shared tensors under all their names."""
    shared = {name: owner for name, owner in owners_of(model).items() if name != owner and owner in state}
    return {**state, **{name: state[owner] for name, owner in shared.items()}}
