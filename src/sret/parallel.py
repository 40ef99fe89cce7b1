"""One model on several processes: BatchNorm over all of them, sharding, and whole states whatever the layout.

DDP is accelerate's. Sharding is torch's `fully_shard` (FSDP2), applied here: a block is a unit of its own, below the
recursion that uses it several times, so that each pass gathers it and lets it go, and its gradient is reduced once.
(accelerate 1.15 takes DDP in silence where FSDP is asked for on CPU, so that its sharding could not be tested there.)
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from sret.layers import Block, NonLinearProjection

_WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


class _Mean(torch.autograd.Function):
    """Of equal shapes in all processes, each gets the mean; so do the gradients."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        mean = x / distributed.get_world_size()
        distributed.all_reduce(mean)
        return mean

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Mean.forward(_, gradient)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the pictures of all processes, on any device; torch's own is for GPUs alone.

    All processes hold equally many pictures of a step, so that the mean of their means is the mean of all.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = _Mean.apply(x.mean((0, 2, 3)))
        centred = x - mean.view(-1, 1, 1)
        variance = _Mean.apply(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = distributed.get_world_size() * x.numel() / x.shape[1]
            updates = {"running_mean": mean, "running_var": variance * (count / (count - 1))}
            for name, update in updates.items():
                self.get_buffer(name).lerp_(update, self.momentum or 0.0)
            self.get_buffer("num_batches_tracked").add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Makes every BatchNorm of the model take its statistics over all processes; keys and values stay."""
    for name, child in model.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            synchronize_batch_norm(child)
        elif child.weight.is_cuda:
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            synchronized = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            synchronized.load_state_dict(child.state_dict())
            setattr(model, name, synchronized.requires_grad_(child.weight.requires_grad).train(child.training))


def shard(model: nn.Module) -> None:
    """Divides the parameters among all processes, block by block and projection by projection (FSDP2)."""
    for module in model.modules():
        if isinstance(module, Block | NonLinearProjection):
            fully_shard(module)
    fully_shard(model)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Whole tensors on the CPU; every process takes part, only the first one gets them."""
    return whole.get_model_state_dict(model, options=_WHOLE)


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Gives every process its part of whole tensors."""
    whole.set_model_state_dict(model, state, options=_WHOLE)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Keyed by the names of parameters, so that any layout can take it up; empty before the first step.

    (torch would make up a state by a step of its own, which Adam's bias correction counts.)
    """
    if not optimizer.state:
        return {}
    return whole.get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Gives every process its part of a whole state."""
    whole.set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)
