"""What a training run works with: objects made once before the first step, and values that change with the steps."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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

from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.card import Card
from sret.data.dataset import ImageData, ImageDataset, TrainDataset, Unreadable
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches
from sret.data.sources import load_data
from sret.errors import InputError, InputWarning, first_few
from sret.inference.evaluate import Predictions
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.training import distributed as parallel
from sret.training import progress as report
from sret.training import run_dir as run
from sret.training.config import Launch, TrainConfig
from sret.training.distillation.teacher import Teacher
from sret.training.metrics import Look
from sret.training.optim import freeze, make_ema, make_optimizer, make_schedule
from sret.training.setup import fitting_model, make_teacher, preprocessing_for, temperature_of, training_set
from sret.training.signals import leave_process_group
from sret.version import versions

MOST_LEFT_OUT = 0.2  # of the images, by the last batch of an epoch, before a warning


@dataclass(frozen=True, eq=False)
class Setup:
    """The objects of a run. None is replaced during the run; the steps change the weights that some of them hold.

    Attributes:
        out: the folder of the run.
        max_steps: stop after this many optimizer steps in all; None for the whole recipe.
        sources: the data and the teacher's files, told apart by content.
        recipe, versions: as plain values, for the files that are saved.
        net: computes the training steps: the model, or its copy that shares gradients among the processes (DDP).
        ema: the moving average of the weights.
        frozen: parts of the model that are not trained and stay in evaluation mode.
        temperature: what the logits are divided by before the loss.
        batches: the order in which `train_loader` reads the images.
    """

    config: TrainConfig
    launch: Launch
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
    train_loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    model: SReT
    net: nn.Module
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
    def last_step(self) -> int:
        """The step after which this run stops: `total_steps`, or `max_steps` if that is less."""
        return self.total_steps if self.max_steps is None else min(self.total_steps, self.max_steps)


def prepare(
    config: TrainConfig, out: Path, resume: Literal["auto"] | None, max_steps: int | None, launch: Launch
) -> tuple[Setup, dict[str, Any] | None]:
    """The objects of a run, and the saved state in `out` that it goes on from; None if it begins.

    Sets torch's random number generator to the recipe's seed before the weights are drawn.

    Raises `InputError` for an occupied folder, a state of another run, and data and model that do not fit.
    """
    accelerator = parallel.make_accelerator(config, launch, out)
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = preprocessing_for(model_config, data)
    sources = run.sources_of(config, data)
    found = find_state(config, out, data, sources, may_resume=resume == "auto")
    train_set = training_set(config, data, preprocessing, launch.max_corrupt)
    val_set = ImageDataset(data.split("val"), preprocessing)
    batches = make_batches(len(train_set), config, launch, accelerator)
    train_loader, val_loader = make_loaders(train_set, val_set, batches, launch, accelerator)
    model, frozen = make_model(model_config, config, accelerator, console, may_init=found is None)
    ema = make_ema(model, config.ema_decay, launch.fsdp) if config.ema_decay is not None else None
    teacher = make_teacher(config, data, accelerator.device)
    report.describe(console, model, data)
    if launch.fsdp:
        for part in [model, ema.module] if ema else [model]:
            parallel.shard(part)
    optimizer = accelerator.prepare(make_optimizer(model, config))
    schedule = make_schedule(optimizer.optimizer, config, batches.steps)
    if launch.compile:
        model.compile()
    net: nn.Module = model if launch.fsdp else parallel.replicate(model, accelerator.device)
    setup = Setup(
        config=config,
        launch=launch,
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
        net=net,
        ema=ema,
        teacher=teacher,
        frozen=frozen,
        optimizer=optimizer,
        schedule=schedule,
        criterion=SoftTargetCrossEntropy(),
        temperature=temperature_of(config),
    )
    return setup, found


def find_state(
    config: TrainConfig, out: Path, data: ImageData, sources: dict[str, Any], may_resume: bool
) -> dict[str, Any] | None:
    """The saved state in `out`, or None. Raises `InputError` also if the processes do not find the same state."""
    found = run.find(out, config, data, sources, may_resume)
    steps_found = gather_object([found["step"] if found else 0])
    if len(set(steps_found)) > 1:
        raise InputError(
            f"processes found other states in {out}, of steps {steps_found}; --out must be on a shared disk"
        )
    return found


def make_batches(num_images: int, config: TrainConfig, launch: Launch, accelerator: Accelerator) -> EpochBatches:
    """This process's part of the batches of an epoch. Warns if an epoch leaves out many of the images."""
    batches = EpochBatches(
        num_images,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        launch.grad_accum_steps,
        config.augmentation.repeats,
    )
    if (left := num_images - batches.steps * config.batch_size) > MOST_LEFT_OUT * num_images:
        text = f"an epoch is {batches.steps} step(s) of batch_size {config.batch_size} and leaves out {left} images, "
        text += f"others each time, of {num_images}; a smaller batch_size leaves out fewer"
        warnings.warn(text, InputWarning, stacklevel=4)  # at the call of `train`
    return batches


def make_loaders(
    train_set: TrainDataset, val_set: ImageDataset, batches: EpochBatches, launch: Launch, accelerator: Accelerator
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of the training images, in the order of `batches`, and of the validation images."""
    loading: dict[str, Any] = {
        "num_workers": launch.num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
    }
    train_loader = DataLoader(train_set, batch_sampler=batches, persistent_workers=launch.num_workers > 0, **loading)
    val_batch_size = max(1, batches.batch_size // accelerator.num_processes)
    return train_loader, accelerator.prepare(DataLoader(val_set, val_batch_size, **loading))


def make_model(
    model_config: ModelConfig, config: TrainConfig, accelerator: Accelerator, console: Console, may_init: bool
) -> tuple[SReT, list[nn.Module]]:
    """The model on its device, with weights drawn from the seed, and those of its parts that are not trained.

    Args:
        may_init: take the weights of the recipe's `init`, if it names a file; a resumed run has its own.
    """
    torch.manual_seed(config.seed)
    model = SReT(model_config)
    if config.init is not None and may_init:
        for line in transfer_file(model, config.init):
            console.print(f"Init    {line}", soft_wrap=True)
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        parallel.synchronize_batch_norm(model)
    return model, freeze(model, config.freeze)


@dataclass
class TrainingState:
    """What changes with the steps, beside the weights and the optimizer, and is saved with them.

    Attributes:
        unreadable: the images that could not be read so far.
        step: optimizer steps done.
        sums: of loss, share of right predictions and seconds, over the steps of the epoch.
        rows: the metrics of each evaluated epoch.
        best: the row of the best epoch; None before the first evaluation.
        best_predictions: those of the best epoch on the validation images, for the report.
    """

    unreadable: Unreadable
    step: int = 0
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0})
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_predictions: Predictions | None = None

    def add(self, look: Look) -> None:
        """Adds the steps since the last look to the sums of the epoch."""
        self.sums["loss"] = sum(look.losses, self.sums["loss"])
        self.sums["accuracy"] = sum(look.accuracies, self.sums["accuracy"])
        self.sums["seconds"] += look.seconds

    def restore(self, setup: Setup, found: dict[str, Any]) -> None:
        """Takes the values of a saved state, and loads its tensors into model, optimizer, average and loss scaler."""
        parallel.load_model_state(setup.model, found["model"])
        parallel.load_optimizer_state(setup.model, setup.optimizer.optimizer, found["optimizer"])
        if setup.ema is not None:
            parallel.load_model_state(setup.ema.module, found["ema"])
        if setup.accelerator.scaler is not None:
            setup.accelerator.scaler.load_state_dict(found["scaler"])
        self.step, self.sums, self.rows, self.best = found["step"], found["sums"], found["rows"], found["best"]
        if found["best_predictions"] is not None:
            self.best_predictions = Predictions(**found["best_predictions"])
        self.unreadable.seen |= set(found["unreadable"])
        setup.console.print(f"Resuming {setup.out} at step {self.step} of {setup.total_steps}", soft_wrap=True)

    def save(self, setup: Setup, out: Path) -> None:
        """Writes the state and the weights to `out`; every process calls this after the same step.

        Raises `InputError` in every process if weights are not finite or the files cannot be written; the files of the
        last save are then still whole.
        """
        model, ema, scaler = setup.model, setup.ema, setup.accelerator.scaler
        spoilt = parallel.non_finite(model)
        parallel.raise_together(
            f"weights became not finite by step {self.step}: {first_few(spoilt)}; {out} keeps its last state; try a "
            "lower learning_rate, a longer warm-up or clip_grad"
            if spoilt
            else None
        )
        tensors = {  # every process takes part in gathering them
            "model": parallel.model_state(model),
            "ema": parallel.model_state(ema.module) if ema is not None else None,
            "optimizer": parallel.optimizer_state(model, setup.optimizer.optimizer),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        error = None
        if setup.accelerator.is_main_process:
            try:
                run.save(out, {**self._values(setup), **tensors}, self._card(setup))
            except InputError as caught:
                error = str(caught)
        parallel.raise_together(error)

    def _values(self, setup: Setup) -> dict[str, Any]:
        """The saved state without its tensors."""
        return {
            "config": setup.recipe,
            "sources": setup.sources,
            "step": self.step,
            "total_steps": setup.total_steps,
            "sums": self.sums,
            "rows": self.rows,
            "best": self.best,
            "best_predictions": vars(self.best_predictions) if self.best_predictions else None,
            "unreadable": sorted(self.unreadable.seen),
        }

    def _card(self, setup: Setup) -> Card:
        """What the weights' files say about them."""
        about = {
            "recipe": setup.recipe,
            "data": setup.sources["data"],
            "step": self.step,
            "metrics": self.rows[-1] if self.rows and self.rows[-1]["step"] == self.step else {},
            "versions": setup.versions,
        }
        return Card(
            config=setup.model.config,
            preprocessing=setup.preprocessing,
            class_names=setup.data.class_names,
            training=about,
        )
