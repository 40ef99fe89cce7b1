"""Training, top to bottom: data, model, optimizer, resume, steps, evaluate, save.

Every random number of a run is a function of its seed and of a position: the order of the pictures of (seed, epoch),
the augmentation of a picture of (seed, epoch, picture), mixing and permutations of (seed, step), dropout of (seed,
step, part of the step). So a run that is stopped at any step and resumed ends with the weights of one that was not.
"""

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sret import parallel, report, run
from sret.augment import mix
from sret.checkpoint import Card
from sret.config import ModelConfig
from sret.data import ImageData, ImageDataset, TrainDataset, Unreadable
from sret.distill import Teacher, load_teacher, soft_targets
from sret.errors import InputError
from sret.evaluate import evaluate
from sret.model import SReT
from sret.monitor import Monitor
from sret.optim import freeze, make_ema, make_optimizer, make_schedule
from sret.preprocess import Preprocessing
from sret.recipe import Launch, TrainConfig
from sret.sampling import EpochBatches
from sret.soft_labels import ReplayDataset, read_manifest
from sret.sources import load_data
from sret.stopping import StopRequest, leave_process_group
from sret.weights import load_pretrained, read

PERMUTATIONS_PER_STEP = 1 << 20  # more than a step can draw: steps never share a permutation


def train(
    config: TrainConfig,
    out: Path,
    resume: Literal["auto"] | None = None,
    max_steps: int | None = None,
    launch: Launch | None = None,
) -> Path:
    """Trains and leaves in `out` the best and last weights, the resumable state, metrics and a report.

    Args:
        out: a folder without a run in it, unless `resume` is "auto", which then continues that run.
        max_steps: stop after this many optimizer steps in all, resumable, whatever `epochs` says.
        launch: how this machine computes the steps.

    Returns the path of the best weights (the last, if it stopped before the first epoch's end).
    Raises `InputError` for what cannot be: an occupied folder, data and model that do not fit, a foreign state.
    Raises `KeyboardInterrupt` or `SystemExit` after Ctrl-C or SIGTERM, when the step is done and all is saved.
    """
    launch = launch or Launch()
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps is {max_steps}; it must be at least 1")
    accelerator = make_accelerator(config, launch, out)
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes

    # Data
    with accelerator.main_process_first():  # which may have to fetch or index it
        data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = preprocessing_for(model_config, data)
    state = run.find(out, config, data, may_resume=resume == "auto")
    train_set = training_set(config, data, preprocessing)
    val_set = ImageDataset(data.split("val"), preprocessing)
    batches = EpochBatches(
        len(train_set),
        config.batch_size,
        config.seed,
        rank,
        num_ranks,
        launch.accumulation,
        config.augmentation.repeats,
    )
    loading: dict[str, Any] = {
        "num_workers": launch.num_workers,
        "persistent_workers": launch.num_workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
    }
    train_loader = DataLoader(train_set, batch_sampler=batches, **loading)
    val_loader = accelerator.prepare(DataLoader(val_set, max(1, config.batch_size // num_ranks), **loading))

    # Model
    torch.manual_seed(config.seed)
    model = SReT(model_config)
    if config.init is not None:
        load_pretrained(model, read(config.init, model_config))
    model.set_grad_checkpointing(launch.grad_checkpointing)
    model.to(accelerator.device)
    if num_ranks > 1:
        parallel.synchronize_batch_norm(model)
    frozen = freeze(model, config.freeze)
    ema = make_ema(model, config.ema_decay, launch.shard) if config.ema_decay is not None else None
    teacher = make_teacher(config, data, preprocessing, accelerator.device)
    report.describe(console, model, data)

    # Optimizer
    if launch.shard:
        for part in [model, ema.module] if ema else [model]:
            parallel.shard(part)
    optimizer = accelerator.prepare(make_optimizer(model, config))
    schedule = make_schedule(optimizer.optimizer, config, batches.steps)
    net: nn.Module = model if launch.shard else accelerator.prepare(model)
    criterion = SoftTargetCrossEntropy()
    temperature = temperature_of(config)
    total_steps = config.epochs * batches.steps
    last_step = min(total_steps, total_steps if max_steps is None else max_steps)

    # Resume
    step = 0
    sums = {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0}  # over the steps of the epoch
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    unreadable = Unreadable(config.max_corrupt)
    if state is not None:
        parallel.load_model_state(model, state["model"])
        parallel.load_optimizer_state(model, optimizer.optimizer, state["optimizer"])
        if ema is not None:
            parallel.load_model_state(ema.module, state["ema"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step, sums, rows, best = state["step"], state["sums"], state["rows"], state["best"]
        unreadable.seen |= set(state["unreadable"])
        console.print(f"Resuming {out} at step {step} of {total_steps}", soft_wrap=True)
    recipe, fingerprint, versions = config.to_dict(), data.fingerprint(), run.versions()

    def save() -> None:
        tensors = {  # every process takes part in gathering them
            "model": parallel.model_state(model),
            "ema": parallel.model_state(ema.module) if ema is not None else None,
            "optimizer": parallel.optimizer_state(model, optimizer.optimizer),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        if accelerator.is_main_process:
            metrics = rows[-1] if rows and rows[-1]["step"] == step else {}
            about = {"recipe": recipe, "data": fingerprint, "step": step, "metrics": metrics, "versions": versions}
            card = Card(config=model_config, preprocessing=preprocessing, class_names=data.class_names, training=about)
            progress = {"step": step, "total_steps": total_steps, "sums": sums, "rows": rows, "best": best}
            seen = sorted(unreadable.seen)
            run.save(out, {"config": recipe, "data": fingerprint, **progress, "unreadable": seen, **tensors}, card)
        accelerator.wait_for_everyone()

    if state is None:
        save()  # claims the folder, and shows that it can be written to before any work is done
    if launch.trackers:
        accelerator.init_trackers("log", {key: str(value) for key, value in config.to_dict().items()})

    # Steps
    def compute(part: int) -> tuple[Tensor, Tensor, Sequence[str]]:
        """Adds one part of this step's gradient; returns its loss, share of right answers, unreadable pictures."""
        images, labels, errors = next(loaded)
        images = images.to(accelerator.device, non_blocking=True)
        labels = labels.to(accelerator.device, non_blocking=True)
        targets = soft_targets(labels, len(data.class_names), config.label_smoothing)
        if config.mixes:
            images, targets = mix(images, targets, config.mixup, config.cutmix, key=(config.seed, step))
        torch.manual_seed((config.seed << 32) + (step * launch.accumulation + part) * num_ranks + rank)
        model.permuter.load_state_dict({"seed": config.seed, "count": step * PERMUTATIONS_PER_STEP})
        is_last = part == launch.accumulation - 1
        with nullcontext() if is_last else accelerator.no_sync(net):
            with accelerator.autocast():
                targets = targets if teacher is None else teacher(images)
                logits = net(images).float()
            loss = criterion(logits / temperature, targets)
            accelerator.backward(loss / launch.accumulation)
        return loss.detach(), (logits.argmax(1) == targets.argmax(1)).float().mean(), errors

    with StopRequest() as stop, report.Progress(console, accelerator, total_steps, step) as progress:
        monitor = Monitor(accelerator, unreadable, stop)
        should_stop = False
        while not should_stop and (step < last_step or len(rows) < step // batches.steps):
            if (
                best is not None
                and config.patience is not None
                and rows[-1]["epoch"] - best["epoch"] >= config.patience
            ):
                console.print(f"Stopped early: no better epoch in {config.patience}", soft_wrap=True)
                break
            epoch, done = divmod(step, batches.steps)
            if len(rows) == epoch:  # else its steps are done, and a stop came before its evaluation
                if not done:
                    sums = dict.fromkeys(sums, 0.0)
                batches.start_at(epoch, done)
                loaded = iter(train_loader)
                end = min((epoch + 1) * batches.steps, last_step)
                net.train()
                for module in frozen:
                    module.eval()
                monitor.restart()
                while step < end and not should_stop:
                    schedule.step_update(step)
                    losses, accuracies, errors = zip(*map(compute, range(launch.accumulation)), strict=True)
                    if config.clip_grad is not None:
                        accelerator.clip_grad_norm_(net.parameters(), config.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    if ema is not None:
                        ema.update(model, step)
                    monitor.add(torch.stack(losses).mean(), torch.stack(accuracies).mean(), chain(*errors))
                    must_save = launch.save_every is not None and step % launch.save_every == 0
                    if monitor.is_due or must_save or step == end:
                        look = monitor.look()
                        check_finite(look.losses, step, batches.steps, out)
                        sums["loss"] = sum(look.losses, sums["loss"])
                        sums["accuracy"] = sum(look.accuracies, sums["accuracy"])
                        sums["seconds"] += look.seconds
                        should_stop = look.should_stop
                        progress.show(step, look, config.batch_size, optimizer.param_groups[-1]["lr"])
                    if must_save and step < end and not should_stop:
                        save()
                if should_stop or step % batches.steps:
                    save()
                    break
            metrics = {"val": evaluate(net, val_loader, accelerator, unreadable)}
            if ema is not None:
                metrics["ema"] = evaluate(ema.module, val_loader, accelerator, unreadable)
            rate = optimizer.param_groups[-1]["lr"]
            rows.append(report.row(step, batches.steps, config.batch_size, rate, sums, metrics))
            best = max((row for row in (best, rows[-1]) if row), key=report.merit)
            progress.epoch(rows[-1], best)
            save()
            should_stop = num_ranks == 1 and stop.is_made

    # What is left behind
    if launch.trackers:
        accelerator.end_training()
    if should_stop:
        console.print(f"Stopped and saved at step {step} of {total_steps}; --resume auto goes on", soft_wrap=True)
        stop.obey()
    if best is None:
        console.print(f"Stopped at step {step} of {total_steps}; --resume auto goes on", soft_wrap=True)
        return out / run.LAST
    if accelerator.is_main_process:  # nobody waits for it
        report.draw(out, rows, data, accelerator.device, launch.num_workers)
    console.print(
        f"Best validation accuracy {report.merit(best)[0]:.2f} % ({len(val_set)} pictures, epoch {best['epoch']}); "
        f"weights in {out / run.BEST}",
        soft_wrap=True,
    )
    return out / run.BEST


def make_accelerator(config: TrainConfig, launch: Launch, out: Path) -> Accelerator:
    """The processes, devices and precision of a run. Raises `InputError` for an engine that would not be used."""
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate was asked for {engine}, which this command does not use; launch several plain processes "
                "(accelerate launch --multi_gpu, or torchrun), and say --shard true to divide the model among them"
            )
    AcceleratorState._reset_state()  # of an earlier run in this process, with another precision perhaps
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=list(launch.trackers) or None, project_dir=out
        )
    except ValueError as error:  # an unknown tracker, a precision that the device has not
        raise InputError(str(error)) from error
    if launch.shard and accelerator.num_processes == 1:
        raise InputError("shard divides the model among processes, and there is one; start more, with torchrun")
    if launch.shard and config.mixed_precision == "fp16":
        raise InputError("shard does not go with fp16; use bf16")
    return accelerator


def training_set(config: TrainConfig, data: ImageData, preprocessing: Preprocessing) -> TrainDataset:
    """The training pictures, with the labels of the data or with those of a teacher."""
    if config.soft_labels is not None:
        return ReplayDataset(config.soft_labels, data, preprocessing, config.max_corrupt)
    return TrainDataset(data.split("train"), preprocessing, config.augmentation, config.seed, config.max_corrupt)


def make_teacher(
    config: TrainConfig, data: ImageData, preprocessing: Preprocessing, device: torch.device
) -> Teacher | None:
    """The recipe's teacher for pictures so prepared, on a device; None if it has none."""
    if config.distillation is None:
        return None
    wanted = config.distillation
    model, own = load_teacher(wanted.teacher, wanted.teacher_weights, data.class_names)
    return Teacher(model, own, preprocessing, wanted.temperature).to(device)


def check_finite(losses: Sequence[float], step: int, epoch_steps: int, out: Path) -> None:
    """Raises `InputError` naming the first of the steps up to `step` whose loss is not finite."""
    for before, loss in enumerate(losses):
        if not math.isfinite(loss):
            at = step - len(losses) + before + 1
            raise InputError(
                f"the loss became {loss} at step {at} (epoch {(at - 1) // epoch_steps + 1}); {out} keeps its last "
                "state; try a lower learning_rate, a longer warm-up or clip_grad"
            )


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


def temperature_of(config: TrainConfig) -> float:
    """What the student's logits are divided by: 1 without a teacher."""
    if config.soft_labels is not None:
        return float(read_manifest(config.soft_labels).distillation["temperature"])
    return config.distillation.temperature if config.distillation else 1.0
