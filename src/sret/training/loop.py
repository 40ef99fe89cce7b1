"""Training, top to bottom: data, model, optimizer, resume, steps, evaluate, save.

Every random number of a run is a function of its seed and of a position: the order of the images of (seed, epoch),
the augmentation of an image of (seed, epoch, image), mixing and permutations of (seed, step), dropout of (seed,
step, part of the step). So a run that is stopped at any step and resumed ends with the weights of one that was not.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from signal import Signals
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from rich.console import Console
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.card import Card
from sret.data.augment import mix
from sret.data.dataset import ImageDataset, Unreadable
from sret.data.sampler import EpochBatches
from sret.data.sources import load_data
from sret.errors import InputError, InputWarning, first_few, is_out_of_memory
from sret.inference.evaluate import evaluate
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.training import distributed as parallel
from sret.training import progress as report
from sret.training import run_dir as run
from sret.training.config import Launch, TrainConfig
from sret.training.distillation.teacher import soft_targets
from sret.training.metrics import Look, Monitor
from sret.training.optim import freeze, make_ema, make_optimizer, make_schedule, rate_of
from sret.training.setup import fitting_model, make_teacher, preprocessing_for, temperature_of, training_set
from sret.training.signals import StopRequest, leave_process_group, obey
from sret.version import versions

MOST_LEFT_OUT = 0.2  # of the images, by the last batch of an epoch, before a warning
PERMUTATIONS_PER_STEP = 1 << 20  # more than a step can draw: steps never share a permutation


def train(
    config: TrainConfig,
    out: Path,
    resume: Literal["auto"] | None = None,
    max_steps: int | None = None,
    launch: Launch | None = None,
    watch: Callable[[Look], None] | None = None,
) -> Path:
    """Trains and leaves in `out` the best and last weights, the resumable state, metrics and a report.

    Args:
        out: a folder without a run in it, unless `resume` is "auto", which then continues that run.
        max_steps: stop after this many optimizer steps in all, resumable, whatever `epochs` says.
        launch: how this machine computes the steps.
        watch: is called with what a look at the last steps showed, about once a second.

    Returns the path of the best weights (the last, if it stopped before the first epoch's end).
    Raises `InputError` for what cannot be: an occupied folder, data and model that do not fit, a foreign state, a step
    that runs out of memory.
    Raises `KeyboardInterrupt` or `SystemExit` after Ctrl-C or SIGTERM, when the step is done and all is saved.
    """
    launch = launch or Launch()
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps is {max_steps}; it must be at least 1")
    accelerator = parallel.make_accelerator(config, launch, out)
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes

    # Data
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = preprocessing_for(model_config, data)
    sources = run.sources_of(config, data)
    state = run.find(out, config, data, sources, may_resume=resume == "auto")
    steps_found = gather_object([state["step"] if state else 0])
    if len(set(steps_found)) > 1:
        raise InputError(
            f"processes found other states in {out}, of steps {steps_found}; --out must be on a shared disk"
        )
    train_set = training_set(config, data, preprocessing, launch.max_corrupt)
    val_set = ImageDataset(data.split("val"), preprocessing)
    batches = EpochBatches(
        len(train_set),
        config.batch_size,
        config.seed,
        rank,
        num_ranks,
        launch.grad_accum_steps,
        config.augmentation.repeats,
    )
    loading: dict[str, Any] = {
        "num_workers": launch.num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
    }
    if (left := len(train_set) - batches.steps * config.batch_size) > MOST_LEFT_OUT * len(train_set):
        text = f"an epoch is {batches.steps} step(s) of batch_size {config.batch_size} and leaves out {left} images, "
        text += f"others each time, of {len(train_set)}; a smaller batch_size leaves out fewer"
        warnings.warn(text, InputWarning, stacklevel=2)
    train_loader = DataLoader(train_set, batch_sampler=batches, persistent_workers=launch.num_workers > 0, **loading)
    val_loader = accelerator.prepare(DataLoader(val_set, max(1, config.batch_size // num_ranks), **loading))

    # Model
    torch.manual_seed(config.seed)
    model = SReT(model_config)
    if config.init is not None and state is None:
        for line in transfer_file(model, config.init):
            console.print(f"Init    {line}", soft_wrap=True)
    model.to(accelerator.device)
    if num_ranks > 1:
        parallel.synchronize_batch_norm(model)
    frozen = freeze(model, config.freeze)
    ema = make_ema(model, config.ema_decay, launch.fsdp) if config.ema_decay is not None else None
    teacher = make_teacher(config, data, preprocessing, accelerator.device)
    report.describe(console, model, data)

    # Optimizer
    if launch.fsdp:
        for part in [model, ema.module] if ema else [model]:
            parallel.shard(part)
    optimizer = accelerator.prepare(make_optimizer(model, config))
    schedule = make_schedule(optimizer.optimizer, config, batches.steps)
    if launch.compile:
        model.compile()
    net: nn.Module = model if launch.fsdp else parallel.replicate(model, accelerator.device)
    criterion = SoftTargetCrossEntropy()
    temperature = temperature_of(config)
    total_steps = config.epochs * batches.steps
    last_step = min(total_steps, total_steps if max_steps is None else max_steps)

    # Resume
    step = 0
    sums = {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0}  # over the steps of the epoch
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    unreadable = Unreadable(launch.max_corrupt)
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
    recipe, made_by = config.to_dict(), versions()

    def save() -> None:
        spoilt = parallel.non_finite(model)
        parallel.raise_together(
            f"weights became not finite by step {step}: {first_few(spoilt)}; {out} keeps its last state; try a lower "
            "learning_rate, a longer warm-up or clip_grad"
            if spoilt
            else None
        )
        tensors = {  # every process takes part in gathering them
            "model": parallel.model_state(model),
            "ema": parallel.model_state(ema.module) if ema is not None else None,
            "optimizer": parallel.optimizer_state(model, optimizer.optimizer),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        error = None
        if accelerator.is_main_process:
            metrics = rows[-1] if rows and rows[-1]["step"] == step else {}
            about = {"recipe": recipe, "data": sources["data"], "step": step, "metrics": metrics, "versions": made_by}
            card = Card(config=model_config, preprocessing=preprocessing, class_names=data.class_names, training=about)
            progress = {"step": step, "total_steps": total_steps, "sums": sums, "rows": rows, "best": best}
            seen = sorted(unreadable.seen)
            values = {"config": recipe, "sources": sources, **progress, "unreadable": seen, **tensors}
            try:
                run.save(out, values, card)
            except InputError as caught:
                error = str(caught)
        parallel.raise_together(error)

    if state is None:
        save()  # claims the folder, and shows that it can be written to before any work is done
    if launch.trackers:
        about = {key: str(value) for key, value in recipe.items()}
        accelerator.init_trackers("sret", about, init_kwargs={"wandb": {"name": out.name}})

    # Steps
    def compute(part: int) -> tuple[Tensor, Tensor, Sequence[str]]:
        """Adds one part of this step's gradient; returns its loss, share of right answers, unreadable images."""
        images, labels, errors = next(loaded)
        images = images.to(accelerator.device, non_blocking=True)
        labels = labels.to(accelerator.device, non_blocking=True)
        targets = soft_targets(labels, len(data.class_names), config.label_smoothing)
        if config.mixes:
            images, targets = mix(images, targets, config.mixup, config.cutmix, key=(config.seed, step))
        torch.manual_seed((config.seed << 32) + (step * launch.grad_accum_steps + part) * num_ranks + rank)
        model.permuter.load_state_dict({"seed": config.seed, "count": step * PERMUTATIONS_PER_STEP})
        is_last = part == launch.grad_accum_steps - 1
        with parallel.gradients_shared(net, is_last):
            with accelerator.autocast():
                targets = targets if teacher is None else teacher(images)
                logits = net(images).float()
            loss = criterion(logits / temperature, targets)
            accelerator.backward(loss / launch.grad_accum_steps)
        return loss.detach(), (logits.argmax(1) == targets.argmax(1)).float().mean(), errors

    with StopRequest() as stop, report.Progress(console, accelerator, batches.steps, total_steps, step) as progress:
        monitor = Monitor(accelerator, unreadable, stop)
        signal: Signals | None = None  # which all processes have agreed on
        while signal is None and (step < last_step or len(rows) < step // batches.steps):
            if has_stalled(rows, best, config.patience):
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
                while step < end and signal is None:
                    schedule.step_update(step)
                    with out_of_memory_advice(model.config, launch):
                        losses, accuracies, errors = zip(*map(compute, range(launch.grad_accum_steps)), strict=True)
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
                        signal = look.signal
                        if watch is not None:
                            watch(look)
                        progress.show(step, look, config.batch_size, rate_of(optimizer))
                    if must_save and step < end and signal is None:
                        save()
                        monitor.restart()
                if signal is not None or step % batches.steps:
                    save()
                    break
            evaluated = {"val": model} if ema is None else {"val": model, "ema": ema.module}
            metrics = {k: evaluate(part, val_loader, accelerator, unreadable, stop) for k, part in evaluated.items()}
            complete = {name: measured for name, measured in metrics.items() if measured is not None}
            if len(complete) < len(metrics):  # told to stop; the evaluation comes first when the run is resumed
                signal = monitor.agreed_signal()
                save()
                break
            rows.append(report.row(step, batches.steps, config.batch_size, rate_of(optimizer), sums, complete))
            best = max((row for row in (best, rows[-1]) if row), key=report.merit)
            progress.epoch(rows[-1], best)
            save()
            signal = monitor.agreed_signal()

    # What is left behind
    if launch.trackers:
        accelerator.end_training()
    if signal is not None:
        console.print(f"Stopped and saved at step {step} of {total_steps}; --resume auto goes on", soft_wrap=True)
        obey(signal)
    if best is None:
        console.print(f"Stopped at step {step} of {total_steps}; --resume auto goes on", soft_wrap=True)
        return out / run.LAST
    if accelerator.is_main_process:  # nobody waits for it
        report.draw(out, rows, data, accelerator.device, launch.num_workers)
    console.print(
        f"Best validation accuracy {report.merit(best)[0]:.2f} % ({len(val_set)} images, epoch {best['epoch']}); "
        f"weights in {out / run.BEST}",
        soft_wrap=True,
    )
    return out / run.BEST


@contextmanager
def out_of_memory_advice(model: ModelConfig, launch: Launch) -> Iterator[None]:
    """Within this context running out of memory is an `InputError` that lists the settings which need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        policies = ("reversible",) if model.reversible else ("pass", "nested")
        less = policies[policies.index(model.memory) + 1 :] if model.memory in policies else policies
        options = [*(f"--model.memory {policy}" for policy in less)]
        options += [f"--grad_accum_steps {2 * launch.grad_accum_steps}", "a smaller --batch_size"]
        raise InputError(
            f"a step ran out of memory; these need less, the first ones at the same batch size: {', '.join(options)}; "
            "the last saved state is whole, and --resume auto continues from it"
        ) from error


def has_stalled(rows: Sequence[dict[str, Any]], best: dict[str, Any] | None, patience: int | None) -> bool:
    """Whether the best epoch lies `patience` epochs back."""
    return best is not None and patience is not None and rows[-1]["epoch"] - best["epoch"] >= patience


def check_finite(losses: Sequence[float], step: int, epoch_steps: int, out: Path) -> None:
    """Raises `InputError` naming the first of the steps up to `step` whose loss is not finite."""
    for before, loss in enumerate(losses):
        if not math.isfinite(loss):
            at = step - len(losses) + before + 1
            raise InputError(
                f"the loss became {loss} at step {at} (epoch {(at - 1) // epoch_steps + 1}); {out} keeps its last "
                "state; try a lower learning_rate, a longer warm-up or clip_grad"
            )
