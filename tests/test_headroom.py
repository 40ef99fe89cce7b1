"""Running out of memory: what is estimated is what a step takes, and what is advised fits."""

import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config

from sret import InputError, ModelConfig, SReT, StageConfig
from sret.checkpoint import load_state
from sret.errors import InputWarning
from sret.footprint import Live, measure, needed, thinned
from sret.headroom import MARGIN_ON_CPU, Headroom, bound, cgroups_free
from sret.optim import make_optimizer
from sret.recipe import Launch, TrainConfig
from sret.run import LAST, STATE

DEEP = ModelConfig(
    stages=(
        StageConfig(embed_dim=16, num_heads=1, num_blocks=1, groups=(1,) * 6, projection_ratio=0.25),
        StageConfig(embed_dim=32, num_heads=2, num_blocks=2, groups=(1,) * 12, projection_ratio=0.25),
    ),
    img_size=16,
    stem_stride=2,
    num_classes=10,
    in_chans=1,
)
REVERSIBLE = replace(DEEP, reversible=True)


def counted(model: SReT, batch: int) -> int:
    """Bytes of the tensors of one whole step at its peak: the slow oracle."""
    with Live() as live:
        y = model(torch.zeros(batch, model.in_chans, *model.config.input_size))
        y.backward(torch.ones_like(y))
    model.zero_grad()
    return live.peak


def headroom_of(tmp_path: Path, config: ModelConfig = DEEP, accumulation: int = 1, **recipe: object) -> Headroom:
    model = SReT(config)
    wanted = TrainConfig(**{"model": config, "batch_size": 96, **recipe})
    launch = Launch(accumulation=accumulation)
    return Headroom(model, make_optimizer(model, wanted), wanted, launch, 1, torch.enable_grad, tmp_path)


@pytest.mark.parametrize("config", [DEEP, REVERSIBLE, small_config()], ids=["deep", "reversible", "sliced"])
def test_the_estimate_is_what_a_whole_step_takes(config):
    model, batch = SReT(config), 24
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    pieces = measure(thinned(model), batch)
    policies = ["none", "reversible"] if config.reversible else ["none", "pass", "nested", "truncated:1"]
    for policy in policies:
        model.set_memory(policy)
        estimate = needed(model, pieces, policy, batch)
        # Gradients come while what forward kept goes: of a small batch they are a part of the peak, of a large one not.
        assert 0.85 * (counted(model, batch) - gradients) < estimate, policy
        assert estimate < 1.15 * counted(model, batch), policy


def test_leaner_policies_take_less_and_more_pictures_more():
    model = SReT(DEEP)
    pieces = measure(thinned(model), 32)
    for batch in (8, 32, 200):
        sizes = [needed(model, pieces, policy, batch) for policy in ("none", "pass", "nested")]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 2 * sizes[2]
    assert needed(model, pieces, "nested", 200) > needed(model, pieces, "nested", 100)


@pytest.mark.parametrize("config", [DEEP, REVERSIBLE, small_config()], ids=["deep", "reversible", "sliced"])
def test_the_bound_is_one(config):
    model = SReT(config)
    assert bound(config, 24) > needed(model, measure(thinned(model), 24), "none", 24)


def test_a_tensor_is_counted_once_and_until_it_is_freed():
    weight = torch.zeros(1000)
    with Live() as live:
        view = weight.view(10, 100).T  # no new memory
        x = weight + 1
        y = x[::2]  # keeps all of x
        assert (live.now, live.peak) == (4000, 4000)
        del x
        assert live.now == 4000
        del y
        assert live.now == 0
        assert view.shape == (100, 10)
    assert live.peak == 4000


def test_measuring_leaves_model_and_dice_alone(tmp_path):
    config = small_config(drop_path_rate=0.5)
    model = SReT(config)
    before, dice = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    permuter = model.permuter.state_dict()
    recipe = TrainConfig(model=config)
    Headroom(model, make_optimizer(model, recipe), recipe, Launch(), 1, torch.enable_grad, tmp_path).need("none", 8)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), dice)
    assert model.permuter.state_dict() == permuter
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_fastest_policy_that_fits_is_advised(tmp_path):
    headroom = headroom_of(tmp_path)
    for policy in ("pass", "nested"):
        headroom.free = 1.01 * MARGIN_ON_CPU * headroom.need(policy, 96)
        assert headroom.advice().startswith(f"--model.memory {policy} would take about ")
    headroom = headroom_of(tmp_path, REVERSIBLE)
    headroom.free = 1.01 * MARGIN_ON_CPU * headroom.need("reversible", 96)
    assert headroom.advice().startswith("--model.memory reversible would take about ")


def test_what_ran_out_of_memory_is_not_advised_although_it_was_thought_to_fit(tmp_path):
    headroom = headroom_of(tmp_path)
    headroom.free = 1e15
    assert headroom.advice().startswith("--model.memory pass ")


def test_a_smaller_batch_is_advised_where_no_policy_fits(tmp_path):
    headroom = headroom_of(tmp_path, accumulation=2)  # 48 pictures at a time
    headroom.free = 1.01 * MARGIN_ON_CPU * headroom.need("nested", 16)
    text = headroom.advice()
    assert text.startswith("--model.memory nested --accumulation 6 would take about ")  # 16 at a time
    assert ", or --model.memory nested --batch_size 32 would take about " in text
    (tmp_path / LAST).touch()  # now a run is begun, and the batch size decided
    assert "--accumulation 6" in headroom.advice()
    assert "batch_size" not in headroom.advice()


def test_an_odd_batch_cannot_be_divided(tmp_path):
    headroom = headroom_of(tmp_path, batch_size=35)
    headroom.free = 1.01 * MARGIN_ON_CPU * headroom.need("nested", 11)
    assert headroom.advice().startswith("--model.memory nested --batch_size 11 would take about ")


def test_truncation_is_not_exchanged_for_another_gradient(tmp_path):
    headroom = headroom_of(tmp_path, replace(DEEP, memory="truncated:4"))
    headroom.free = 1.01 * MARGIN_ON_CPU * headroom.need("truncated:4", 16)
    assert headroom.advice().startswith("--accumulation 6 would take about ")


def test_where_nothing_fits_it_is_said(tmp_path):
    headroom = headroom_of(tmp_path)
    headroom.free = 1000.0
    assert headroom.advice().startswith("not even 1 at a time would fit, which take about ")
    assert "memory 'nested'; take a smaller model" in headroom.advice()


def test_a_step_that_cannot_fit_is_warned_of_before_it_is_made(tmp_path, recwarn):
    headroom = headroom_of(tmp_path)
    headroom.free = 1.01 * MARGIN_ON_CPU * headroom.need("nested", 96)
    with pytest.warns(InputWarning, match=r"memory 'none' with 96 pictures .*; --model.memory nested would take"):
        headroom.warn()
    recwarn.clear()
    headroom.free = 1.01 * headroom.need("none", 96)
    headroom.warn()
    assert not recwarn.list


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_running_out_of_memory_becomes_one_line(tmp_path, error):
    headroom = headroom_of(tmp_path)
    pattern = r"out of memory: .*'none' with 96 .*--model.memory .*--resume auto"
    with pytest.raises(InputError, match=pattern) as caught, headroom.guard():
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another"), headroom.guard():
        raise RuntimeError("another")


def test_the_error_does_not_hold_the_tensors_of_the_step(tmp_path):
    held = []

    def step() -> None:
        x = torch.zeros(10)
        held.append(weakref.ref(x))
        raise MemoryError

    with pytest.raises(InputError) as caught, headroom_of(tmp_path).guard():
        step()
    assert caught.value.__cause__ is not None
    assert held[0]() is None


def test_the_limits_of_all_control_groups_count(tmp_path):
    def group(name: str, **files: object) -> None:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file, text in {"memory.stat": "anon 5\ninactive_file 30", **files}.items():
            (tmp_path / name / file).write_text(f"{text}\n")

    own = tmp_path / "own"
    own.write_text("0::/a/b\n3:cpu:/x\n")
    group("a/b", **{"memory.max": "max", "memory.current": 100})
    group("a", **{"memory.max": 1000, "memory.current": 130})
    assert list(cgroups_free(tmp_path, own)) == [900]
    own.write_text("4:memory:/x\n")  # version 1; in a container x is not to be seen, and its own group is the root
    group("memory", **{"memory.limit_in_bytes": 500, "memory.usage_in_bytes": 400})
    assert list(cgroups_free(tmp_path, own)) == [130]


RUN = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import psutil
from sret.augment import Augmentation
from sret.deep import deep_config
from sret.recipe import Launch, TrainConfig
from sret.train import train

out, memory, accumulation = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = deep_config(
    layers=20, max_parameters=2_500_000, embed_dim=32, img_size=32, stem_stride=4, num_classes=10, in_chans=1
)
def recipe(memory):
    return TrainConfig(model=replace(model, memory=memory), batch_size=576,
                       augmentation=Augmentation(geometry="none", flip=False))

train(recipe("none"), out / memory, max_steps=1, launch=Launch(accumulation=72))  # libraries are loaded
limit = psutil.Process().memory_info().vms + 300 * 2**20  # much more than a thread's arena takes
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    train(recipe(memory), out / "run", "auto", 1, Launch(accumulation=accumulation))
except ValueError as error:
    sys.exit(str(error))
"""


def run_with_little_memory(out: Path, memory: str, accumulation: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(out), memory, str(accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space are Linux's")
def test_under_a_limit_training_names_what_fits_and_that_trains(tmp_path):
    failed = run_with_little_memory(tmp_path, "none")
    assert failed.returncode == 1
    (message,) = failed.stderr.splitlines()
    assert message.startswith("out of memory: memory 'none' with 576 pictures at a time ")
    assert "of the process's address space (ulimit -v) were free" in message
    assert load_state(tmp_path / "run" / STATE)["step"] == 0
    advice = re.search(r"; --model\.memory (\w+)(?: --accumulation (\d+))? would take", message)
    assert advice, message
    done = run_with_little_memory(tmp_path, advice[1], int(advice[2] or 1))
    assert done.returncode == 0, (message, done.stderr)
    assert load_state(tmp_path / "run" / STATE)["step"] == 1
