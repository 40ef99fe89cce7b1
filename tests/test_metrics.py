"""Metrics of training: how often they are read from the device, and which epoch's weights are the best."""

import pytest
import torch
from accelerate import Accelerator

from sret.data.loading import Unreadable
from sret.signals import StopRequest
from sret.training import metrics
from sret.training.metrics import MetricsBuffer, has_stalled, is_best


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


def chosen(accuracies, num_images, name="val"):
    """The number of the epoch whose weights are kept at the end."""
    rows = [{"val_top1": 0.0, f"{name}_top1": accuracy} for accuracy in accuracies]
    return max(i for i in range(len(rows)) if is_best(rows[: i + 1], num_images))


@pytest.mark.parametrize("name", ["val", "ema"])
def test_the_best_weights_are_the_latest_within_a_standard_error_of_the_highest_accuracy(name):
    one = 100 / 216
    assert chosen([100.0, 100 - one, 100 - one, 100 - 2 * one], 216, name) == 2
    assert chosen([50.0, 60.0, 50.0], 20, name) == 2  # a standard error of 11 points
    assert chosen([50.0, 60.0, 50.0], 2000, name) == 1  # of 1 point
    assert chosen([60.0, 58.95, 58.95], 2000, name) == 2
    assert chosen([0.0, 0.0], 9, name) == 1


def test_small_losses_do_not_add_up():
    falling = [70 - 0.4 * i for i in range(9)]  # each within a standard error, 0.46 points, of the one before
    assert chosen(falling, 10000) == 1


def test_a_run_has_stalled_when_neither_accuracy_nor_loss_got_better():
    rows = [{"val_top1": 50.0, "val_loss": loss} for loss in (2.0, 1.0, 1.5, 1.2)]
    assert not has_stalled(rows[:3], 2)
    assert has_stalled(rows, 2)
    assert not has_stalled(rows, 3)
    assert not has_stalled([*rows, {"val_top1": 50.1, "val_loss": 3.0}], 2)
    assert not has_stalled([], 1)
    assert not has_stalled(rows, None)
