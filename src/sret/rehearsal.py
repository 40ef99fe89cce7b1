"""A dry run: what training will meet, found out in seconds. Data, model, speed, memory and disk; nothing is left."""

import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from sret import run
from sret.checkpoint import load_state
from sret.data import ImageDataset, Unreadable
from sret.errors import InputError
from sret.recipe import Launch, TrainConfig
from sret.sources import load_data
from sret.train import fitting_model, preprocessing_for, train

READ = 200  # pictures of each split, evenly spread
STEPS = 4
FILES = 4  # of about the size of a state that a run holds at once: best and last weights, the state, its successor


def rehearse(config: TrainConfig, out: Path, resume: Literal["auto"] | None, launch: Launch) -> None:
    """Reads some pictures, trains a few steps on the disk of `out`, and prints what the whole run will take.

    Raises `InputError` for whatever would stop the run: an occupied folder, unreadable pictures, a model that does not
    fit its data, a full disk.
    """
    console = Console(highlight=False)
    data = load_data(config.data)
    preprocessing = preprocessing_for(fitting_model(config, data), data)
    run.find(out, config, data, may_resume=resume == "auto")
    unreadable = Unreadable(config.max_corrupt)
    for name in ("train", "val"):
        dataset = ImageDataset(data.split(name), preprocessing)
        indices = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(int)).tolist()
        unreadable.note(dataset[i][2] for i in indices)
        console.print(f"Read    {len(indices)} of {len(dataset):,} {name} pictures")

    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".sret-dry-run-", dir=parent) as folder, warnings.catch_warnings():
        here = Path(folder)
        train(replace(config, max_corrupt=len(data.split("train"))), here, max_steps=STEPS, launch=launch)
        state = load_state(here / run.STATE)
        size = (here / run.STATE).stat().st_size
        free = shutil.disk_usage(here).free
    seconds = state["sums"]["seconds"] / STEPS
    hours = seconds * state["total_steps"] / 3600
    console.print(
        f"Time    {seconds:.2f} s a step, the first ones, {state['total_steps']:,} steps: about {hours:,.1f} h "
        "and evaluation"
    )
    console.print(f"Disk    {FILES * size / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free at {parent}")
    if FILES * size > free:
        raise InputError(f"{parent}: {free / 1e6:,.0f} MB are free, the run needs about {FILES * size / 1e6:,.0f}")
