"""Optimizer, learning rate schedule, moving average (EMA) and frozen parts, all by timm."""

from collections.abc import Sequence
from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from sret.errors import InputError, first_few
from sret.models.build import owners_of
from sret.training.config import TrainConfig

WARMUP_START = 1e-3  # share of the peak learning rate, as DeiT's 1e-6 of 1e-3


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Freezes the parameters of these modules, such as "stem" or "stages.0"; returns the modules.

    Keep them in evaluation mode during training, so that their BatchNorm statistics stay the same.

    Raises `InputError` for an unknown name, and if nothing is left to train.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            raise InputError(
                f"freeze: the model has no part {name!r}; it has {', '.join(dict(model.named_children()))}"
            )
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"freeze: {first_few(names)} are the whole model; leave out some, since nothing is left to train"
        )
    return [modules[name] for name in names]


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The recipe's optimizer, for the weights that are not frozen.

    Biases, norms, residual coefficients and the position embedding get no weight decay (timm's rule). For
    `layer_decay` a recursion is one layer.
    """
    # One kernel for all weights; on a CPU three times as fast as many small ones.
    fused: dict[str, Any] = {"fused": True} if config.optimizer == "adamw" else {}
    return create_optimizer_v2(
        model,
        opt=config.optimizer,
        **fused,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )


def make_schedule(optimizer: Optimizer, config: TrainConfig, epoch_steps: int) -> CosineLRScheduler:
    """Linear warm-up, then a half cosine to `min_learning_rate`; `step_update(step)` is a pure function of the step.

    As in DeiT, the cosine spans the whole training, and the warm-up replaces its beginning.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * epoch_steps,
        lr_min=config.min_learning_rate,
        warmup_t=round(config.warmup_epochs * epoch_steps),
        warmup_lr_init=WARMUP_START * config.learning_rate,
        t_in_epochs=False,
    )


def rate_of(optimizer: Optimizer) -> float:
    """The current learning rate; with `layer_decay`, that of the last layer."""
    return max(group["lr"] for group in optimizer.param_groups)


def make_ema(model: nn.Module, decay: float, is_sharded: bool = False) -> ModelEmaV3:
    """An exponential moving average of the weights; `update(model, step)` uses a lower decay in the first steps.

    The average of a sharded model must be sharded too.
    """
    # The state dict, which is averaged by default, has shared weights several times; the parameters have them once.
    has_shared = len(set(owners_of(model).values())) < len(model.state_dict())
    # torch's foreach update does not support sharded parameters together with whole buffers.
    return ModelEmaV3(model, decay, use_warmup=True, foreach=not is_sharded, exclude_buffers=has_shared)
