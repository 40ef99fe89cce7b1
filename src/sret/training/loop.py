"""The training loop, from top to bottom: set-up, resume, steps, evaluation, save.

Every random number is a function of the seed and a position: the order of images of (seed, epoch), the augmentation of
an image of (seed, epoch, image), mixing and permutations of (seed, step), dropout of (seed, step, part of the step).
So a run that is stopped at any step and resumed gives the same weights as one that was not.
"""

from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any, Literal

from sret.checkpoints.state import digest_of_state
from sret.data.dataset import check_output_dir
from sret.data.loading import Unreadable
from sret.data.preprocess import Normalized
from sret.inference.evaluate import evaluate
from sret.inference.png_report import write_png
from sret.inference.statistics import Statistics
from sret.ranges import PositiveInt, check_number
from sret.signals import StopRequest, raise_signal
from sret.training import distributed, run_dir
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.lock import locked
from sret.training.metrics import (
    MetricsBuffer,
    Progress,
    StepMetrics,
    accuracy_of,
    check_finite,
    epoch_row,
    has_stalled,
    is_best,
)
from sret.training.optim import rate_of
from sret.training.setup import Setup, prepare
from sret.training.state import TrainingState
from sret.training.step import train_step


def train(
    config: TrainConfig,
    out: Path,
    resume: Literal["auto"] | None = None,
    max_steps: int | None = None,
    runtime: RuntimeConfig | None = None,
    on_metrics: Callable[[StepMetrics], None] | None = None,
) -> Path:
    """Trains a model; writes the best and last weights, the state, metrics and a report to `out`.

    Args:
        config: the recipe.
        out: the folder of the run. It must not have a run, unless `resume` is "auto".
        resume: "auto" continues the run in `out`, or starts one if there is none.
        max_steps: stop after this many steps in total; the run can be resumed.
        runtime: how this machine computes the steps.
        on_metrics: is called with the metrics of the latest steps, about once a second.

    Returns the path of the best weights, or of the last weights if the run stopped during the first epoch.

    Raises `InputError` if the folder has a run or is in use, if the data do not fit the model, if the run in `out` has
    another recipe, and if a step runs out of memory.

    Raises `KeyboardInterrupt` or `SystemExit` after Ctrl-C or SIGTERM, when the step is done and the state is saved.
    """
    runtime = runtime or RuntimeConfig()
    if max_steps is not None:
        check_number("max_steps", max_steps, PositiveInt)
    check_output_dir(out, config.data)
    accelerator = distributed.make_accelerator(config, runtime, out)
    with locked(out):
        setup, found = prepare(config, out, resume, max_steps, runtime, accelerator)
        state = TrainingState(Unreadable(runtime.max_corrupt), digest=digest_of_state(out / run_dir.STATE))
        try:
            return run_steps(setup, state, found, on_metrics)
        finally:
            setup.close()


def run_steps(
    setup: Setup,
    state: TrainingState,
    found: dict[str, Any] | None,
    on_metrics: Callable[[StepMetrics], None] | None,
) -> Path:
    """Runs steps and evaluations, from the saved state `found` or from the beginning. Returns what `train` returns."""
    config, out = setup.config, setup.out
    if found is not None:
        state.restore(setup, found)
    else:
        state.save(setup, out)  # reserves the folder, and fails early if it cannot be written to
    start_trackers(setup)
    shown = (setup.console, setup.accelerator, setup.epoch_steps, setup.total_steps, state.step)
    with StopRequest() as stop, Progress(*shown) as progress:
        buffer = MetricsBuffer(setup.accelerator, state.unreadable, stop)
        signal: Signals | None = None  # the same in all processes
        while signal is None and (state.step < setup.last_step or len(state.rows) < state.step // setup.epoch_steps):
            if has_stalled(complete_rows(setup, state), config.patience):
                setup.console.print(f"Stopped early: no better epoch in {config.patience}", soft_wrap=True)
                break
            # If the last epoch has no row of metrics, a signal stopped its evaluation, which is repeated first.
            if len(state.rows) == state.step // setup.epoch_steps:
                signal = train_epoch(setup, state, buffer, progress, on_metrics)
                if signal is not None or state.step % setup.epoch_steps:
                    state.save(setup, out)
                    break
            signal = validate(setup, state, buffer, progress)
    return finish(setup, state, signal)


def start_trackers(setup: Setup) -> None:
    """Starts the trackers of the runtime settings, such as TensorBoard, with the recipe."""
    if setup.runtime.trackers:
        about = {key: str(value) for key, value in setup.recipe.items()}
        setup.accelerator.init_trackers("sret", about, init_kwargs={"wandb": {"name": setup.out.name}})


def train_epoch(
    setup: Setup,
    state: TrainingState,
    buffer: MetricsBuffer,
    progress: Progress,
    on_metrics: Callable[[StepMetrics], None] | None,
) -> Signals | None:
    """Trains to the end of the epoch or of the run, or until a signal, which is returned.

    Saves after every `save_every` steps, but not after the last one, since the caller saves then.

    Raises `InputError` for a loss that is not finite, too many unreadable images, and a step that runs out of memory.
    """
    epoch, done = divmod(state.step, setup.epoch_steps)
    if not done:
        state.sums = dict.fromkeys(state.sums, 0.0)
    setup.batches.start_at(epoch, done)
    loaded = iter(setup.train_loader)
    end = min((epoch + 1) * setup.epoch_steps, setup.last_step)
    save_every = setup.runtime.save_every
    setup.start_training()
    buffer.restart_clock()
    signal: Signals | None = None
    while state.step < end and signal is None:
        buffer.add(*train_step(setup, state, loaded))
        must_save = save_every is not None and state.step % save_every == 0
        if buffer.is_due or must_save or state.step == end:
            metrics = buffer.flush()
            check_finite(metrics.losses, state.step, setup.epoch_steps, setup.out)
            state.add(metrics)
            signal = metrics.signal
            if on_metrics is not None:
                on_metrics(metrics)
            progress.show(state.step, metrics, setup.config.batch_size, rate_of(setup.optimizer))
        if must_save and state.step < end and signal is None:
            state.save(setup, setup.out)
            buffer.restart_clock()
    return signal


def validate(setup: Setup, state: TrainingState, buffer: MetricsBuffer, progress: Progress) -> Signals | None:
    """Evaluates the weights, and their moving average, on the validation images; adds a row of metrics; saves.

    Returns the signal that arrived meanwhile. If it stopped the evaluation, no row is added, and a resumed run starts
    with the evaluation.
    """
    setup.set_passes(1 if state.step <= setup.recursion_step else None)
    evaluated = {"val": setup.model} if setup.ema is None else {"val": setup.model, "ema": setup.ema.module}
    results = {
        name: evaluate(
            Normalized(model, setup.preprocessing), setup.val_loader, setup.accelerator, state.unreadable, buffer.stop
        )
        for name, model in evaluated.items()
    }
    complete = {name: result for name, result in results.items() if result is not None}
    if len(complete) < len(results):  # a signal stopped the evaluation
        signal = buffer.agreed_signal()
        state.save(setup, setup.out)
        return signal
    rate, batch_size = rate_of(setup.optimizer), setup.config.batch_size
    metrics = {name: measured for name, (measured, _) in complete.items()}
    state.rows.append(epoch_row(state.step, setup.epoch_steps, batch_size, rate, state.sums, metrics))
    measured, predictions = complete["val" if setup.ema is None else "ema"]
    rows = complete_rows(setup, state)
    if rows and is_best(rows, measured.count):
        state.best, state.best_predictions = rows[-1], predictions
    progress.epoch(rows or state.rows)
    state.save(setup, setup.out)
    return buffer.agreed_signal()


def complete_rows(setup: Setup, state: TrainingState) -> list[dict[str, Any]]:
    """The rows of the epochs that trained all passes; before, the weights of later passes are untrained."""
    return [row for row in state.rows if row["step"] > setup.recursion_step]


def finish(setup: Setup, state: TrainingState, signal: Signals | None) -> Path:
    """Prints how the run ended and draws the report. Returns the path of the best weights, or of the last ones.

    Raises `KeyboardInterrupt` or `SystemExit` if a signal ended the run.
    """
    console, out = setup.console, setup.out
    if setup.runtime.trackers:
        setup.accelerator.end_training()
    if signal is not None:
        text = f"Stopped and saved at step {state.step} of {setup.total_steps}; --resume auto continues"
        console.print(text, soft_wrap=True)
        raise_signal(signal)
    if state.best is None:
        text = f"Stopped at step {state.step} of {setup.total_steps}; --resume auto continues"
        console.print(text, soft_wrap=True)
        return out / run_dir.LAST
    if setup.accelerator.is_main_process:  # nobody waits for it
        draw_report(setup, state)
    assert state.best_predictions is not None
    num_images, epoch = state.best_predictions.count, state.best["epoch"]
    console.print(
        f"Validation accuracy {accuracy_of(state.best):.2f} % ({num_images} images, epoch {epoch}); "
        f"weights in {out / run_dir.BEST}, report in {out / run_dir.REPORT}",
        soft_wrap=True,
    )
    return out / run_dir.BEST


def draw_report(setup: Setup, state: TrainingState) -> None:
    """Draws the curves of the run, and the predictions of the best epoch on the validation images."""
    assert state.best is not None
    assert state.best_predictions is not None
    data, names = setup.data, setup.data.class_names
    title = f"{data.name}, validation, epoch {state.best['epoch']} of {state.rows[-1]['epoch']}"
    found = Statistics.of(state.best_predictions, len(names))
    path = setup.out / run_dir.REPORT
    write_png(path, title, names, found, data.split("val"), setup.preprocessing, state.rows, state.best)
