"""Metrics of training: how often they are read from the device, and which epoch is the best."""

import pytest
import torch
from accelerate import Accelerator

from sret.data.loading import Unreadable
from sret.signals import StopRequest
from sret.training import metrics
from sret.training.metrics import MetricsBuffer, selection_key


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 50), (0.099, 10), (3.0, 1)])
def test_metrics_are_read_about_once_a_second_and_at_least_every_50_steps(seconds, steps, monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    buffer = MetricsBuffer(Accelerator(cpu=True), Unreadable(0), StopRequest())
    buffer.restart_clock()
    due = []
    for step in range(1, 120):
        now += seconds
        buffer.add(torch.tensor(1.0), torch.tensor(0.5), [])
        if buffer.is_due:
            due.append(step)
            buffer.flush()
    assert due[:3] == [1, 1 + steps, 1 + 2 * steps]


def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss():
    def row(top1: float, loss: float, kind: str = "val") -> dict[str, float]:
        return {f"{kind}_top1": top1, f"{kind}_loss": loss}

    rows = [row(50.0, 1.0), row(60.0, 3.0), row(60.0, 2.0)]
    assert max(rows, key=selection_key) is rows[2]
    rows = [row(60.0, 1.0) | row(40.0, 1.0, "ema"), row(50.0, 1.0) | row(41.0, 2.0, "ema")]
    assert max(rows, key=selection_key) is rows[1]
