"""Measures accuracy on labelled images; each image counts once, with any batch size and number of processes."""

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
from sret.data.loading import UNREADABLE, ImageDataset, Unreadable, check_batch
from sret.data.preprocess import Normalized
from sret.data.sources import load_data
from sret.data.workers import worker_options
from sret.errors import InputError, describe_changes, first_few


class StopSignal(Protocol):
    """Tells whether this process received a stop signal, such as `sret.signals.StopRequest`."""

    @property
    def is_made(self) -> bool: ...


@dataclass(frozen=True)
class Metrics:
    """The metrics of an evaluation.

    Attributes:
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent.
        loss: mean cross-entropy in nats.
        count: number of images.
    """

    top1: float
    top5: float
    loss: float
    count: int


@dataclass(frozen=True)
class Predictions:
    """The predictions for all images, in the order of the data, on the CPU.

    Attributes:
        labels: (N,) int64, the true class; `UNREADABLE` for an image that could not be read.
        classes: (N,) int64, the predicted class.
        confidences: (N,) float32, the probability of the predicted class.
    """

    labels: Tensor
    classes: Tensor
    confidences: Tensor

    @property
    def count(self) -> int:
        """How many images could be read."""
        return int((self.labels != UNREADABLE).sum())


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        data: the data set.
        split: the split of the data set that was evaluated.
        samples: the images and labels of the split.
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
    """Computes metrics and predictions of a model, in the precision of its weights.

    Args:
        model: takes images in 0..1 (`Normalized`). It is evaluated in evaluation mode, and its mode is restored.
        batches: batches of an `ImageDataset`: images, labels, and error messages of unreadable images, which do not
            count.
        accelerator: gathers the predictions of all processes.
        unreadable: counts unreadable images.
        stop: if it is set during the evaluation, the result is None.

    Raises `InputError` if too many images, or all, are unreadable.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, loss, number of images
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
        raise InputError("none of the images of the evaluation can be read")
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
    """Evaluates a model on a data set: metrics, and the prediction for each image.

    Args:
        model: takes normalised images.
        card: of the model's weights file.
        data_name: as `load_data` takes it; by default the data of the training.
        split: by default "test", or "val" if there is no test split, or "all" for a folder that has no splits and was
            not used for training.
        batch_size: images per batch and process; it does not change the result.
        num_workers: processes that load images.
        max_corrupt: number of unreadable images that may be skipped.

    Raises `InputError` if the classes of the data are not those of the card.
    """
    accelerator = Accelerator()  # before load_data, which several processes call one after the other
    trained_on, known = card.training.get("recipe", {}).get("data"), card.training.get("data", {})
    if data_name is None and trained_on is None:
        raise InputError("this checkpoint does not name its training data; give images with --data")
    try:
        data = load_data(data_name or trained_on)
    except InputError as error:
        if data_name is not None:
            raise
        raise InputError(
            f"the training data of this checkpoint, {trained_on!r}, cannot be loaded ({error}); give images with --data"
        ) from error
    card.check_classes(data.name, data.class_names)
    changed = describe_changes(known, data.fingerprint())
    is_own = not changed or _is_same(data.name, trained_on)
    if is_own and changed and not data.has_splits and split != "all":
        raise InputError(
            f"{data.name} has changed since training ({first_few(changed)}), so its test images may have been training "
            "images; give other images with --data, or use all images with --split all"
        )
    if split is None:
        is_foreign = not (is_own or data.has_splits)
        split = "all" if is_foreign else "test" if "test" in data.splits else "val"
    samples = data.split(split)
    check_batch(card.preprocessing, batch_size, len(samples))
    loader = DataLoader(ImageDataset(samples, card.preprocessing), batch_size, **worker_options(num_workers))
    net, loader = model.to(accelerator.device), accelerator.prepare(loader)
    result = evaluate(Normalized(net, card.preprocessing), loader, accelerator, Unreadable(max_corrupt))
    assert result is not None  # there is no stop signal
    return Evaluation(*result, data, split, samples)


def _is_same(name: str, trained_on: str | None) -> bool:
    return trained_on is not None and (name == trained_on or Path(name).resolve() == Path(trained_on).resolve())
