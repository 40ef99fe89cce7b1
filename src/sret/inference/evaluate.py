"""Measures accuracy on labelled images: each counts once, whatever the batch size and the number of processes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from sret.checkpoints.card import Card
from sret.data.dataset import ImageData, Samples
from sret.data.loading import UNREADABLE, ImageDataset, Unreadable
from sret.data.preprocess import Normalized
from sret.data.sources import load_data
from sret.data.workers import worker_options
from sret.errors import InputError, describe_changes, first_few


class StopSignal(Protocol):
    """Says whether this process was asked to stop, as `sret.training.signals.StopRequest` does."""

    @property
    def is_made(self) -> bool: ...


@dataclass(frozen=True)
class Metrics:
    """Accuracies in percent, mean cross-entropy in nats, and how many images they are over."""

    top1: float
    top5: float
    loss: float
    count: int


@dataclass(frozen=True)
class Predictions:
    """What was predicted for each image, in the order of the data, on the CPU.

    Attributes:
        labels: (N,) int64, `UNREADABLE` for an image that could not be read.
        classes: (N,) int64, the likeliest class.
        confidences: (N,) float32, its probability.
    """

    labels: Tensor
    classes: Tensor
    confidences: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on which images.

    Attributes:
        split: the name of the part of `data` that `samples` are.
    """

    metrics: Metrics
    predictions: Predictions
    data: ImageData
    split: str
    samples: Samples


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Sequence[str]]],
    accelerator: Accelerator,
    unreadable: Unreadable,
    stop: StopSignal | None = None,
) -> tuple[Metrics, Predictions] | None:
    """Metrics and predictions, in the precision of the weights, over batches of an `ImageDataset`.

    The model takes images in 0..1 (`Normalized`) and keeps its mode. Images that cannot be read do not count. None if
    a process was asked to stop meanwhile.

    Raises `InputError` if too many images cannot be read, or none can.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, loss, count
    errors: list[str] = []
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # labels, classes, confidences
    is_stopped = False
    for images, labels, problems in batches:
        errors += [problem for problem in problems if problem]
        logits, labels = accelerator.gather_for_metrics((model(images).float(), labels))
        confidences, classes = logits.softmax(dim=1).max(dim=1)
        parts.append((labels.cpu(), classes.cpu(), confidences.cpu()))
        logits, labels = logits[labels != UNREADABLE], labels[labels != UNREADABLE]
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = cross_entropy(logits, labels, reduction="sum")
        batch = [ranked[:, 0].sum(), ranked.any(dim=1).sum(), loss, loss.new_tensor(len(labels))]
        sums += torch.stack([value.float() for value in batch]).cpu().double()
        if stop is not None:
            requests = torch.tensor(float(stop.is_made), device=accelerator.device)
            is_stopped = bool(accelerator.reduce(requests, "sum"))
        if is_stopped:
            break
    model.train(was_training)
    if is_stopped:
        return None
    unreadable.add(gather_object(errors), is_quiet=not accelerator.is_main_process)
    top1, top5, loss, count = sums.tolist()
    if not count:
        raise InputError("none of the images to evaluate on can be read")
    metrics = Metrics(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, count=int(count))
    return metrics, Predictions(*(torch.cat(part) for part in zip(*parts, strict=True)))


def evaluate_on(
    model: nn.Module,
    card: Card,
    data_name: str | None = None,
    split: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    max_corrupt: int = 0,
) -> Evaluation:
    """Evaluates a checkpoint on a data set.

    Args:
        data_name: as `load_data` takes it; by default the data the checkpoint was trained on.
        split: by default "test", "val" where there is none, and "all" of a folder that is not divided and that the
            checkpoint was not trained on.
        max_corrupt: images that may be left out because they cannot be read.

    Raises `InputError` if the data's classes are not the checkpoint's.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    accelerator = Accelerator()  # first: several processes load the data one after the other
    trained_on, known = card.training.get("recipe", {}).get("data"), card.training.get("data", {})
    if data_name is None and trained_on is None:
        raise InputError("this checkpoint does not say what it was trained on; name the images with --data")
    try:
        data = load_data(data_name or trained_on)
    except InputError as error:
        if data_name is not None:
            raise
        raise InputError(
            f"this checkpoint was trained on {trained_on!r}, which is not here; name images with --data ({error})"
        ) from error
    card.check_classes(data.name, data.class_names)
    changed = describe_changes(known, data.fingerprint())
    is_own = not changed or _is_same(data.name, trained_on)
    if is_own and changed and not data.has_splits and split != "all":
        raise InputError(
            f"{data.name} has changed since training ({first_few(changed)}), so that its test images may have been "
            "trained on; evaluate on other images with --data, or on all of these with --split all"
        )
    if split is None:
        is_foreign = not (is_own or data.has_splits)
        split = "all" if is_foreign else "test" if "test" in data.splits else "val"
    samples = data.split(split)
    loader = DataLoader(ImageDataset(samples, card.preprocessing), batch_size, **worker_options(num_workers))
    net, loader = model.to(accelerator.device), accelerator.prepare(loader)
    result = evaluate(Normalized(net, card.preprocessing), loader, accelerator, Unreadable(max_corrupt))
    assert result is not None  # nothing can stop it
    return Evaluation(*result, data, split, samples)


def _is_same(name: str, trained_on: str | None) -> bool:
    return trained_on is not None and (name == trained_on or Path(name).resolve() == Path(trained_on).resolve())
