"""Dry run: checks data and model, and measures speed, memory and disk, in seconds. Leaves no files."""

import os
import shutil
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import PartialState
from rich.console import Console

from sret.checkpoints.state import load_state
from sret.data.dataset import check_output_dir
from sret.data.loading import ImageDataset, Unreadable
from sret.data.sources import load_data
from sret.errors import InputError
from sret.models.sret import SReT
from sret.training import run_dir
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.loop import train
from sret.training.metrics import MIB, StepMetrics, describe, memory_in_use
from sret.training.setup import fitting_model

READ = 200  # images of each split, evenly spaced
STEPS = 4
FILES = 4  # of about the size of a state: best and last weights, the state, and the next state while it is written
MB = 1e6


def dry_run(config: TrainConfig, out: Path, resume: Literal["auto"] | None, runtime: RuntimeConfig) -> None:
    """Reads some images, trains a few steps in a temporary folder, and prints what the whole run will need.

    Raises `InputError` for what would stop the run: an occupied folder, unreadable images, a model that does not fit
    the data, a full disk.
    """
    check_output_dir(out, config.data)
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = data.preprocessing(model_config.input_size, config.exif_orientation)
    run_dir.find_state(out, config, data, run_dir.sources_of(config, data), may_resume=resume == "auto")
    recorded: list[StepMetrics] = []
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".sret-dry-run-", dir=parent) as folder:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                quiet = replace(runtime, trackers=(), max_corrupt=len(data.split("train")))
                train(config, Path(folder), max_steps=STEPS, runtime=quiet, on_metrics=recorded.append)
            if not PartialState().is_main_process:
                return
            state = load_state(Path(folder) / run_dir.STATE)
            size = (Path(folder) / run_dir.STATE).stat().st_size
    except OSError as error:
        raise InputError(f"{parent}: cannot be written to ({error.strerror or error})") from error

    console = Console(highlight=False, soft_wrap=True)
    describe(console, SReT(model_config), data)
    unreadable = Unreadable(runtime.max_corrupt)
    for name, samples in data.splits.items():
        dataset = ImageDataset(samples, preprocessing)
        indices = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(int)).tolist()
        errors = [error for error in (dataset[i][2] for i in indices) if error]
        console.print(f"Read    {len(indices)} of {len(dataset):,} {name} images: {len(errors)} unreadable")
        unreadable.add(errors)
    memory = memory_in_use(PartialState().device) / MIB
    timed = recorded[1:] or recorded  # the first step includes warm-up
    seconds = sum(metrics.seconds for metrics in timed) / sum(len(metrics.losses) for metrics in timed)
    left = timedelta(seconds=round(seconds * state["total_steps"]))
    console.print(f"Speed   {config.batch_size / seconds:,.0f} images/s in the first steps; memory {memory:,.0f} MiB")
    console.print(f"Time    {left} (hours:minutes:seconds) for {state['total_steps']:,} steps, and the evaluations")
    free = shutil.disk_usage(parent).free
    console.print(f"Disk    {FILES * size / MB:,.0f} MB needed, {free / MB:,.0f} MB free at {parent}")
    if FILES * size > free:
        raise InputError(f"{parent}: {free / MB:,.0f} MB are free, but the run needs about {FILES * size / MB:,.0f} MB")
