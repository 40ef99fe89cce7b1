import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from sret.evaluate import evaluate


def test_metrics_are_those_of_all_pictures_at_once():
    logits, labels = torch.randn(37, 8), torch.randint(8, (37,))
    model = nn.Identity().train()
    for batch_size in (1, 10, 37):
        batches = list(zip(logits.split(batch_size), labels.split(batch_size), strict=True))
        metrics = evaluate(model, batches, Accelerator())
        ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # how many classes are likelier
        assert metrics.count == 37
        assert abs(metrics.top1 - 100 * (ranks == 0).double().mean().item()) < 1e-9
        assert abs(metrics.top5 - 100 * (ranks < 5).double().mean().item()) < 1e-9
        assert metrics.top1 < metrics.top5 < 100
        torch.testing.assert_close(metrics.loss, cross_entropy(logits.double(), labels).item(), atol=1e-6, rtol=0)
        assert model.training
