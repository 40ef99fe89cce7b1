"""Accuracy on labelled pictures: every picture counted once, whatever the batch size and the number of processes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Metrics:
    """Accuracies in percent, mean cross-entropy in nats, and how many pictures they are over."""

    top1: float
    top5: float
    loss: float
    count: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator) -> Metrics:
    """Metrics of a prepared model over prepared batches; the model is left in the mode it came in."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, loss, count
    for images, labels in batches:
        logits, labels = accelerator.gather_for_metrics((model(images).float(), labels))
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = cross_entropy(logits, labels, reduction="sum")
        batch = [ranked[:, 0].sum(), ranked.any(dim=1).sum(), loss, torch.tensor(len(labels))]
        sums += torch.stack([value.double().cpu() for value in batch])
    model.train(was_training)
    top1, top5, loss, count = sums.tolist()
    return Metrics(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, count=int(count))
