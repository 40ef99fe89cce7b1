"""Predicts the classes of images: image files in, labelled probabilities out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sret.checkpoints.card import Card
from sret.errors import InputError
from sret.export.runtime import Exported
from sret.models.sret import SReT


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, (name, probability) from the likeliest down, or why there are none."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


@torch.inference_mode()
def predict(model: SReT | Exported, card: Card, paths: Sequence[Path], top_k: int = 5) -> Iterator[Prediction]:
    """One prediction per path, in order, one image at a time; a file that is no image does not stop the rest."""
    if not model.num_classes:
        raise InputError("this model has no classifier, so that it cannot name what it sees")
    transform = card.preprocessing.transform()
    device = next(model.parameters(), torch.empty(0)).device  # an exported model has no parameters
    for path in paths:
        try:
            x = transform(card.preprocessing.load(path)).unsqueeze(0)
        except InputError as error:
            yield Prediction(path, error=str(error))
            continue
        probabilities = model(card.preprocessing.normalize(x.to(device))).float().softmax(dim=1)[0]
        top = probabilities.topk(min(top_k, len(probabilities)))
        names = [card.name_of(label) for label in top.indices.tolist()]
        yield Prediction(path, tuple(zip(names, top.values.tolist(), strict=True)))
