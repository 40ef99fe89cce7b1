"""The model of a training run: it fits the data, has its first weights, and is called by the steps."""

from typing import cast

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.resolve import find_source
from sret.checkpoints.timm_init import PRETRAINED, initialise
from sret.data.dataset import ImageData
from sret.errors import InputError
from sret.kernels.cuda_graph import GraphedGradients
from sret.layers.permutation import StaticPermuter
from sret.models.build import build
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.timm.config import TimmConfig
from sret.training import distributed
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.optim import freeze


def check_init(config: TrainConfig) -> None:
    """Raises `InputError` if the recipe's `init` is no file or name, or not one for its model."""
    if config.init == PRETRAINED:
        if isinstance(config.model_config(), ModelConfig):
            raise InputError(
                f"init {PRETRAINED} is for models of timm; give a weights file, or a published name such as "
                "sret_t.dist_in1k"
            )
    elif config.init is not None:
        find_source(config.init)


def make_model(
    model_config: ModelConfig | TimmConfig,
    config: TrainConfig,
    accelerator: Accelerator,
    console: Console,
    may_init: bool,
) -> tuple[nn.Module, list[nn.Module]]:
    """The model on its device, with weights initialised from the seed, and its frozen parts.

    Args:
        may_init: whether to load the weights of the recipe's `init`; a resumed run has its own.
    """
    torch.manual_seed(config.seed)
    init, lines = config.init if may_init else None, list[str]()
    if isinstance(model_config, TimmConfig) and init is not None:
        model, lines = initialise(model_config, init)
    else:
        model = build(model_config)
        if init is not None:
            lines = transfer_file(cast(SReT, model), init)
    for line in lines:
        console.print(f"Init    {line}", soft_wrap=True)
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        distributed.synchronize_batch_norm(model)
    return model, freeze(model, config.freeze)


def fitting_model(config: TrainConfig, data: ImageData) -> ModelConfig | TimmConfig:
    """The model of a recipe for a data set. Raises `InputError` if classes or channels differ from the data's."""
    if len(data.class_names) < 2:
        raise InputError(
            f"{data.name} has only one class, {data.class_names[0]!r}; give the folder that has a sub-folder per class"
        )
    wanted = config.model_config(len(data.class_names), data.in_chans)
    if wanted.num_classes != len(data.class_names):
        raise InputError(
            f"the model has {wanted.num_classes} classes, {data.name} has {len(data.class_names)}; "
            f"set model.num_classes to {len(data.class_names)}"
        )
    if wanted.in_chans != data.in_chans:
        raise InputError(
            f"the model takes {wanted.in_chans} channels, {data.name} has {data.in_chans}; "
            f"set model.in_chans to {data.in_chans}"
        )
    return wanted


def make_net(model: nn.Module, runtime: RuntimeConfig, device: torch.device) -> nn.Module:
    """The model as steps call it: compiled if asked for, and replicated on all processes unless it is sharded."""
    if runtime.compile:
        model.compile()
    if runtime.fsdp:
        return model
    has_exits = isinstance(model, SReT) and len(model.exits) > 0
    return distributed.replicate(EveryExit(cast(SReT, model)) if has_exits else model, device)


class EveryExit(nn.Module):
    """A model with exits, as steps call it: all exits learn in each step, with equal weights.

    Their losses have one mean, since the loss function broadcasts the targets (B, K) to the logits.
    """

    def __init__(self, model: SReT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (exits, B, K) logits, those of `model(images)` last."""
        return torch.stack(self.model.forward_exits(images))


def make_graph(model: nn.Module) -> GraphedGradients:
    """Replays the gradients of an `SReT`, whose permutations get memory of their own."""
    model = cast(SReT, model)
    model.permuter = StaticPermuter(model.permuter)
    return GraphedGradients([parameter for parameter in model.parameters() if parameter.requires_grad])
