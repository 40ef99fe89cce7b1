"""Two processes compute what one computes: DDP and sharded, recomputed or not, and resumed from one to the other."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from two_processes import LAYOUTS, RECIPE, STEPS, recipe_of, write_images

from sret.checkpoints.state import load_state
from sret.training.distillation.config import Distillation
from sret.training.distillation.precompute import write_soft_labels
from sret.training.distillation.soft_labels import shard_path
from sret.training.distributed import SyncBatchNorm, synchronize_batch_norm
from sret.training.loop import train
from sret.training.run_dir import BEST, LAST, STATE

HERE = Path(__file__).parent
# One group, so that xdist runs `runs` once.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_report")]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ON_CPUS = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run([*TORCHRUN, *map(str, arguments)], seconds=480, env=ON_CPUS, cwd=HERE)


@pytest.fixture(scope="module")
def runs(quick_report, tmp_path_factory) -> Path:
    """What two processes left, some of it begun by one."""
    out = tmp_path_factory.mktemp("two")
    images = write_images(out / "images")
    for name in ("adam_sharded", "adam_ddp"):
        train(recipe_of("adam", images), out / name, max_steps=2)
    result = launch(HERE / "two_processes.py", out)
    assert result.returncode == 0, result.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_compute_what_one_does(runs, tmp_path, name):
    """Weights and statistics of BatchNorm after 5 steps, on the same images, mixed the same; and their average."""
    recipe = recipe_of(name, runs / "images")
    train(recipe, tmp_path / "one", max_steps=STEPS)
    one, two = load_state(tmp_path / "one" / STATE), load_state(runs / name / STATE)
    tolerance = 1e-3 if name.endswith("bf16") else 1e-6  # bf16 has 8 bits: sums in another order differ by that much
    for part in ("model", "ema"):
        torch.testing.assert_close(two[part], one[part], atol=tolerance, rtol=0)
    assert two["sums"]["loss"] == pytest.approx(one["sums"]["loss"], rel=10 * tolerance)
    rows = [{k: v for k, v in state["rows"][0].items() if k != "images_per_second"} for state in (one, two)]
    assert rows[1] == pytest.approx(rows[0], rel=10 * tolerance, abs=1 if name.endswith("bf16") else 1e-6)
    start = tmp_path / "start"
    train(replace(recipe, learning_rate=1e-12), start, max_steps=1)
    moved = load_file(start / LAST)["head.weight"] - one["model"]["head.weight"]
    assert moved.abs().max() > 1e-3  # the comparison is of something


@pytest.mark.parametrize("name", ["adam_sharded", "adam_ddp"])
def test_a_run_goes_on_under_another_layout(runs, tmp_path, name):
    """Two steps in one process, one in two, one sharded (or not), and the last in one process again."""
    assert load_state(runs / name / STATE)["step"] == 4
    adam = recipe_of("adam", runs / "images")
    train(adam, runs / name, resume="auto", max_steps=STEPS)
    train(adam, tmp_path / "one", max_steps=STEPS)
    one, two = (load_state(folder / STATE) for folder in (tmp_path / "one", runs / name))
    torch.testing.assert_close(two["model"], one["model"], atol=1e-5, rtol=0)
    assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()


def test_one_process_goes_on_with_what_shards_left(runs, tmp_path):
    recipe = recipe_of("back", runs / "images")
    train(recipe, runs / "back", resume="auto", max_steps=STEPS)
    train(recipe, tmp_path / "one", max_steps=STEPS)
    one, two = (load_state(folder / STATE) for folder in (tmp_path / "one", runs / "back"))
    torch.testing.assert_close(two["model"], one["model"], atol=1e-6, rtol=0)


def test_two_processes_share_the_labelling(runs, tmp_path):
    teacher = Distillation(teacher=str(runs / "ddp" / BEST))
    list(write_soft_labels(tmp_path / "one", "digits", teacher, crops=1))
    for shard in range(2):
        one, two = (load_file(shard_path(folder, shard)) for folder in (tmp_path / "one", runs / "labels"))
        assert all(torch.equal(two[name], one[name]) for name in ("crops", "flips", "classes"))
        torch.testing.assert_close(two["probabilities"], one["probabilities"])


@pytest.mark.parametrize("shard", ["true", "false"])
def test_a_signal_to_one_process_stops_both(tmp_path, shard):
    """Both save, and both end as the signal has it; the run goes on in one process."""
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE.to_dict(), "epochs": 50}))
    command = ["-m", "sret.cli", "train", "--config", recipe, "--out", out, "--fsdp", shard, "--save_every", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with processes.started([*TORCHRUN, *map(str, command)], env=ON_CPUS, cwd=HERE, **pipes) as torchrun:
        while not (out / LAST).exists() and torchrun.poll() is None:
            time.sleep(0.05)
        workers = psutil.Process(torchrun.pid).children()
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGTERM)
        stdout, stderr = torchrun.communicate()
    assert stdout.count("Stopped and saved at step") == 1, stderr[-2000:]
    assert "Validation accuracy" not in stdout
    assert "exitcode  : 143" in stderr
    assert load_state(out / STATE)["step"] > 0


def test_a_disk_that_is_full_for_one_process_ends_both_with_its_error(tmp_path):
    out = tmp_path / "file" / "run"
    (tmp_path / "file").write_text("x")
    result = launch("-m", "sret.cli", "train", "--config", HERE.parent / "recipes" / "digits.yaml", "--out", out)
    assert result.stderr.count("sret: error") == 2
    assert result.stderr.count("run: cannot be written to (Not a directory)") == 2


def test_batch_norm_is_replaced_with_all_it_knows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    model(torch.randn(5, 3, 8, 8))
    model[2].requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model.eval()(torch.ones(1, 3, 8, 8))
    synchronize_batch_norm(model)
    assert isinstance(model[1], SyncBatchNorm)
    assert isinstance(model[2][0], SyncBatchNorm)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert torch.equal(model(torch.ones(1, 3, 8, 8)), expected)
    assert [parameter.requires_grad for parameter in model[2].parameters()] == [False, False]
