"""Late recursion: training with the first passes only, and with all passes from a share of the steps on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import small_config
from safetensors.torch import load_file
from test_train import RECIPE, STEPS, weights

from sret import InputError, SReT
from sret.layers import Recursion
from sret.training.config import RuntimeConfig
from sret.training.distributed import make_accelerator
from sret.training.loop import train
from sret.training.run_dir import BEST, LAST, METRICS

pytestmark = pytest.mark.usefixtures("quick_report")

LATE = replace(RECIPE, recursion_start=0.6, ema_decay=0.5)
SWITCH = int(0.6 * STEPS)  # in the second of two epochs


def is_of_a_later_pass(name: str) -> bool:
    return ".projections.1." in name


@pytest.mark.parametrize("memory", ["none", "pass", "nested", "truncated:1", "reversible"])
def test_with_one_pass_a_model_is_that_of_one_pass(memory):
    config = small_config(memory=memory, reversible=memory == "reversible")
    model = SReT(config).train()
    short = SReT(replace(config, stages=tuple(replace(s, groups=s.groups[:1]) for s in config.stages))).train()
    short.load_state_dict({k: v for k, v in model.state_dict().items() if not is_of_a_later_pass(k)})
    for module in model.modules():
        if isinstance(module, Recursion):
            module.max_passes = 1
    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for net in (model, short):
        outputs.append(net(images))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, atol=0, rtol=0)
    expected = dict(short.named_parameters())
    for name, parameter in model.named_parameters():
        if is_of_a_later_pass(name):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=0, rtol=0)


def test_later_passes_learn_only_after_the_start(tmp_path: Path):
    states = {}
    for step in (1, SWITCH, SWITCH + 1):
        train(LATE, tmp_path / "run", resume="auto", max_steps=step)
        states[step] = weights(tmp_path / "run")
    assert any(map(is_of_a_later_pass, states[1]))
    for name in states[1]:
        before, at, after = (states[step][name] for step in (1, SWITCH, SWITCH + 1))
        if is_of_a_later_pass(name):
            assert torch.equal(before, at), name
        if name.endswith("fc1.weight"):
            assert not torch.equal(at, after), name


@pytest.mark.parametrize("stops", [[2, SWITCH], [SWITCH - 1, SWITCH + 1]])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, stops):
    train(LATE, tmp_path / "whole")
    for stop in stops:
        train(LATE, tmp_path / "run", resume="auto", max_steps=stop)
    train(LATE, tmp_path / "run", resume="auto")
    for file in (LAST, BEST):
        expected = load_file(tmp_path / "whole" / file)
        assert all(torch.equal(value, expected[key]) for key, value in load_file(tmp_path / "run" / file).items())


def test_no_epoch_before_the_start_is_the_best(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sret.training.loop.is_best", lambda *_: True)  # the first one would be
    assert train(LATE, tmp_path / "run", max_steps=STEPS // 2) == tmp_path / "run" / LAST
    assert not (tmp_path / "run" / BEST).exists()
    monkeypatch.undo()
    assert train(LATE, tmp_path / "run", resume="auto") == tmp_path / "run" / BEST
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_several_processes_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"recursion_start is 0\.6"):
        make_accelerator(LATE, RuntimeConfig(), tmp_path)
