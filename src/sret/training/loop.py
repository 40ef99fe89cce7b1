"""Training, top to bottom: data, model, optimizer, resume, steps, evaluate, save.

Every random number of a run is a function of its seed and of a position: the order of the images of (seed, epoch),
the augmentation of an image of (seed, epoch, image), mixing and permutations of (seed, step), dropout of (seed,
step, part of the step). So a run that is stopped at any step and resumed ends with the weights of one that was not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from signal import Signals
from typing import Any, Literal

import torch
from torch import Tensor

from sret.data.augment import mix
from sret.data.dataset import Unreadable
from sret.data.preprocess import Normalized
from sret.errors import InputError, is_out_of_memory
from sret.inference.evaluate import evaluate
from sret.models.config import ModelConfig
from sret.training import distributed as parallel
from sret.training import progress as report
from sret.training import run_dir as run
from sret.training.config import Launch, TrainConfig
from sret.training.distillation.teacher import soft_targets
from sret.training.metrics import Look, Monitor
from sret.training.optim import rate_of
from sret.training.signals import StopRequest, obey
from sret.training.state import Setup, TrainingState, prepare

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
    setup, found = prepare(config, out, resume, max_steps, launch)
    state = TrainingState(Unreadable(launch.max_corrupt))
    if found is not None:
        state.restore(setup, found)
    else:
        state.save(setup, out)  # claims the folder, and shows that it can be written to before any work is done
    start_trackers(setup)
    shown = (setup.console, setup.accelerator, setup.epoch_steps, setup.total_steps, state.step)
    with StopRequest() as stop, report.Progress(*shown) as progress:
        monitor = Monitor(setup.accelerator, state.unreadable, stop)
        signal: Signals | None = None  # which all processes have agreed on
        while signal is None and (state.step < setup.last_step or len(state.rows) < state.step // setup.epoch_steps):
            if has_stalled(state.rows, state.best, config.patience):
                setup.console.print(f"Stopped early: no better epoch in {config.patience}", soft_wrap=True)
                break
            if len(state.rows) == state.step // setup.epoch_steps:  # else only the evaluation of the epoch is missing
                signal = train_epoch(setup, state, monitor, progress, watch)
                if signal is not None or state.step % setup.epoch_steps:
                    state.save(setup, out)
                    break
            signal = validate(setup, state, monitor, progress)
    return finish(setup, state, signal)


def start_trackers(setup: Setup) -> None:
    """Tells the trackers that the user named, such as TensorBoard, about the recipe."""
    if setup.launch.trackers:
        about = {key: str(value) for key, value in setup.recipe.items()}
        setup.accelerator.init_trackers("sret", about, init_kwargs={"wandb": {"name": setup.out.name}})


def train_epoch(
    setup: Setup,
    state: TrainingState,
    monitor: Monitor,
    progress: report.Progress,
    watch: Callable[[Look], None] | None,
) -> Signals | None:
    """Steps up to the end of the epoch or of the run, or until a signal, which is returned.

    Saves after every `save_every` steps, but not after the last step: what follows it saves.

    Raises `InputError` for a loss that is not finite, too many unreadable images, and a step that runs out of memory.
    """
    epoch, done = divmod(state.step, setup.epoch_steps)
    if not done:
        state.sums = dict.fromkeys(state.sums, 0.0)
    setup.batches.start_at(epoch, done)
    loaded = iter(setup.train_loader)
    end = min((epoch + 1) * setup.epoch_steps, setup.last_step)
    save_every = setup.launch.save_every
    setup.net.train()
    for module in setup.frozen:
        module.eval()
    monitor.restart()
    signal: Signals | None = None
    while state.step < end and signal is None:
        monitor.add(*train_step(setup, state, loaded))
        must_save = save_every is not None and state.step % save_every == 0
        if monitor.is_due or must_save or state.step == end:
            look = monitor.look()
            check_finite(look.losses, state.step, setup.epoch_steps, setup.out)
            state.add(look)
            signal = look.signal
            if watch is not None:
                watch(look)
            progress.show(state.step, look, setup.config.batch_size, rate_of(setup.optimizer))
        if must_save and state.step < end and signal is None:
            state.save(setup, setup.out)
            monitor.restart()
    return signal


def train_step(setup: Setup, state: TrainingState, loaded: Iterator[Any]) -> tuple[Tensor, Tensor, Iterable[str]]:
    """One optimizer step over the next images that were loaded.

    Returns the mean loss and the share of right predictions of this process, as scalars on its device, and a text for
    each image that could not be read.
    """
    setup.schedule.step_update(state.step)
    parts = setup.launch.grad_accum_steps
    with out_of_memory_advice(setup.model.config, setup.launch):
        computed = [forward_backward(setup, state.step, part, loaded) for part in range(parts)]
        losses, accuracies, errors = zip(*computed, strict=True)
        if setup.config.clip_grad is not None:
            setup.accelerator.clip_grad_norm_(setup.net.parameters(), setup.config.clip_grad)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    state.step += 1
    if setup.ema is not None:
        setup.ema.update(setup.model, state.step)
    return torch.stack(losses).mean(), torch.stack(accuracies).mean(), chain(*errors)


def forward_backward(setup: Setup, step: int, part: int, loaded: Iterator[Any]) -> tuple[Tensor, Tensor, Sequence[str]]:
    """Adds the gradient of one part of a step to the weights' gradients.

    Sets the RNG states of torch and of the model's permutations to functions of the seed, `step` and `part`.

    Returns the loss, the share of right predictions, and a text for each image, empty if it could be read.
    """
    config, accelerator, parts = setup.config, setup.accelerator, setup.launch.grad_accum_steps
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    images, labels, errors = next(loaded)
    images = images.to(accelerator.device, non_blocking=True)
    labels = labels.to(accelerator.device, non_blocking=True)
    targets = soft_targets(labels, len(setup.data.class_names), config.label_smoothing)
    if config.mixes:
        images, targets = mix(images, targets, config.mixup, config.cutmix, key=(config.seed, step))
    torch.manual_seed((config.seed << 32) + (step * parts + part) * num_ranks + rank)
    setup.model.permuter.load_state_dict({"seed": config.seed, "count": step * PERMUTATIONS_PER_STEP})
    with parallel.gradients_shared(setup.net, is_last=part == parts - 1):
        with accelerator.autocast():
            targets = targets if setup.teacher is None else setup.teacher(images)
            logits = setup.net(setup.preprocessing.normalize(images)).float()
        loss = setup.criterion(logits / setup.temperature, targets)
        accelerator.backward(loss / parts)
    return loss.detach(), (logits.argmax(1) == targets.argmax(1)).float().mean(), errors


def validate(setup: Setup, state: TrainingState, monitor: Monitor, progress: report.Progress) -> Signals | None:
    """Evaluates the weights, and their moving average, on the validation images; adds a row of metrics; saves.

    Returns the signal that came meanwhile. One that came during the evaluation leaves no row: the evaluation comes
    first when the run is resumed.
    """
    evaluated = {"val": setup.model} if setup.ema is None else {"val": setup.model, "ema": setup.ema.module}
    results = {
        name: evaluate(
            Normalized(model, setup.preprocessing), setup.val_loader, setup.accelerator, state.unreadable, monitor.stop
        )
        for name, model in evaluated.items()
    }
    complete = {name: result for name, result in results.items() if result is not None}
    if len(complete) < len(results):  # asked to stop
        signal = monitor.agreed_signal()
        state.save(setup, setup.out)
        return signal
    rate, batch_size = rate_of(setup.optimizer), setup.config.batch_size
    metrics = {name: measured for name, (measured, _) in complete.items()}
    state.rows.append(report.row(state.step, setup.epoch_steps, batch_size, rate, state.sums, metrics))
    state.best = max((row for row in (state.best, state.rows[-1]) if row), key=report.merit)
    if state.best is state.rows[-1]:
        _, state.best_predictions = complete["val" if setup.ema is None else "ema"]
    progress.epoch(state.rows[-1], state.best)
    state.save(setup, setup.out)
    return monitor.agreed_signal()


def finish(setup: Setup, state: TrainingState, signal: Signals | None) -> Path:
    """Says how the run ended and draws the report. Returns the path of the best weights, or of the last ones.

    Raises `KeyboardInterrupt` or `SystemExit` if a signal ended the run.
    """
    console, out = setup.console, setup.out
    if setup.launch.trackers:
        setup.accelerator.end_training()
    if signal is not None:
        text = f"Stopped and saved at step {state.step} of {setup.total_steps}; --resume auto goes on"
        console.print(text, soft_wrap=True)
        obey(signal)
    if state.best is None:
        text = f"Stopped at step {state.step} of {setup.total_steps}; --resume auto goes on"
        console.print(text, soft_wrap=True)
        return out / run.LAST
    if setup.accelerator.is_main_process:  # nobody waits for it
        assert state.best_predictions is not None
        report.draw(out, state.rows, setup.data, setup.preprocessing, state.best_predictions)
    console.print(
        f"Best validation accuracy {report.merit(state.best)[0]:.2f} % ({len(setup.data.split('val'))} images, epoch "
        f"{state.best['epoch']}); weights in {out / run.BEST}",
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
