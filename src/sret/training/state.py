"""The state of a training run that changes with the steps: saved, and restored to resume exactly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sret.checkpoints.card import Card
from sret.data.loading import Unreadable
from sret.errors import InputError, error_prefix, first_few
from sret.inference.evaluate import Predictions
from sret.training import distributed, run_dir
from sret.training.metrics import DIVERGENCE_ADVICE, StepMetrics
from sret.training.setup import Setup
from sret.training.state_check import check_values


@dataclass
class TrainingState:
    """The values that change with the steps and are saved with weights and optimizer.

    Attributes:
        unreadable: the images that could not be read so far.
        step: optimizer steps done.
        sums: of loss, share of correct predictions and seconds, over the steps of the epoch.
        rows: the metrics of each evaluated epoch.
        best: the row of the epoch with the best weights (`is_best`); None before the first evaluation.
        best_predictions: of the best epoch, on the validation images, for the report.
        digest: of the saved state in the folder.
    """

    unreadable: Unreadable
    step: int = 0
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0})
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_predictions: Predictions | None = None
    digest: str = ""

    def add(self, metrics: StepMetrics) -> None:
        """Adds the metrics of the latest steps to the sums of the epoch."""
        self.sums["loss"] = sum(metrics.losses, self.sums["loss"])
        self.sums["accuracy"] = sum(metrics.accuracies, self.sums["accuracy"])
        self.sums["seconds"] += metrics.seconds

    def restore(self, setup: Setup, found: dict[str, Any]) -> None:
        """Restores a saved state: its values here, its tensors in the model, EMA, optimizer and loss scaler.

        Raises `InputError` for a state that this run could not have saved.
        """
        with error_prefix(f"{setup.out / run_dir.STATE} is damaged"):
            check_values(setup, found)
        distributed.load_model_state(setup.model, found["model"])
        distributed.load_optimizer_state(setup.model, setup.optimizer.optimizer, found["optimizer"])
        if setup.ema is not None:
            distributed.load_model_state(setup.ema.module, found["ema"])
        if setup.accelerator.scaler is not None:
            setup.accelerator.scaler.load_state_dict(found["scaler"])
        self.step, self.sums, self.rows, self.best = found["step"], found["sums"], found["rows"], found["best"]
        if found["best_predictions"] is not None:
            self.best_predictions = Predictions(**found["best_predictions"])
        self.unreadable.seen |= set(found["unreadable"])
        setup.console.print(f"Resuming {setup.out} at step {self.step} of {setup.total_steps}", soft_wrap=True)

    def save(self, setup: Setup, out: Path) -> None:
        """Writes the state and the weights to `out`; every process must call this after the same step.

        Raises `InputError` in every process if weights are not finite or the files cannot be written; the files of the
        last save then stay complete.
        """
        model, ema, scaler = setup.model, setup.ema, setup.accelerator.scaler
        non_finite = distributed.non_finite(model)
        distributed.raise_together(
            f"weights are not finite after step {self.step}: {first_few(non_finite)}; {out} keeps its last state; "
            f"{DIVERGENCE_ADVICE}"
            if non_finite
            else None
        )
        tensors = {  # gathered from all processes
            "model": distributed.model_state(model),
            "ema": distributed.model_state(ema.module) if ema is not None else None,
            "optimizer": distributed.optimizer_state(model, setup.optimizer.optimizer),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        error = None
        if setup.accelerator.is_main_process:
            try:
                self.digest = run_dir.save_run(out, {**self._values(setup), **tensors}, self._card(setup), self.digest)
            except InputError as caught:
                error = str(caught)
        distributed.raise_together(error)

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
        """The metadata of the weights files."""
        evaluated = self.best_predictions
        about = {
            "recipe": setup.recipe,
            "data": setup.sources["data"],
            "val_images": len(setup.data.split("val")) if evaluated is None else evaluated.count,
            "step": self.step,
            "metrics": self.rows[-1] if self.rows and self.rows[-1]["step"] == self.step else {},
            "versions": setup.versions,
        }
        return Card(
            config=setup.model_config,
            preprocessing=setup.preprocessing,
            class_names=setup.data.class_names,
            training=about,
        )
