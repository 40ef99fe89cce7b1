"""Dry run: checks data and model, and measures speed, memory and disk, in seconds. Leaves no files."""

import shutil
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import PartialState

from sret.data.dataset import check_output_dir
from sret.data.loading import ImageDataset, Unreadable
from sret.errors import InputError
from sret.files import format_bytes
from sret.kernels.cuda_graph import WARM_UP
from sret.signals import StopRequest
from sret.training import distributed, run_dir
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.metrics import MetricsBuffer, StepMetrics, check_finite, memory_in_use
from sret.training.setup import Setup, prepare
from sret.training.state import TrainingState
from sret.training.step import train_step

READ = 200  # images of each split, spread over it
READ_SECONDS = 1.0  # for each split; large photos take a tenth of a second each
STEPS = 4
STEP_SECONDS = 5.0  # no step starts later, except those that are needed to time one
FILES = 4  # of about the size of a state: best and last weights, the state, and the next state while it is written


def dry_run(config: TrainConfig, out: Path, resume: Literal["auto"] | None, runtime: RuntimeConfig) -> None:
    """Reads some images, trains a few steps in a temporary folder, and prints what the whole run will need.

    Raises `InputError` for what would stop the run: an occupied folder, unreadable images, a model that does not fit
    the data, a full disk.
    """
    check_output_dir(out, config.data)
    accelerator = distributed.make_accelerator(config, runtime, out)
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".sret-dry-run-", dir=parent) as folder:
            setup, _ = prepare(config, Path(folder), None, STEPS, runtime, accelerator)
            try:
                run_dir.find_state(out, config, setup.data, setup.sources, may_resume=resume == "auto")
                state = TrainingState(Unreadable(runtime.max_corrupt))
                _read_images(setup, state.unreadable)
                recorded = _train_steps(setup, state)
                state.save(setup, Path(folder))
            finally:
                setup.close()
            if not PartialState().is_main_process:
                return
            size = (Path(folder) / run_dir.STATE).stat().st_size
    except OSError as error:
        raise InputError(f"{parent}: cannot be written to ({error.strerror or error})") from error
    _print_needs(setup, recorded, FILES * size, parent)


def _read_images(setup: Setup, unreadable: Unreadable) -> None:
    """Reads some images of each split. Raises `InputError` if more are unreadable than the run may skip."""
    for name, samples in setup.data.splits.items():
        dataset = ImageDataset(samples, setup.preprocessing)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(int))
        indices = np.random.Generator(np.random.PCG64(0)).permutation(chosen).tolist()
        started, errors, count = time.perf_counter(), [], 0
        while count < len(indices) and time.perf_counter() - started < READ_SECONDS:
            errors.append(dataset[indices[count]][2])
            count += 1
        bad = sum(map(bool, errors))
        setup.console.print(f"Read    {count} of {len(dataset):,} {name} images: {bad} unreadable", soft_wrap=True)
        unreadable.add(errors, is_quiet=not setup.accelerator.is_main_process)


def _train_steps(setup: Setup, state: TrainingState) -> list[StepMetrics]:
    """Trains for `STEPS` steps after the warm-up, or `STEP_SECONDS`; prints the time of the first one immediately."""
    setup.batches.start_at(0)
    setup.start_training()
    buffer = MetricsBuffer(setup.accelerator, state.unreadable, StopRequest())
    loaded = iter(setup.train_loader)
    recorded: list[StepMetrics] = []
    warm_up = _warm_up(setup)
    needed = warm_up + 1 if setup.runtime.compile or setup.runtime.cuda_graph else 1
    for _ in range(min(warm_up + STEPS - 1, setup.last_step)):
        buffer.add(*train_step(setup, state, loaded))
        recorded.append(buffer.flush())
        check_finite(recorded[-1].losses, state.step, setup.epoch_steps, setup.out)
        if len(recorded) == 1:
            seconds = f"{recorded[0].seconds:.2g} s for the first step of {setup.config.batch_size} images"
            setup.console.print(f"Step    {seconds}, warm-up included", soft_wrap=True)
        if len(recorded) >= needed and sum(step.seconds for step in recorded) > STEP_SECONDS:
            break
    return recorded


def _warm_up(setup: Setup) -> int:
    """Steps at the beginning that take longer than the others."""
    return 1 if setup.graph is None else WARM_UP + 1  # the graph is recorded in the last of them


def _print_needs(setup: Setup, recorded: list[StepMetrics], disk: int, parent: Path) -> None:
    """Prints speed, memory, time and disk. Raises `InputError` if the disk is too small."""
    console, steps = setup.console, setup.total_steps
    timed = recorded[_warm_up(setup) :] or recorded
    seconds = sum(step.seconds for step in timed) / len(timed)
    which = f"in {len(timed)} steps" if len(recorded) > 1 else "in one step"
    memory = format_bytes(memory_in_use(PartialState().device))
    left = timedelta(seconds=round(seconds * steps))
    free = shutil.disk_usage(parent).free
    console.print(
        f"Speed   {setup.config.batch_size / seconds:,.0f} images/s {which}; memory {memory}\n"
        f"Time    {left} (hours:minutes:seconds) for {steps:,} steps, and the evaluations\n"
        f"Disk    {format_bytes(disk)} needed, {format_bytes(free)} free at {parent}",
        soft_wrap=True,
    )
    if disk > free:
        raise InputError(f"{parent}: {format_bytes(free)} are free, but the run needs about {format_bytes(disk)}")
