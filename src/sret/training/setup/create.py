"""Creates the objects of a training run, and finds the state to resume from."""

from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from timm.loss import SoftTargetCrossEntropy

from sret.data.dataset import ImageData, warn_of_mirrors
from sret.data.sources import load_data
from sret.errors import InputError
from sret.training import distributed, run_dir
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.targets import make_teacher, temperature_of, training_set
from sret.training.metrics import describe
from sret.training.optim import make_ema, make_optimizer, make_schedule
from sret.training.setup.loaders import make_batches, make_loaders
from sret.training.setup.model import check_init, fitting_model, make_graph, make_model, make_net
from sret.training.setup.objects import Setup
from sret.version import versions


def prepare(
    config: TrainConfig,
    out: Path,
    resume: Literal["auto"] | None,
    max_steps: int | None,
    runtime: RuntimeConfig,
    accelerator: Accelerator,
) -> tuple[Setup, dict[str, Any] | None]:
    """Creates the objects of a run. Returns them and the saved state to resume from, or None for a new run.

    Sets torch's random number generator to the recipe's seed before the weights are drawn.

    Raises `InputError` for an occupied folder, the state of another run, or data that does not fit the model.
    """
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    if not (out / run_dir.STATE).exists():
        check_init(config)  # before the data are read, which may take minutes
    data = load_data(config.data)
    model_config = fitting_model(config, data)
    preprocessing = data.preprocessing(model_config.input_size, config.exif_orientation)
    sources = run_dir.sources_of(config, data)
    found = find_common_state(config, out, data, sources, may_resume=resume == "auto")
    train_set = training_set(config, data, preprocessing, runtime.max_corrupt)
    batches = make_batches(train_set.samples.labels, config, runtime, accelerator)
    warn_of_mirrors(data, config.augmentation)
    train_loader, val_loader = make_loaders(train_set, data.split("val"), batches, config, runtime, accelerator)
    model, frozen = make_model(model_config, config, accelerator, console, may_init=found is None)
    ema = make_ema(model, config.ema_decay, runtime.fsdp) if config.ema_decay is not None else None
    teacher = make_teacher(config, data, accelerator.device)
    describe(console, model_config, data)
    if runtime.fsdp:
        distributed.shard(model, *([ema.module] if ema else []))
    optimizer = accelerator.prepare(make_optimizer(model, config))
    schedule = make_schedule(optimizer.optimizer, config, batches.steps)
    setup = Setup(
        config=config,
        runtime=runtime,
        out=out,
        max_steps=max_steps,
        accelerator=accelerator,
        console=console,
        data=data,
        preprocessing=preprocessing,
        sources=sources,
        recipe=config.to_dict(),
        versions=versions(),
        batches=batches,
        train_loader=train_loader,
        val_loader=val_loader,
        model=model,
        model_config=model_config,
        net=make_net(model, runtime, accelerator.device),
        graph=make_graph(model) if runtime.cuda_graph else None,
        ema=ema,
        teacher=teacher,
        frozen=frozen,
        optimizer=optimizer,
        schedule=schedule,
        criterion=SoftTargetCrossEntropy(),
        temperature=temperature_of(config),
    )
    return setup, found


def find_common_state(
    config: TrainConfig, out: Path, data: ImageData, sources: dict[str, Any], may_resume: bool
) -> dict[str, Any] | None:
    """The saved state in `out`, or None. Raises `InputError` also if processes find different states."""
    found = run_dir.find_state(out, config, data, sources, may_resume)
    steps_found = gather_object([found["step"] if found else 0])
    if len(set(steps_found)) > 1:
        raise InputError(
            f"processes found different states in {out}, of steps {steps_found}; --out must be on a shared disk"
        )
    return found
