"""What only a GPU can show: the same answers as a CPU, and training in every precision."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from test_memory import gradients
from test_train import RECIPE

from sret import SReT
from sret.checkpoints.state import load_state
from sret.models.fuse import fuse
from sret.training.config import RuntimeConfig
from sret.training.loop import train
from sret.training.run_dir import METRICS, STATE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_a_gpu_answers_as_a_cpu_does(permutation):
    model, images = SReT(small_config(permutation=permutation)).eval(), torch.randn(3, 3, 64, 80)
    expected = model(images).detach()
    for net in (model.cuda(), fuse(model)):
        with torch.no_grad():
            torch.testing.assert_close(net(images.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory", ["none", "nested"])
def test_compiled_passes_train_as_plain_ones(tmp_path: Path, memory):
    recipe = replace(RECIPE, epochs=2, optimizer="sgd", learning_rate=1e-2, model=replace(RECIPE.model, memory=memory))
    states = []
    for name, runtime in (("plain", RuntimeConfig()), ("compiled", RuntimeConfig(compile=True))):
        train(recipe, tmp_path / name, max_steps=3, runtime=runtime)
        states.append(load_state(tmp_path / name / STATE)["model"])
    torch.testing.assert_close(states[1], states[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", ["pass", "nested", "reversible"])
def test_gradients_are_those_of_no_policy(policy):
    config = small_config(drop_path_rate=0.4, reversible=policy == "reversible")
    model, images = SReT(config).cuda().double().train(), torch.randn(4, 3, 64, 80).cuda().double()
    expected, *_ = gradients(model, "none", images)
    found, *_ = gradients(model, policy, images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("runtime", [RuntimeConfig(), RuntimeConfig(grad_accum_steps=2, num_workers=2)])
def test_every_precision_trains_and_resumes(tmp_path: Path, mixed_precision, runtime):
    recipe = replace(RECIPE, epochs=6, mixed_precision=mixed_precision, mixup=0.2, cutmix=1.0, ema_decay=0.9)
    train(recipe, tmp_path, max_steps=9, runtime=runtime)
    assert (load_state(tmp_path / STATE)["scaler"] is not None) == (mixed_precision == "fp16")
    train(recipe, tmp_path, resume="auto", runtime=runtime)
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 7))
    assert rows[-1]["val_loss"] < 0.95 * rows[0]["val_loss"]
