"""Distils a model into its copy with shared blocks: predictions, and features after each group of blocks.

    L = -sum_k p_k log q_k  +  w mean_g |f_g - t_g|^2 / |t_g|^2

p and q are the softmax of the original and of the copy; t_g and f_g their outputs of the last block of group g, over a
batch; w is `feature_weight`. A group has `passes` blocks that follow each other.

The images of a step and their augmentation are functions of seed and epoch, and torch's random numbers of seed and
step, so a run that continues from the state of an epoch gives the same weights as one that was not stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from sret.checkpoints.state import load_state, save_state
from sret.data.dataset import Samples
from sret.data.loading import TrainDataset, Unreadable, check_batch
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches
from sret.data.workers import worker_options
from sret.errors import InputError, describe_changes, first_few
from sret.files import STATE
from sret.models.recursify.runs import find_runs
from sret.signals import StopRequest, leave_process_group, raise_signal
from sret.training.optim import WARMUP_START
from sret.training.recovery.config import Recovery

Features = dict[str, Tensor]  # by name of the block


@dataclass(frozen=True)
class Pair:
    """The original and the model with shared blocks, on one device, and how both take their images."""

    original: nn.Module
    shared: nn.Module
    preprocessing: Preprocessing
    blocks: tuple[str, ...]  # whose outputs are compared


def compared_blocks(model: nn.Module, passes: int, parts: Sequence[str]) -> tuple[str, ...]:
    """The last block of each group of `passes` units, of the runs in `parts` or of all."""
    runs = [run for run in find_runs(model) if not parts or run.name in parts]
    return tuple(unit[-1] for run in runs for unit in run.units[passes - 1 :: passes])


def distill(
    pair: Pair,
    samples: Samples,
    settings: Recovery,
    out: Path,
    key: dict[str, Any],
    num_workers: int,
    report: Callable[[dict[str, float]], None],
) -> list[dict[str, float]]:
    """Trains `pair.shared` in place; saves the state in `out` after each epoch, and continues from it.

    Args:
        key: plain values that describe the run; a state with other values is refused.
        report: is called with the row of each epoch.

    Returns a row of metrics for each epoch: epoch, loss, its parts, and the agreement on training images in percent.

    Raises `InputError` for the state of another run, unreadable images and a loss that is not finite. Raises
    `KeyboardInterrupt` or `SystemExit` after Ctrl-C or SIGTERM; the state is that of the last complete epoch.
    """
    device = next(pair.shared.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(pair.shared, settings), settings.learning_rate)
    rows = restore(pair.shared, optimizer, out, key)
    if len(rows) >= settings.epochs:
        if not rows:  # no epochs: the settings protect the results in `out` from another run
            save(pair.shared, optimizer, out, key, rows)
        return rows
    batches = batches_of(settings, pair.preprocessing, len(samples))
    dataset = TrainDataset(samples, pair.preprocessing, settings.augmentation, settings.seed)
    options: dict[str, Any] = {**worker_options(num_workers), "worker_init_fn": leave_process_group}
    loader = DataLoader(dataset, batch_sampler=batches, **options)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs * batches.steps,
        warmup_t=round(settings.warmup_epochs * batches.steps),
        warmup_lr_init=WARMUP_START * settings.learning_rate,
        t_in_epochs=False,
    )
    pair.original.eval().requires_grad_(False)
    with StopRequest() as stop:
        for epoch in range(len(rows), settings.epochs):
            batches.start_at(epoch)
            update = partial(train_step, pair, settings, optimizer, schedule, stop)
            pair.shared.train()
            sums, unreadable = torch.zeros(3, device=device), Unreadable(0)
            for step, (images, _, errors) in enumerate(loader, epoch * batches.steps):
                unreadable.add(errors)
                sums += update(step, images.to(device))
            predictions, features, agreement = (sums / batches.steps).tolist()
            total = predictions + settings.feature_weight * features
            row = {"epoch": epoch + 1, "loss": total, "predictions": predictions, "features": features}
            rows.append({**row, "train_agreement": 100 * agreement})
            save(pair.shared, optimizer, out, key, rows)
            report(rows[-1])
    return rows


def batches_of(settings: Recovery, preprocessing: Preprocessing, num_images: int) -> EpochBatches:
    """The batches of each epoch. Raises `InputError` for a batch larger than the data, or than the memory."""
    check_batch(preprocessing, settings.batch_size, num_images)
    return EpochBatches(num_images, settings.batch_size, settings.seed)


def train_step(
    pair: Pair,
    settings: Recovery,
    optimizer: torch.optim.Optimizer,
    schedule: CosineLRScheduler,
    stop: StopRequest,
    step: int,
    images: Tensor,
) -> Tensor:
    """One step with images (B, C, H, W) in 0..1. Returns what `losses` returns. Raises what `distill` raises."""
    schedule.step_update(step)
    torch.manual_seed((settings.seed << 32) + step)
    parts = losses(pair, pair.preprocessing.normalize(images))
    loss = parts[0] + settings.feature_weight * parts[1]
    if not loss.isfinite():
        raise InputError(f"the loss became {loss.item()} in step {step}; use a smaller --learning_rate")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if stop.signal is not None:
        raise_signal(stop.signal)
    return parts.detach()


def losses(pair: Pair, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (3,): loss of predictions in nats, distance of features, share of equal predictions."""
    with torch.no_grad(), outputs_of(pair.original, pair.blocks) as wanted:
        target = pair.original(images)
    with outputs_of(pair.shared, pair.blocks) as found:
        logits = pair.shared(images)
    distances = [
        (found[name] - wanted[name]).square().mean() / wanted[name].square().mean().clamp_min(1e-12)
        for name in pair.blocks
    ]
    same = (logits.argmax(1) == target.argmax(1)).float().mean()
    return torch.stack([cross_entropy(logits, target.softmax(1)), torch.stack(distances).mean(), same])


@contextmanager
def outputs_of(model: nn.Module, blocks: Sequence[str]) -> Iterator[Features]:
    """Within this context a forward pass writes the outputs of these blocks into the dict."""
    outputs: Features = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def parameter_groups(model: nn.Module, settings: Recovery) -> list[dict[str, Any]]:
    """Groups for the optimizer: weight decay by timm's rule; gates of extra passes have their own learning rate."""
    no_weight_decay: Any = getattr(model, "no_weight_decay", tuple)
    groups = param_groups_weight_decay(
        model, weight_decay=settings.weight_decay, no_weight_decay_list=tuple(no_weight_decay())
    )
    gates = [p for name, p in model.named_parameters() if name.endswith("pass_gates")]
    places = {id(gate) for gate in gates}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in places]
    own = {"params": gates, "weight_decay": 0.0, "lr": settings.gate_rate * settings.learning_rate}
    return [group for group in [*groups, own] if group["params"]]


def save(
    model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, key: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes the state that `restore` continues from."""
    state = {"key": key, "rows": rows, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(out / STATE, state)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Continues from the state in `out`, if there is one; returns its rows. Raises `InputError` for another run's."""
    if (state := check_state(out, key)) is None:
        return []
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["rows"]


def check_state(out: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The state in `out`; None if there is none. Raises `InputError` for that of another run."""
    if not (out / STATE).exists():
        return None
    state = load_state(out / STATE)
    if state.keys() != {"key", "rows", "model", "optimizer"}:
        raise InputError(f"{out / STATE} is not a state of sret recursify; choose another --out")
    if changed := describe_changes(state["key"], key):
        raise InputError(f"{out} was started with other settings: {first_few(changed)}; choose another --out")
    return state
