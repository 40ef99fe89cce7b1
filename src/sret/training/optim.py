"""What changes the weights: which are trained, the optimizer, the learning rate, the moving average. All timm's."""

from collections.abc import Sequence
from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from sret.errors import InputError, first_few
from sret.training.config import TrainConfig

WARMUP_START = 1e-3  # share of the peak learning rate; DeiT's 1e-6 at its 1e-3


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Leaves the parameters of these modules (such as "stem", "stages.0") as they are; returns the modules.

    They belong in evaluation mode while the rest trains, so that their BatchNorm statistics stay too.

    Raises `InputError` for a name that the model has not, and if nothing is left to train.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            raise InputError(
                f"freeze: the model has no part {name!r}; it has {', '.join(dict(model.named_children()))}"
            )
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: {first_few(names)} are the whole model, so that nothing is left to train")
    return [modules[name] for name in names]


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The recipe's optimizer over what is not frozen.

    Biases, norms, residual coefficients and the position embedding are not decayed (timm's rule). With `layer_decay`
    the rate of a layer is that share of the next one's; a recursion is one layer.
    """
    # One kernel for all weights: three times as fast as many small ones on a CPU.
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
    """Linear warm-up, then a half cosine down to `min_learning_rate`; `step_update(step)` sets it, a pure function.

    As DeiT has it, the cosine runs over the whole training and the warm-up cuts off its beginning.
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
    """The learning rate as it is now; with `layer_decay`, that of the last layer."""
    return max(group["lr"] for group in optimizer.param_groups)


def make_ema(model: nn.Module, decay: float, is_sharded: bool = False) -> ModelEmaV3:
    """A moving average of the weights; `update(model, step)` decays less in the first steps.

    Of a sharded model, the copy has to be sharded too.
    """
    # torch's fused update does not take sharded parameters and whole buffers together.
    return ModelEmaV3(model, decay, use_warmup=True, foreach=not is_sharded)
