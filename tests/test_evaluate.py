import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from sret import InputError
from sret.data.loading import UNREADABLE, Unreadable
from sret.inference.evaluate import evaluate
from sret.signals import StopRequest


def test_metrics_are_those_of_all_images_at_once():
    logits, labels = torch.randn(37, 8), torch.randint(8, (37,))
    model = nn.Identity().train()
    for batch_size in (1, 10, 37):
        batches = [
            (x, y, [""] * len(y)) for x, y in zip(logits.split(batch_size), labels.split(batch_size), strict=True)
        ]
        metrics, predictions = evaluate(model, batches, Accelerator(), Unreadable(0))
        ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # how many classes are likelier
        assert metrics.count == 37
        assert torch.equal(predictions.labels, labels)
        assert torch.equal(predictions.classes, logits.argmax(1))
        torch.testing.assert_close(predictions.confidences, logits.softmax(1).amax(1))
        assert abs(metrics.top1 - 100 * (ranks == 0).double().mean().item()) < 1e-9
        assert abs(metrics.top5 - 100 * (ranks < 5).double().mean().item()) < 1e-9
        assert metrics.top1 < metrics.top5 < 100
        torch.testing.assert_close(metrics.loss, cross_entropy(logits.double(), labels).item(), atol=1e-6, rtol=0)
        assert model.training


def test_a_stop_ends_it_without_a_number():
    batches = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), [""] * 4)] * 2
    stop = StopRequest()
    assert evaluate(nn.Identity(), batches, Accelerator(), Unreadable(0), stop) is not None
    stop.signal = signal.SIGTERM
    assert evaluate(nn.Identity(), batches, Accelerator(), Unreadable(0), stop) is None


def test_images_that_cannot_be_read_do_not_count():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, UNREADABLE, 2, UNREADABLE, 0])
    errors = ["", "", "c: bad", "", "e: bad", ""]
    read = labels != UNREADABLE
    with pytest.warns(UserWarning, match="c: bad; skipped"):
        metrics, predictions = evaluate(nn.Identity(), [(logits, labels, errors)], Accelerator(), Unreadable(2))
    assert torch.equal(predictions.labels, labels)
    assert metrics == evaluate(nn.Identity(), [(logits[read], labels[read], [""])], Accelerator(), Unreadable(0))[0]
    with pytest.raises(InputError, match="more images than max_corrupt 1"):
        evaluate(nn.Identity(), [(logits, labels, errors)], Accelerator(), Unreadable(1))
    with pytest.raises(InputError, match="none of the images"):
        evaluate(nn.Identity(), [(logits[:1], labels[2:3], [""])], Accelerator(), Unreadable(0))
