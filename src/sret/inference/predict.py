"""Predicts the classes of images, given as files, folders and patterns, with their probabilities."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from sret.checkpoints.card import Card
from sret.data.dataset import Samples
from sret.data.image_files import find_image_files, image_suffixes, warn_of_skipped
from sret.data.loading import UNREADABLE, ImageDataset, check_batch
from sret.data.workers import worker_options
from sret.elastic import EarlyExit
from sret.errors import InputError


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: the image file.
        classes: (name, probability) of the most probable classes, the most probable first.
        error: why the image could not be read, or empty.
        exit: the number of the exit at which it left, from 1; None for a model without early exit.
    """

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""
    exit: int | None = None


def find_images(given: Sequence[str | Path]) -> list[Path]:
    """Lists the image files of files, folders and patterns such as "photos/**/*.jpg", each once.

    A folder stands for all image files in it and in its sub-folders, sorted; hidden files are skipped. A file may have
    any suffix. A missing file stays in the list, so that its prediction says what is wrong.

    Raises `InputError` for a folder without images and for a pattern without matches.
    """
    found: list[Path] = []
    for name in map(str, given):
        path = Path(name)
        if path.is_dir():
            skipped: Counter[str] = Counter()
            files = find_image_files(path, skipped)
            warn_of_skipped(path, skipped)
            if not files:
                raise InputError(f"{path}: this folder has no images ({' '.join(sorted(image_suffixes()))})")
            found += files
        elif glob.has_magic(name) and not path.exists():
            matches = [p for p in map(Path, sorted(glob.glob(name, recursive=True))) if p.is_file()]
            if not matches:
                raise InputError(f"{name}: no file matches this pattern")
            found += matches
        else:
            found.append(path)
    return list(dict.fromkeys(found))


@torch.inference_mode()
def predict(
    model: nn.Module,
    card: Card,
    paths: Sequence[Path],
    top_k: int = 3,
    batch_size: int = 16,
    num_workers: int = 0,
) -> Iterator[Prediction]:
    """Predicts the classes of image files: one prediction per path, in the same order.

    A file that is not an image gives a prediction with an error. The model stays on its device and in its precision.

    Args:
        model: the model of a weights file, also with early exit, or of an exported file.
        card: of the same file; it has the preprocessing and the class names.
        paths: image files; `find_images` lists those of a folder.
        top_k: number of classes in a prediction.
        batch_size: images per batch.
        num_workers: processes that load images.

    Raises `InputError` for a model without a classifier, and if outputs are not finite.
    """
    if not model.num_classes:
        raise InputError(
            "this model has no classifier; give one with num_classes above 0, or compute features with sret features"
        )
    device = next(model.parameters(), torch.empty(0)).device  # an exported model has no parameters
    check_batch(card.preprocessing, batch_size, len(paths))
    images_of = ImageDataset(Samples(paths, [0] * len(paths)), card.preprocessing)
    done = 0
    for images, labels, errors in DataLoader(images_of, batch_size, **worker_options(num_workers)):
        x = card.preprocessing.normalize(images.to(device))
        logits, exits = model.predict(x) if isinstance(model, EarlyExit) else (model(x), None)
        left = [None] * len(x) if exits is None else (exits + 1).tolist()
        probabilities = logits.float().softmax(dim=1)
        if not probabilities[labels.to(device) != UNREADABLE].isfinite().all():
            raise InputError("the model's outputs are not finite: its weights are damaged")
        values, indices = (t.cpu().tolist() for t in probabilities.topk(min(top_k, card.config.num_classes)))
        for error in errors:
            i = done % batch_size
            classes = tuple(zip(map(card.name_of, indices[i]), values[i], strict=True))
            yield Prediction(paths[done], error=error) if error else Prediction(paths[done], classes, exit=left[i])
            done += 1
