"""A dry run: what training will meet, found out in seconds. Data, model, speed, memory and disk; nothing is left."""

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

from sret.checkpoints.card import load_state
from sret.data.dataset import ImageDataset, Unreadable
from sret.data.sources import load_data
from sret.errors import InputError
from sret.models.sret import SReT
from sret.training import progress as report
from sret.training import run_dir as run
from sret.training.config import Launch, TrainConfig
from sret.training.loop import train
from sret.training.metrics import Look
from sret.training.setup import fitting_model, preprocessing_for

READ = 200  # images of each split, evenly spread
STEPS = 4
FILES = 4  # about as large as a state, that a run has at once: best and last weights, the state, its successor
MB = 1e6


def rehearse(config: TrainConfig, out: Path, resume: Literal["auto"] | None, launch: Launch) -> None:
    """Reads some images, trains a few steps on the disk of `out`, and prints what the whole run will take.

    Raises `InputError` for whatever would stop the run: an occupied folder, unreadable images, a model that does not
    fit its data, a full disk.
    """
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = preprocessing_for(model_config, data)
    run.find(out, config, data, run.sources_of(config, data), may_resume=resume == "auto")
    looks: list[Look] = []
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".sret-dry-run-", dir=parent) as folder:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                quiet = replace(launch, trackers=(), max_corrupt=len(data.split("train")))
                train(config, Path(folder), max_steps=STEPS, launch=quiet, watch=looks.append)
            if not PartialState().is_main_process:
                return
            state = load_state(Path(folder) / run.STATE)
            size = (Path(folder) / run.STATE).stat().st_size
    except OSError as error:
        raise InputError(f"{parent}: cannot be written to ({error.strerror or error})") from error

    console = Console(highlight=False, soft_wrap=True)
    report.describe(console, SReT(model_config), data)
    unreadable = Unreadable(launch.max_corrupt)
    for name, samples in data.splits.items():
        dataset = ImageDataset(samples, preprocessing)
        indices = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(int)).tolist()
        errors = [error for error in (dataset[i][2] for i in indices) if error]
        console.print(f"Read    {len(indices)} of {len(dataset):,} {name} images: {len(errors)} unreadable")
        unreadable.note(errors)
    memory = report.memory_in_use(PartialState().device) / report.MIB
    timed = looks[1:] or looks  # the first step also starts up
    seconds = sum(look.seconds for look in timed) / sum(len(look.losses) for look in timed)
    left = timedelta(seconds=round(seconds * state["total_steps"]))
    console.print(f"Speed   {config.batch_size / seconds:,.0f} images/s in the first steps; memory {memory:,.0f} MiB")
    console.print(f"Time    {left} (hours:minutes:seconds) for {state['total_steps']:,} steps, and the evaluations")
    free = shutil.disk_usage(parent).free
    console.print(f"Disk    {FILES * size / MB:,.0f} MB needed, {free / MB:,.0f} MB free at {parent}")
    if FILES * size > free:
        raise InputError(f"{parent}: {free / MB:,.0f} MB are free, and the run needs about {FILES * size / MB:,.0f}")
