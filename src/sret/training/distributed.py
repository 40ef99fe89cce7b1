"""Trains on several processes: DDP or FSDP2, BatchNorm over all processes, whole states, and common errors.

FSDP2 is torch's `fully_shard`, applied here with a recursion as its unit: weights are gathered once for all passes, and
gradients are reduced once. (accelerate 1.15 silently uses DDP if FSDP is requested on CPUs, where it could not be
tested.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sret.errors import InputError
from sret.layers import Recursion
from sret.models.build import each_once, everywhere
from sret.models.config import ModelConfig
from sret.models.timm.config import TimmConfig
from sret.training.config import RuntimeConfig, TrainConfig

PROCESS_TIMEOUT = timedelta(hours=2)  # while the first process downloads, indexes or saves
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


class _Mean(torch.autograd.Function):
    """The mean of the tensors of all processes, in forward and of the gradients in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return mean_of_processes(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return mean_of_processes(gradient)


def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of the tensors, of equal shapes, of all processes."""
    mean = x / distributed.get_world_size()
    distributed.all_reduce(mean)
    return mean


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes, on any device; torch's version supports only GPUs.

    All processes have the same number of images, so the mean of their means is the mean of all images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None
        with torch.autocast(x.device.type, enabled=False):
            inputs = x.to(self.weight.dtype)  # statistics in full precision, as in BatchNorm
            mean = _Mean.apply(inputs.mean((0, 2, 3)))
            centred = inputs - mean.view(-1, 1, 1)
            variance = _Mean.apply(centred.square().mean((0, 2, 3)))
            with torch.no_grad():
                count = distributed.get_world_size() * x.numel() / x.shape[1]
                self.get_buffer("running_mean").lerp_(mean, self.momentum)
                self.get_buffer("running_var").lerp_(variance * (count / (count - 1)), self.momentum)
                self.get_buffer("num_batches_tracked").add_(1)
            scale = (variance + self.eps).rsqrt() * self.weight
            return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Replaces every BatchNorm of the model by one with statistics over all processes; keys and values stay."""
    for name, child in model.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            synchronize_batch_norm(child)
        elif child.weight.is_cuda:
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            synchronized = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            synchronized.load_state_dict(child.state_dict())
            setattr(model, name, synchronized.requires_grad_(child.weight.requires_grad).train(child.training))


def shard(*models: nn.Module) -> None:
    """Shards the parameters of models over all processes, with a recursion as the unit (FSDP2)."""
    for model in models:
        for module in model.modules():
            if isinstance(module, Recursion):
                fully_shard(module)
        fully_shard(model)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over all processes (DDP); the model itself if there is one process.

    (accelerate's `prepare` would also change the model's own forward permanently to reduced precision.)
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def reduce_gradients(net: nn.Module, is_last: bool) -> Iterator[None]:
    """Within this context backward reduces gradients over the processes only in the last part of a step."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(is_last)
    with net.no_sync() if isinstance(net, DistributedDataParallel) and not is_last else nullcontext():
        yield


def non_finite(model: nn.Module) -> list[str]:
    """Names of the weights with values that are not finite, in this process's shard."""
    tensors = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    is_finite = {name: x.isfinite().all() for name, x in tensors.items() if x.is_floating_point()}
    if not is_finite or torch.stack(list(is_finite.values())).all():  # usually only one synchronisation with the device
        return []
    return [name for name, value in is_finite.items() if not value]


def raise_together(error: str | None) -> None:
    """Every process calls this; if one passes an error, all raise it as `InputError`, and none waits for another."""
    if errors := gather_object([error] if error else []):
        raise InputError(errors[0])


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors on the CPU, each shared one once, in the first process only; every process must call this."""
    return each_once(model, cast(dict[str, Tensor], state_dict.get_model_state_dict(model, options=WHOLE)))


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads whole tensors; every process takes its shard."""
    whole: dict[str, Any] = everywhere(model, state)
    state_dict.set_model_state_dict(model, whole, options=WHOLE)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Keyed by parameter names, so that any number of processes can load it; empty before the first step.

    (torch would create a state by a step of its own, which Adam's bias correction would count.)
    """
    return state_dict.get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else {}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a whole state; every process takes its shard. An empty state is that of a new optimizer."""
    if state:
        state_dict.set_optimizer_state_dict(model, optimizer, state, options=replace(WHOLE, strict=False))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in state["state"]:  # of a pass that did not run yet
                del optimizer.state[parameter]


def make_accelerator(config: TrainConfig, runtime: RuntimeConfig, out: Path) -> Accelerator:
    """The processes, devices and precision of a run. Raises `InputError` for settings that would have no effect."""
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate is configured for {engine}, which this command does not use; start plain processes with "
                "`accelerate launch --multi_gpu` or torchrun, and set --fsdp true to shard the model over them"
            )
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=list(runtime.trackers) or None,
            project_dir=out,
            # Accumulation is done here; a value from the environment would scale the loss a second time.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    except ValueError as error:  # an unknown tracker, or a precision that the device does not support
        raise InputError(str(error)) from error
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise InputError(
            f"{launched} processes were started, but accelerate sees {accelerator.num_processes}, so each would train "
            "alone; without GPUs, set ACCELERATE_USE_CPU=true"
        )
    missing = set(runtime.trackers) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing:
        raise InputError(f"trackers: {', '.join(sorted(missing))} is not installed; pip install it, or leave it out")
    for name, off in (("recursion_start", "0"), ("pass_weights", "[]")):
        if (value := getattr(config, name)) and accelerator.num_processes > 1:
            raise InputError(
                f"{name} is {value}, but several processes need gradients of all passes in every step; set it to "
                f"{off}, or start one process"
            )
    model = config.model_config()
    if isinstance(model, TimmConfig):
        for name in ("cuda_graph", "fsdp"):
            if getattr(runtime, name):
                raise InputError(f"{name} is for models of sret; set it to false for a model of timm")
        return accelerator
    if runtime.cuda_graph:
        refuse_cuda_graph(config, model, accelerator)
    if runtime.fsdp and (exits := model.exits) != "none":
        raise InputError(
            f"fsdp does not support model.exits {exits!r}, which run parts of the model; set fsdp to false"
        )
    if runtime.fsdp and model.is_merging:
        raise InputError("fsdp does not support model.stages that merge tokens; set fsdp to false, or leave merge out")
    if runtime.fsdp and accelerator.num_processes == 1:
        raise InputError("fsdp divides the model among processes, and there is only one; start more with torchrun")
    if runtime.fsdp and config.mixed_precision == "fp16":
        raise InputError("fsdp does not support fp16; use bf16")
    return accelerator


def refuse_cuda_graph(config: TrainConfig, model: ModelConfig, accelerator: Accelerator) -> None:
    """Raises `InputError` if the gradients of a run cannot be replayed as a CUDA graph."""
    memory = model.memory
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise InputError("cuda_graph is for one process on an NVIDIA GPU; set it to false")
    if config.mixed_precision == "fp16":
        raise InputError("cuda_graph does not support fp16, which scales the loss; use bf16")
    if config.pass_weights:
        raise InputError(
            "cuda_graph repeats the same kernels, but pass_weights draws other passes in each step; leave one out"
        )
    if model.is_merging:
        raise InputError("cuda_graph was not tested with model.stages that merge tokens; leave one out")
    if memory != "none":  # recomputation reads and sets the states of random numbers on the CPU
        raise InputError(f"cuda_graph does not support model.memory {memory!r}; set one of them to its default")
