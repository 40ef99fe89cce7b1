"""Training, top to bottom: data, model, optimizer, resume, step, log, save.

Every random number of a run is a function of its seed and of a position: the order of the pictures of (seed, epoch),
the augmentation of a picture of (seed, epoch, picture), dropout and permutations of (seed, step). So a run that is
stopped at any step and resumed ends with the weights of one that was not.
"""

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from sret import report, run
from sret.checkpoint import Card
from sret.config import ModelConfig
from sret.data import EpochBatches, ImageData, ImageDataset, load_data
from sret.errors import InputError
from sret.evaluate import evaluate
from sret.model import SReT
from sret.optim import adamw, cosine_with_warmup
from sret.preprocess import Preprocessing
from sret.recipe import TrainConfig
from sret.weights import load_pretrained, read

PERMUTATIONS_PER_STEP = 1 << 20  # more than a step can draw: steps never share a permutation


def train(
    config: TrainConfig,
    out: Path,
    resume: Literal["auto"] | None = None,
    max_steps: int | None = None,
    num_workers: int = 0,
) -> Path:
    """Trains and leaves in `out` the best and last weights, the resumable state, metrics and two pictures.

    Args:
        out: a folder without a run in it, unless `resume` is "auto", which then continues that run.
        max_steps: stop after this many optimizer steps in all, resumable, whatever `epochs` says.
        num_workers: processes that load pictures; the result does not depend on it.

    Returns the path of the best weights (the last, if it stopped before the first epoch's end).
    Raises `InputError` for what cannot be: an occupied folder, data and model that do not fit, a foreign state.
    """
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps is {max_steps}; it must be at least 1")
    AcceleratorState._reset_state()  # of an earlier run in this process, with another precision perhaps
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    console = Console(quiet=not accelerator.is_main_process, highlight=False)

    # Data and model
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = preprocessing_for(model_config, data)
    state = run.find(out, config, data, may_resume=resume == "auto")
    torch.manual_seed(config.seed)
    model = SReT(model_config)
    if config.init is not None:
        load_pretrained(model, read(config.init, model_config))
    train_set = ImageDataset(data.split("train"), preprocessing, config.augmentation, config.seed)
    val_set = ImageDataset(data.split("val"), preprocessing)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    batches = EpochBatches(len(train_set), config.batch_size, config.seed, rank, num_ranks)
    train_loader = DataLoader(train_set, batch_sampler=batches, num_workers=num_workers)
    val_loader = DataLoader(val_set, config.batch_size // num_ranks, num_workers=num_workers)
    report.describe(console, model, data)

    # Optimizer
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = adamw(model, config.learning_rate, config.weight_decay)
    net, optimizer, val_loader = accelerator.prepare(model, optimizer, val_loader)
    epoch_steps = len(batches)
    total_steps = config.epochs * epoch_steps
    last_step = min(total_steps, total_steps if max_steps is None else max_steps)

    # Resume
    step, train_loss = 0, 0.0
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    versions = run.versions()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step, train_loss, rows, best = state["step"], state["train_loss"], state["rows"], state["best"]
        console.print(f"Resuming {out} at step {step} of {total_steps}", soft_wrap=True)

    def save() -> None:
        weights = accelerator.get_state_dict(net)  # every process takes part
        if not accelerator.is_main_process:
            return
        recipe, fingerprint = config.to_dict(), data.fingerprint()
        metrics = rows[-1] if rows and rows[-1]["step"] == step else {}
        about = {"recipe": recipe, "data": fingerprint, "step": step, "metrics": metrics, "versions": versions}
        card = Card(config=model.config, preprocessing=preprocessing, class_names=data.class_names, training=about)
        progress = {"step": step, "total_steps": total_steps, "train_loss": train_loss, "rows": rows, "best": best}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        tensors = {"model": weights, "optimizer": optimizer.state_dict(), "scaler": scaler}
        run.save(out, {"config": recipe, "data": fingerprint, **progress, **tensors}, card)

    if state is None:
        save()  # claims the folder, and shows that it can be written to before any work is done

    # Steps
    with report.progress(console, total_steps, step) as show:
        while step < last_step:
            epoch, done = divmod(step, epoch_steps)
            batches.start_at(epoch, done)
            train_set.set_epoch(epoch)
            train_loss = train_loss if done else 0.0
            started = time.perf_counter()
            net.train()
            for images, labels in train_loader:
                images, labels = images.to(accelerator.device), labels.to(accelerator.device)
                torch.manual_seed((config.seed << 32) + step * num_ranks + rank)
                model.permuter.load_state_dict({"seed": config.seed, "count": step * PERMUTATIONS_PER_STEP})
                rate = config.learning_rate * cosine_with_warmup(step, total_steps, config.warmup_epochs * epoch_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = criterion(net(images), labels)
                accelerator.backward(loss)
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(net.parameters(), config.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                value = accelerator.reduce(loss.detach(), "mean").item()  # every process sees the same
                if not math.isfinite(value):
                    raise InputError(
                        f"the loss became {value} at step {step} (epoch {epoch + 1}); {out} keeps its last state; "
                        "try a lower learning_rate, a longer warm-up or clip_grad"
                    )
                train_loss += value
                show(step, f"loss {value:.3f}")
                if step == last_step:
                    break
            if step % epoch_steps:  # stopped by max_steps within an epoch
                save()
                break
            metrics = evaluate(net, val_loader, accelerator)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "step": step,
                    "learning_rate": rate,
                    "train_loss": train_loss / epoch_steps,
                    "val_loss": metrics.loss,
                    "val_top1": metrics.top1,
                    "val_top5": metrics.top5,
                    "images_per_second": (epoch_steps - done) * config.batch_size / (time.perf_counter() - started),
                }
            )
            best = max((row for row in (best, rows[-1]) if row), key=lambda row: (row["val_top1"], -row["val_loss"]))
            console.print(report.line(rows[-1], best))
            save()

    # What is left behind
    accelerator.wait_for_everyone()
    if best is not None and accelerator.is_main_process:
        report.draw(out, rows, data, accelerator.device)
    if step < total_steps:
        console.print(f"Stopped at step {step} of {total_steps}; --resume auto goes on", soft_wrap=True)
    if best is None:
        return out / run.LAST
    console.print(
        f"Best validation accuracy {best['val_top1']:.2f} % ({len(val_set)} pictures, epoch {best['epoch']}); "
        f"weights in {out / run.BEST}",
        soft_wrap=True,
    )
    return out / run.BEST


def fitting_model(config: TrainConfig, data: ImageData) -> ModelConfig:
    """The model of a recipe for a data set. Raises `InputError` if its classes or channels are not the data's."""
    if len(data.class_names) < 2:
        raise InputError(
            f"{data.name} has one class, {data.class_names[0]!r}, and nothing to tell it from; "
            "name the folder that holds a sub-folder per class"
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


def preprocessing_for(config: ModelConfig, data: ImageData) -> Preprocessing:
    """How pictures of a data set become inputs of a model."""
    return Preprocessing(img_size=config.input_size, mean=data.mean, std=data.std, crop_pct=data.crop_pct)
