"""Creates the objects of a training run before its first step: data, model, optimizer, teacher."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from rich.console import Console
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from sret.checkpoints.adapt import find_source, transfer_file
from sret.data.dataset import ImageData, Samples
from sret.data.device_data import CropLoader, DeviceLoader, fit_on_device
from sret.data.loading import ImageDataset, TrainDataset, check_batch
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches, balanced_uses
from sret.data.sources import load_data
from sret.data.workers import worker_options
from sret.errors import InputError, InputWarning, plural
from sret.kernels.cuda_graph import GraphedGradients
from sret.layers.permutation import StaticPermuter
from sret.layers.recursion import Recursion
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.signals import leave_process_group
from sret.training import distributed, run_dir
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.targets import make_teacher, temperature_of, training_set
from sret.training.distillation.teacher import Teacher
from sret.training.metrics import describe
from sret.training.optim import freeze, make_ema, make_optimizer, make_schedule
from sret.version import versions

MAX_IMBALANCE = 5  # images of the largest class over those of the smallest; more cause a warning
MAX_UNUSED_SHARE = 0.2  # of the images, in an epoch; more cause a warning
TrainLoader = DataLoader[Any] | DeviceLoader | CropLoader


@dataclass(frozen=True, eq=False)
class Setup:
    """The objects of a run. They are not replaced during the run, but steps change the weights of some of them.

    Attributes:
        out: the folder of the run.
        max_steps: stop after this many optimizer steps in all; None for the whole recipe.
        sources: fingerprints of the data and of the teacher's files.
        recipe, versions: as plain values, for saved files.
        net: what the training steps call: the model, or its wrapper for several processes (DDP).
        graph: replays forward and backward; None to compute them kernel by kernel.
        ema: the exponential moving average of the weights.
        frozen: parts of the model that are not trained and stay in evaluation mode.
        temperature: the logits are divided by it before the loss.
        batches: the order in which `train_loader` reads the images.
    """

    config: TrainConfig
    runtime: RuntimeConfig
    out: Path
    max_steps: int | None
    accelerator: Accelerator
    console: Console
    data: ImageData
    preprocessing: Preprocessing
    sources: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, Any]
    batches: EpochBatches
    train_loader: TrainLoader
    val_loader: DataLoader[Any]
    model: SReT
    net: nn.Module
    graph: GraphedGradients | None
    ema: ModelEmaV3 | None
    teacher: Teacher | None
    frozen: list[nn.Module]
    optimizer: AcceleratedOptimizer
    schedule: CosineLRScheduler
    criterion: nn.Module
    temperature: float

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.batches.steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole recipe."""
        return self.config.epochs * self.epoch_steps

    @property
    def recursion_step(self) -> int:
        """The first step, counted from 0, in which all passes of the recursions run."""
        return int(self.config.recursion_start * self.total_steps)

    @property
    def last_step(self) -> int:
        """The step after which this run stops: `total_steps`, or `max_steps` if that is less."""
        return self.total_steps if self.max_steps is None else min(self.total_steps, self.max_steps)

    def start_training(self) -> None:
        """Sets the model to training mode, except its frozen parts, whose BatchNorm statistics stay the same."""
        self.net.train()
        for module in self.frozen:
            module.eval()

    def set_passes(self, step: int) -> None:
        """Sets which passes of the recursions run in the training step `step`, and in the evaluation after it."""
        max_passes = 1 if step < self.recursion_step else None
        models = (self.model, *([self.ema.module] if self.ema else []))
        recursions = [module for model in models for module in model.modules() if isinstance(module, Recursion)]
        if self.graph is not None and recursions[0].max_passes != max_passes:
            self.graph.reset()
            cast(StaticPermuter, self.model.permuter).forget()
        for recursion in recursions:
            recursion.max_passes = max_passes

    def close(self) -> None:
        """Ends the processes that load images; at Python's exit they would be joined one by one, for up to 5 s each."""
        loader = self.train_loader.loader if isinstance(self.train_loader, CropLoader) else self.train_loader
        if isinstance(loader, DataLoader) and loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            loader._iterator = None


def prepare(
    config: TrainConfig,
    out: Path,
    resume: Literal["auto"] | None,
    max_steps: int | None,
    runtime: RuntimeConfig,
    accelerator: Accelerator,
) -> tuple[Setup, dict[str, Any] | None]:
    """Creates the objects of a run. Returns them and the saved state to resume from, or None for a new run.

    Sets torch's random number generator to the recipe's seed before the weights are drawn.

    Raises `InputError` for an occupied folder, the state of another run, or data that does not fit the model.
    """
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    if config.init is not None and not (out / run_dir.STATE).exists():
        find_source(config.init)  # before the data are read, which may take minutes
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = data.preprocessing(model_config.input_size, config.exif_orientation)
    sources = run_dir.sources_of(config, data)
    found = find_common_state(config, out, data, sources, may_resume=resume == "auto")
    train_set = training_set(config, data, preprocessing, runtime.max_corrupt)
    batches = make_batches(train_set.samples.labels, config, runtime, accelerator)
    train_loader, val_loader = make_loaders(train_set, data.split("val"), batches, config, runtime, accelerator)
    model, frozen = make_model(model_config, config, accelerator, console, may_init=found is None)
    ema = make_ema(model, config.ema_decay, runtime.fsdp) if config.ema_decay is not None else None
    teacher = make_teacher(config, data, accelerator.device)
    describe(console, model, data)
    if runtime.fsdp:
        distributed.shard(model, *([ema.module] if ema else []))
    optimizer = accelerator.prepare(make_optimizer(model, config))
    schedule = make_schedule(optimizer.optimizer, config, batches.steps)
    setup = Setup(
        config=config,
        runtime=runtime,
        out=out,
        max_steps=max_steps,
        accelerator=accelerator,
        console=console,
        data=data,
        preprocessing=preprocessing,
        sources=sources,
        recipe=config.to_dict(),
        versions=versions(),
        batches=batches,
        train_loader=train_loader,
        val_loader=val_loader,
        model=model,
        net=make_net(model, runtime, accelerator.device),
        graph=make_graph(model) if runtime.cuda_graph else None,
        ema=ema,
        teacher=teacher,
        frozen=frozen,
        optimizer=optimizer,
        schedule=schedule,
        criterion=SoftTargetCrossEntropy(),
        temperature=temperature_of(config),
    )
    return setup, found


def make_net(model: SReT, runtime: RuntimeConfig, device: torch.device) -> nn.Module:
    """The model as steps call it: compiled if asked for, and replicated on all processes unless it is sharded."""
    if runtime.compile:
        model.compile()
    return model if runtime.fsdp else distributed.replicate(model, device)


def make_graph(model: SReT) -> GraphedGradients:
    """Replays the gradients of a model, whose permutations get memory of their own."""
    model.permuter = StaticPermuter(model.permuter)
    return GraphedGradients([parameter for parameter in model.parameters() if parameter.requires_grad])


def find_common_state(
    config: TrainConfig, out: Path, data: ImageData, sources: dict[str, Any], may_resume: bool
) -> dict[str, Any] | None:
    """The saved state in `out`, or None. Raises `InputError` also if processes find different states."""
    found = run_dir.find_state(out, config, data, sources, may_resume)
    steps_found = gather_object([found["step"] if found else 0])
    if len(set(steps_found)) > 1:
        raise InputError(
            f"processes found different states in {out}, of steps {steps_found}; --out must be on a shared disk"
        )
    return found


def make_batches(
    labels: Sequence[int], config: TrainConfig, runtime: RuntimeConfig, accelerator: Accelerator
) -> EpochBatches:
    """The batches of this process in an epoch.

    Warns if an epoch leaves out many of the images, and if classes are very unequal and not balanced.
    """
    num_images = len(labels)
    batches = EpochBatches(
        num_images,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        runtime.grad_accum_steps,
        balanced_uses(labels, config.class_balance),
    )
    if (left := num_images - batches.steps * config.batch_size) > MAX_UNUSED_SHARE * num_images:
        steps = f"{batches.steps} {plural('step', batches.steps)} of batch_size {config.batch_size}"
        text = f"an epoch is {steps} and leaves out {left} of {num_images} images, others in each epoch; "
        text += "a smaller batch_size leaves out fewer"
        warnings.warn(text, InputWarning, stacklevel=4)  # at the call of `train`
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    if counts.max() > MAX_IMBALANCE * counts.min() and not config.class_balance:
        text = f"classes have {counts.min():,} to {counts.max():,} training images, so the largest ones decide most of "
        text += "the loss; --class_balance 1 (or 0.5, for a part of it) draws images of small classes more often"
        warnings.warn(text, InputWarning, stacklevel=4)
    return batches


def make_loaders(
    train_set: TrainDataset,
    val_samples: Samples,
    batches: EpochBatches,
    config: TrainConfig,
    runtime: RuntimeConfig,
    accelerator: Accelerator,
) -> tuple[TrainLoader, DataLoader[Any]]:
    """Loaders of the training images, in the order of `batches`, and of the validation images."""
    loading: dict[str, Any] = {
        **worker_options(runtime.num_workers),
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
    }
    val_batch_size = max(1, batches.batch_size // accelerator.num_processes)
    check_batch(train_set.preprocessing, val_batch_size // batches.accumulation, len(train_set))
    val_set, augmentation = ImageDataset(val_samples, train_set.preprocessing), config.augmentation
    val_loader = accelerator.prepare(DataLoader(val_set, val_batch_size, **loading))
    samples, preprocessing, device = train_set.samples, train_set.preprocessing, accelerator.device
    if augmentation.on_device and fit_on_device(samples, preprocessing, augmentation):
        return DeviceLoader(samples, preprocessing, augmentation, batches, device), val_loader
    workers = {"persistent_workers": runtime.num_workers > 0, **loading}
    loader = DataLoader(train_set, batch_sampler=batches, **workers)
    return CropLoader(loader, augmentation, batches, device) if augmentation.on_device else loader, val_loader


def make_model(
    model_config: ModelConfig, config: TrainConfig, accelerator: Accelerator, console: Console, may_init: bool
) -> tuple[SReT, list[nn.Module]]:
    """The model on its device, with weights initialised from the seed, and its frozen parts.

    Args:
        may_init: whether to load the weights of the recipe's `init`; a resumed run has its own.
    """
    torch.manual_seed(config.seed)
    model = SReT(model_config)
    if config.init is not None and may_init:
        for line in transfer_file(model, config.init):
            console.print(f"Init    {line}", soft_wrap=True)
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        distributed.synchronize_batch_norm(model)
    return model, freeze(model, config.freeze)


def fitting_model(config: TrainConfig, data: ImageData) -> ModelConfig:
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
