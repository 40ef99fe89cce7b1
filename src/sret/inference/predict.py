"""Predicts the classes of images: files, folders and patterns in, labelled probabilities out."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from sret.checkpoints.card import Card
from sret.data.dataset import Samples
from sret.data.image_files import find_image_files, image_suffixes, warn_of_skipped
from sret.data.loading import UNREADABLE, ImageDataset
from sret.data.preprocess import Normalized
from sret.data.workers import worker_options
from sret.errors import InputError
from sret.export.runtime import Exported
from sret.models.sret import SReT


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, (name, probability) from the likeliest down, or why there are none."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def find_images(given: Sequence[str | Path]) -> list[Path]:
    """The image files that files, folders and patterns such as "photos/**/*.jpg" name, each once.

    A folder stands for all image files in it and in its sub-folders, sorted; hidden ones are left out. A file is taken
    whatever its suffix, and a path without a file stays, so that predicting it says what is wrong with it.

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
                raise InputError(f"{path}: a folder without images ({' '.join(sorted(image_suffixes()))})")
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
    model: SReT | Exported,
    card: Card,
    paths: Sequence[Path],
    top_k: int = 5,
    batch_size: int = 1,
    num_workers: int = 0,
) -> Iterator[Prediction]:
    """One prediction per path, in order; a file that is not an image does not stop the rest.

    The model stays on its device and in its precision.

    Args:
        num_workers: processes that load images.

    Raises `InputError` for a model without a classifier, and for one whose outputs are not finite.
    """
    if not model.num_classes:
        raise InputError("this model has no classifier, so that it cannot name what it sees")
    device = next(model.parameters(), torch.empty(0)).device  # an exported model has no parameters
    net = Normalized(model, card.preprocessing)
    images_of = ImageDataset(Samples(paths, [0] * len(paths)), card.preprocessing)
    done = 0
    for images, labels, errors in DataLoader(images_of, batch_size, **worker_options(num_workers)):
        probabilities = net(images.to(device)).float().softmax(dim=1)
        if not probabilities[labels.to(device) != UNREADABLE].isfinite().all():
            raise InputError("the model's outputs are not finite numbers: its weights are damaged")
        values, indices = (t.cpu().tolist() for t in probabilities.topk(min(top_k, model.num_classes)))
        for error in errors:
            names = [card.name_of(label) for label in indices[done % batch_size]]
            classes = tuple(zip(names, values[done % batch_size], strict=True))
            yield Prediction(paths[done], error=error) if error else Prediction(paths[done], classes)
            done += 1
