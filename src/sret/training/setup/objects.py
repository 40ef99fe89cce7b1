"""The objects of a training run, and the passes of the recursions that run in a step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sret.data.dataset import ImageData
from sret.data.on_device.loaders import CropLoader
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches
from sret.kernels.cuda_graph import GraphedGradients
from sret.layers.permutation import StaticPermuter
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.timm.config import TimmConfig
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.teacher import Teacher, soft_predictions
from sret.training.setup.loaders import TrainLoader


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
    model: nn.Module
    model_config: ModelConfig | TimmConfig
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

    def passes_of(self, step: int) -> int | None:
        """How many passes of every recursion run in the training step `step`, counted from 0; None for all."""
        if step < self.recursion_step:
            return 1
        if not self.config.pass_weights:
            return None
        weights = np.asarray(self.config.pass_weights, dtype=float)
        drawn = int(np.random.default_rng([self.config.seed, step]).choice(len(weights), p=weights / weights.sum())) + 1
        return None if drawn == len(weights) else drawn

    def has_run_all_passes(self, step: int) -> bool:
        """Whether a step before `step` ran all passes; until then the optimizer has no state for the later ones."""
        return any(self.passes_of(i) is None for i in range(self.recursion_step, step))

    def set_passes(self, passes: int | None) -> None:
        """Sets how many passes of the recursions of the model and of its moving average run; None for all."""
        if not isinstance(self.model, SReT):
            return  # `TrainConfig` refuses other passes
        wanted = self.model.config.passes_by_stage(passes)
        if self.model.passes == wanted:
            return
        if self.graph is not None:
            self.graph.reset()
            cast(StaticPermuter, self.model.permuter).forget()
        for model in (self.model, *([cast(SReT, self.ema.module)] if self.ema else [])):
            model.set_passes(passes)

    @torch.no_grad()
    def predictions_of_all_passes(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> (B, K): probabilities by the model with all its passes, as in evaluation.

        The logits are divided by the temperature, as those that learn from them.
        """
        model = cast(SReT, self.model)
        passes = model.passes
        model.eval()
        model.set_passes(None)
        try:
            with self.accelerator.autocast():
                return soft_predictions(model, images, self.temperature)
        finally:
            model.set_passes(passes)
            self.start_training()

    def close(self) -> None:
        """Ends the processes that load images; at Python's exit they would be joined one by one, for up to 5 s each."""
        loader = self.train_loader.loader if isinstance(self.train_loader, CropLoader) else self.train_loader
        if isinstance(loader, DataLoader) and loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            loader._iterator = None
