"""Training, top to bottom: data, model, optimizer, resume, step, log, save.

Every random number of a run is a function of its seed and of a position: the order of the pictures of (seed, epoch),
the augmentation of a picture of (seed, epoch, picture), dropout and permutations of (seed, step). So a run that is
stopped at any step and resumed ends with the weights of one that was not.
"""

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

import sret
from sret.checkpoint import Card, load_state, load_weights, save_state, save_weights, write_atomically
from sret.config import ModelConfig
from sret.cost import model_cost
from sret.data import ImageData, ImageDataset, load_data
from sret.errors import InputError, some
from sret.evaluate import evaluate
from sret.model import SReT
from sret.optim import adamw, cosine_with_warmup
from sret.plots import learning_curve, prediction_sheet
from sret.preprocess import Preprocessing
from sret.recipe import TrainConfig, changes
from sret.variants import config_of
from sret.weights import load_pretrained, read

BEST, LAST, STATE, METRICS = "best.safetensors", "last.safetensors", "state.pt", "metrics.jsonl"
CURVE, SHEET = "learning_curve.png", "predictions.png"
EPOCHS_APART = 1_000_003  # the sampler adds the epoch to its seed: seeds must be further apart than epochs
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
    state = _find_run(out, config, resume)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed * EPOCHS_APART),
    )
    console = Console(quiet=not accelerator.is_main_process, highlight=False)

    # Data and model
    data = load_data(config.data)
    torch.manual_seed(config.seed)
    model = build_model(config, data)
    preprocessing = preprocessing_for(model.config, data)
    train_set = ImageDataset(data.split("train"), preprocessing, config.augmentation, config.seed)
    val_set = ImageDataset(data.split("val"), preprocessing)
    if config.batch_size > len(train_set):
        raise InputError(f"batch_size {config.batch_size} is more than the {len(train_set)} training pictures")
    if config.batch_size % accelerator.num_processes:
        raise InputError(f"batch_size {config.batch_size} does not divide by {accelerator.num_processes} processes")
    per_process = config.batch_size // accelerator.num_processes
    train_loader = DataLoader(train_set, per_process, shuffle=True, drop_last=True, num_workers=num_workers)
    val_loader = DataLoader(val_set, per_process, num_workers=num_workers)
    _describe(console, model, data)

    # Optimizer
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = adamw(model, config.learning_rate, config.weight_decay)
    permuter = model.permuter
    net, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    epoch_steps = len(train_loader)
    total_steps = config.epochs * epoch_steps
    warmup_steps = round(config.warmup_epochs * epoch_steps)
    last_step = min(total_steps, total_steps if max_steps is None else max_steps)

    # Resume
    step, train_loss, rows, best = 0, 0.0, [], None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step, train_loss, best = state["step"], state["train_loss"], state["best"]
        rows = [row for row in _read_metrics(out / METRICS) if row["step"] <= step]
        console.print(f"Resuming {out} at step {step} of {total_steps}")

    def save_last() -> None:
        weights = accelerator.get_state_dict(net)  # every process takes part
        if not accelerator.is_main_process:
            return
        card = Card(
            config=model.config,
            preprocessing=preprocessing,
            class_names=data.class_names,
            training=_provenance(config, step, rows),
        )
        save_weights(out / LAST, weights, card)
        if rows and rows[-1] is best and rows[-1]["step"] == step:
            save_weights(out / BEST, weights, card)
        write_atomically(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
        save_state(  # last, so that whatever it speaks of is there
            out / STATE,
            {
                "config": config.to_dict(),
                "step": step,
                "total_steps": total_steps,
                "train_loss": train_loss,
                "best": best,
                "model": weights,
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            },
        )

    # Steps
    out.mkdir(parents=True, exist_ok=True)
    with _progress(console, total_steps, step) as show:
        while step < last_step:
            epoch, done = divmod(step, epoch_steps)
            train_loader.set_epoch(epoch)
            train_set.set_epoch(epoch)
            train_loss = train_loss if done else 0.0
            started = time.perf_counter()
            net.train()
            for images, labels in accelerator.skip_first_batches(train_loader, done):
                torch.manual_seed((config.seed << 32) + step * accelerator.num_processes + accelerator.process_index)
                permuter.load_state_dict({"seed": config.seed, "count": step * PERMUTATIONS_PER_STEP})
                scale = cosine_with_warmup(step, total_steps, warmup_steps)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * scale
                loss = criterion(net(images), labels)
                accelerator.backward(loss)
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(net.parameters(), config.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                value = loss.item()
                if not torch.isfinite(loss):
                    raise InputError(
                        f"the loss became {value} at step {step} (epoch {epoch + 1}); {out} keeps the last good state; "
                        "try a lower learning_rate, a longer warm-up or clip_grad"
                    )
                train_loss += value
                show(step, f"loss {value:.3f}")
                if step == last_step:
                    break
            if step % epoch_steps:  # stopped by max_steps within an epoch
                break
            seconds = time.perf_counter() - started
            metrics = evaluate(net, val_loader, accelerator)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "step": step,
                    "learning_rate": config.learning_rate * scale,
                    "train_loss": train_loss / epoch_steps,
                    "val_loss": metrics.loss,
                    "val_top1": metrics.top1,
                    "val_top5": metrics.top5,
                    "images_per_second": (epoch_steps - done) * config.batch_size / seconds,
                }
            )
            if best is None or _rank(rows[-1]) > _rank(best):
                best = rows[-1]
            show(step, _line(rows[-1], best), is_epoch=True)
            save_last()
        if step % epoch_steps:
            save_last()

    # What is left behind
    accelerator.wait_for_everyone()
    if best is None:
        console.print(f"Stopped at step {step} of {total_steps}; --resume auto goes on")
        return out / LAST
    if accelerator.is_main_process:
        _draw(out, rows, data, accelerator.device)
    if step < total_steps:
        console.print(f"Stopped at step {step} of {total_steps}; --resume auto goes on")
    console.print(
        f"Best validation accuracy {best['val_top1']:.2f} % ({len(val_set)} pictures, epoch {best['epoch']}); "
        f"weights in {out / BEST}"
    )
    return out / BEST


def build_model(config: TrainConfig, data: ImageData) -> SReT:
    """The model of a recipe for a data set. Raises `InputError` if its classes or channels are not the data's."""
    if isinstance(config.model, str):
        wanted = replace(config_of(config.model), num_classes=len(data.class_names), in_chans=data.in_chans)
    else:
        wanted = config.model
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
    model = SReT(wanted)
    if config.init is not None:
        load_pretrained(model, read(config.init, wanted))
    return model


def preprocessing_for(config: ModelConfig, data: ImageData) -> Preprocessing:
    """How pictures of a data set become inputs of a model."""
    return Preprocessing(img_size=config.input_size, mean=data.mean, std=data.std, crop_pct=data.crop_pct)


def _find_run(out: Path, config: TrainConfig, resume: str | None) -> dict[str, Any] | None:
    """The state to resume, or None to start; refuses a folder whose contents would be overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out names a folder")
    state_path = out / STATE
    if not state_path.exists():
        present = [name for name in (BEST, LAST, METRICS) if (out / name).exists()]
        if present:
            raise InputError(f"{out} holds {', '.join(present)} of another run, without its state; name another --out")
        return None
    state = load_state(state_path)
    if "step" not in state or "config" not in state:
        raise InputError(f"{state_path} is not the state of a run of sret train; name another --out")
    if resume != "auto":
        raise InputError(
            f"{out} holds another run (step {state['step']} of {state['total_steps']}); "
            "add --resume auto to continue it, or name another --out"
        )
    if changed := changes(state["config"], config.to_dict()):
        raise InputError(f"{out} was begun with another recipe: {some(changed)}; name another --out")
    return state


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["val_top1"], -row["val_loss"]


def _provenance(config: TrainConfig, step: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "recipe": config.to_dict(),
        "step": step,
        "metrics": rows[-1] if rows and rows[-1]["step"] == step else {},
        "versions": {"sret": sret.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip(),
    }


def _describe(console: Console, model: SReT, data: ImageData) -> None:
    cost = model_cost(model.config)
    passes = " + ".join(f"{stage.num_blocks} x {stage.num_passes}" for stage in model.config.stages)
    sizes = ", ".join(f"{len(samples):,} {name}" for name, samples in data.splits.items())
    height, width = model.config.input_size
    console.print(f"Data    {data.name}: {len(data.class_names)} classes; pictures: {sizes}")
    console.print(
        f"Model   {cost.parameters:,} parameters; {model.config.depth} layers (blocks x passes: {passes}); "
        f"{cost.flops / 1e6:,.1f} MFLOPs ({cost.macs / 1e6:,.1f} M multiply-adds) for a {height}x{width} picture"
    )


def _line(row: dict[str, Any], best: dict[str, Any]) -> str:
    return (
        f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation {row['val_top1']:6.2f} % "
        f"(best {best['val_top1']:.2f})  {row['images_per_second']:,.0f} images/s"
    )


@contextmanager
def _progress(console: Console, total: int, done: int) -> Iterator[Any]:
    """Yields `show(step, text, is_epoch)`: a line per epoch, and on a terminal a live bar below them."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(step: int, text: str, is_epoch: bool = False) -> None:
            bar.update(task, completed=step, description="" if is_epoch else text)
            if is_epoch:
                console.print(text)

        yield show


@torch.no_grad()
def _draw(out: Path, rows: list[dict[str, Any]], data: ImageData, device: torch.device) -> None:
    """The learning curve, and what the best weights make of the validation pictures."""
    learning_curve(out / CURVE, rows, f"{data.name}, {rows[-1]['epoch']} epochs")
    model, card = load_weights(out / BEST)
    model = model.to(device)
    samples = data.split("val")
    dataset = ImageDataset(samples, card.preprocessing)
    outputs = [model(images.to(device)).softmax(dim=1).cpu() for images, _ in DataLoader(dataset, batch_size=64)]
    confidence, predicted = torch.cat(outputs).max(dim=1)
    is_right = predicted == torch.tensor(samples.labels)
    shown = (is_right + confidence).argsort()[:32].tolist()  # mistakes first, then the least certain
    images = card.preprocessing.pixels(torch.stack([dataset[i][0] for i in shown]))
    prediction_sheet(
        out / SHEET,
        images.permute(0, 2, 3, 1).numpy(),
        [card.name_of(samples.labels[i]) for i in shown],
        [(card.name_of(int(predicted[i])), float(confidence[i])) for i in shown],
        f"{data.name}: {len(samples)} validation pictures, {int((~is_right).sum())} wrong; least certain first",
    )
