"""A run that is killed, stopped or out of disk, at any moment: nothing is lost, and it ends with the same bits."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import RECIPE

from sret import InputError
from sret.checkpoints.card import load_state
from sret.training.config import Launch
from sret.training.loop import train
from sret.training.run_dir import CONTENTS, LAST, STATE

HERE = Path(__file__).parent
RECIPE = replace(RECIPE, ema_decay=0.9, mixup=0.8)
STEPS = 8

# One process imports everything once and forks the processes that train; it has computed nothing itself. A line of
# input starts one, to be killed in the middle of its n-th write (0: never). It prints its number, and how it ended.
FORKS = """
import os, signal, sys
from pathlib import Path
from test_interruption import RECIPE
from sret.training.config import Launch
from sret.training.loop import train

fsync, writes = os.fsync, 0

def fsync_or_die(file):
    global writes
    writes += 1
    if writes == last_write:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)

for line in sys.stdin:
    last_write = int(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.fsync = fsync_or_die
        train(RECIPE, Path(sys.argv[1]), resume="auto", launch=Launch(save_every=1))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forks:
    """Starts training processes that resume one run, one after the other."""

    def __init__(self, out: Path) -> None:
        command = [sys.executable, "-c", FORKS, str(out)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # With as many threads as the undisturbed run: their number decides the order of sums.
        self.process = subprocess.Popen(command, cwd=HERE, **pipes)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(self, last_write: int = 0, seconds: float | None = None) -> bool:
        """Whether the run got through before it was killed, in its n-th write or after so many seconds."""
        self.process.stdin.write(f"{last_write}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # if it has ended already, its number is not yet free
        status = int(self.process.stdout.readline())
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        return status == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(RECIPE, out)
    assert load_state(out / STATE)["step"] == STEPS
    return out


def assert_same(out: Path, whole: Path) -> None:
    expected = load_file(whole / LAST)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(out / LAST).items())
    states = [load_state(folder / STATE) for folder in (out, whole)]
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, states[1][part][key]) for key, tensor in states[0][part].items())


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(whole, tmp_path):
    """SIGKILL after random times and in random writes of a save, until a run gets through."""
    out, dice, kills = tmp_path / "run", random.Random(0), 0
    with Forks(out) as forks:
        while True:
            is_in_save = kills % 2 == 1
            moment = {"last_write": dice.randint(1, 9)} if is_in_save else {"seconds": dice.uniform(0.1, 0.8)}
            if forks.run(**(moment if kills < 14 else {})):
                break
            kills += 1
            if (out / STATE).exists():
                load_state(out / STATE)  # whole at every moment
    assert kills > 3
    assert_same(out, whole)
    assert {path.name for path in out.iterdir()} == set(CONTENTS)


@pytest.mark.slow
def test_a_run_killed_in_each_write_of_its_first_saves_ends_with_the_same_bits(whole, tmp_path):
    """The first save writes the state; the next ones the last weights and the metrics before it."""
    with Forks(tmp_path / "run") as forks:
        for write in (1, 2, 3, 1, 4, 2):
            assert not forks.run(last_write=write)
        assert forks.run()
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_finishes_the_step_and_saves(whole, tmp_path, kind, code, workers):
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE.to_dict()))
    command = [sys.executable, "-m", "sret.cli", "train", "--config", str(recipe), "--out", str(out)]
    command += ["--num_workers", str(workers), "--save_every", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A process group of its own, all of which a terminal sends Ctrl-C.
    with subprocess.Popen(command, cwd=HERE, start_new_session=True, **pipes) as process:
        while not (out / LAST).exists() and process.poll() is None:  # after the first step
            time.sleep(0.01)
        os.killpg(process.pid, kind)
        stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    step = load_state(out / STATE)["step"]
    assert 0 < step < STEPS
    assert f"Stopped and saved at step {step} of 8; --resume auto goes on" in stdout
    train(RECIPE, out, resume="auto")
    assert_same(out, whole)


def test_a_stop_before_the_evaluation_of_an_epoch_does_not_skip_it(whole, tmp_path, monkeypatch):
    """A signal in the last step of an epoch: saved at once, and the resumed run evaluates first."""
    from sret.training import optim

    def interrupt_after(steps: int):
        update = optim.ModelEmaV3.update

        def updating(self, model, step):
            update(self, model, step)
            if step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

        return updating

    for steps in (4, 8):
        with monkeypatch.context() as patch:
            patch.setattr(optim.ModelEmaV3, "update", interrupt_after(steps))
            with pytest.raises(SystemExit) as stopped:
                train(RECIPE, tmp_path / "run", resume="auto")
        assert stopped.value.code == 143
        state = load_state(tmp_path / "run" / STATE)
        assert (state["step"], len(state["rows"])) == (steps, steps // 4 - 1)
    train(RECIPE, tmp_path / "run", resume="auto")
    assert len(load_state(tmp_path / "run" / STATE)["rows"]) == 2
    assert_same(tmp_path / "run", whole)


def test_a_full_disk_leaves_what_was_saved_before(whole, tmp_path):
    """Files may not grow beyond a limit that weights fit in and the state does not: writing fails in the middle."""
    out = tmp_path / "run"
    train(RECIPE, out, max_steps=3)
    before = (out / STATE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(InputError, match=r"state of step 4 could not be saved \(File too large\); what was saved"):
            train(RECIPE, out, resume="auto", launch=Launch(save_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / STATE).read_bytes() == before
    train(RECIPE, out, resume="auto")
    assert_same(out, whole)


def test_an_unwritable_place_is_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"the state of step 0 could not be saved \(Not a directory\); name an --out"):
        train(RECIPE, tmp_path / "file" / "run")
