"""A run that is killed, stopped or out of disk, at any moment: nothing is lost, and it ends with the same bits."""

import errno
import fcntl
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import processes
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import RECIPE

from sret import InputError
from sret.checkpoints.state import load_state
from sret.cli.main import main
from sret.data.loading import TrainDataset
from sret.files import replacing
from sret.signals import StopRequest
from sret.training import loop
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.lock import LOCK, locked
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
from sret.training.config import RuntimeConfig, TrainConfig
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
        train(RECIPE, Path(sys.argv[1]), resume="auto", runtime=RuntimeConfig(save_every=1))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forks:
    """Starts training processes that resume one run, one after the other."""

    def __init__(self, out: Path) -> None:
        command = [sys.executable, "-c", FORKS, str(out)]
        # With as many threads as the undisturbed run: their number decides the order of sums.
        self.starting = processes.started(command, seconds=480, cwd=HERE, stdin=PIPE, stdout=PIPE)

    def __enter__(self) -> "Forks":
        self.process = self.starting.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.starting.__exit__(*raised)

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
def whole(quick_report, tmp_path_factory) -> Path:
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
    out = tmp_path / "run"
    command = command_of(RECIPE, out, "--num_workers", workers, "--save_every", 1)
    # It has a process group of its own, all of which a terminal sends Ctrl-C.
    with processes.started(command, cwd=HERE, stdout=PIPE, stderr=PIPE) as process:
        while not (out / LAST).exists() and process.poll() is None:  # after the first step
            time.sleep(0.01)
        os.killpg(process.pid, kind)
        stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    step = load_state(out / STATE)["step"]
    assert 0 < step < STEPS
    assert f"Stopped and saved at step {step} of 8; --resume auto continues" in stdout
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


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.is_made
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(kind)
            assert stop.signal == kind
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_full_disk_leaves_what_was_saved_before(whole, tmp_path):
    """Files may not grow beyond a limit that weights fit in and the state does not: writing fails in the middle."""
    out = tmp_path / "run"
    train(RECIPE, out, max_steps=3)
    before = (out / STATE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(InputError, match=r"step 4 .*File too large.* --resume auto"):
            train(RECIPE, out, resume="auto", runtime=RuntimeConfig(save_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / STATE).read_bytes() == before
    train(RECIPE, out, resume="auto")
    assert_same(out, whole)


def test_an_unwritable_place_is_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"run: .*Not a directory.* --out"):
        train(RECIPE, tmp_path / "file" / "run")


@contextmanager
def holder(out: Path) -> Iterator[int]:
    """Within this context a process, whose number is yielded, has locked a folder; then it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from sret.training.lock import locked\n"
        "with locked(Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    )
    with processes.started([sys.executable, "-c", code, str(out)], stdout=PIPE) as process:
        process.stdout.readline()
        yield process.pid


def test_a_folder_that_a_run_writes_to_is_refused_and_the_lock_of_a_killed_run_is_not_in_the_way(tmp_path):
    out = tmp_path / "new" / "run"
    with holder(out) as process:
        with pytest.raises(InputError, match=rf"run is in use by process {process} on"):
            train(RECIPE, out)
        assert [path.name for path in out.iterdir()] == [".lock"]
    (out / ".state.pt.0123.tmp").write_text("left by a run that was killed while it wrote")
    with locked(out):
        (out / "file").write_text("")
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        (tmp_path / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it the holder may have ended: the next run makes and locks another file."""
    flock, removed = fcntl.flock, []

    def remove_first(file: int, operation: int) -> None:
        if not removed:
            removed.append(file)
            (tmp_path / LOCK).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(tmp_path), pytest.raises(InputError, match="is in use by process"), locked(tmp_path):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="no data"):
        train(replace(RECIPE, data="nothing"), tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_two_runs_in_one_folder_without_locks_do_not_overwrite_each_other(quick_report, tmp_path, monkeypatch):
    """On a file system that knows no locks: the second run takes the folder over, and the first one sees that."""
    monkeypatch.setattr(loop, "locked", nullcontext)
    out = tmp_path / "run"

    def start_the_other(_: object) -> None:
        if load_state(out / STATE)["step"] == 0:
            train(replace(RECIPE, seed=1), out, max_steps=2)

    with pytest.raises(InputError, match=r"another run has written"):
        train(RECIPE, out, runtime=RuntimeConfig(save_every=1), on_metrics=start_the_other)
    state = load_state(out / STATE)
    assert (state["step"], state["config"]["seed"]) == (2, 1)
    weights = load_file(out / LAST)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in state["ema"].items())


def command_of(recipe: TrainConfig, out: Path, *options: object) -> list[str]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return [sys.executable, "-m", "sret.cli", "train", "--config", str(path), "--out", str(out), *map(str, options)]


def test_a_run_keeps_its_epochs_and_says_how_to_train_further(whole, tmp_path):
    """What the message names works: the weights of the run are those that the next one starts from."""
    for resume in ("auto", None):
        with pytest.raises(
            InputError, match=r"to train its weights further, use --init (\S+) and another --out"
        ) as told:
            train(replace(RECIPE, epochs=3), whole, resume=resume)
    init = re.search(r"--init (\S+)", str(told.value))[1]
    further = replace(RECIPE, epochs=1, init=Path(init), warmup_epochs=0, learning_rate=1e-9)
    last = load_file(train(further, tmp_path / "run").parent / LAST)
    assert all(
        torch.allclose(last[key], tensor, atol=1e-6) for key, tensor in load_file(init).items() if "bn" not in key
    )


@pytest.mark.parametrize(
    "end",
    [
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: os.kill(os.getpid(), signal.SIGBUS),  # shared memory ran out in a write
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),  # or at once: it is a file
    ],
    ids=["killed", "bus error", "full"],
)
def test_a_loading_process_that_ends_is_one_line_and_the_state_is_kept(tmp_path, short_path, monkeypatch, capfd, end):
    monkeypatch.setenv("TMPDIR", str(short_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    fetch = TrainDataset.fetch

    def fetch_or_end(self, index, draw):
        if draw.epoch == 1:
            end()
        return fetch(self, index, draw)

    monkeypatch.setattr(TrainDataset, "fetch", fetch_or_end)
    command = command_of(RECIPE, tmp_path / "run", "--num_workers", 2, "--save_every", 1)
    assert main(command[3:]) == 2
    *others, line = capfd.readouterr().err.replace("\0", "").splitlines()
    expected = (
        "sret: error: a process that loads images was stopped, .*--resume auto continues from the last saved state"
    )
    assert re.fullmatch(expected, line)
    assert all("bus error" in other for other in others)  # a line of torch's
    assert load_state(tmp_path / "run" / STATE)["step"] == 4
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []
    # One folder for the sockets of all processes, which this process removes at its exit.
    assert list(short_path.iterdir()) == [Path(multiprocessing.current_process()._config["tempdir"])]


@pytest.mark.slow
def test_a_run_with_many_loading_processes_ends_soon_after_its_last_line(tmp_path, short_path):
    environment = {**os.environ, "TMPDIR": str(short_path)}
    command = command_of(RECIPE, tmp_path / "run", "--num_workers", 14)
    with processes.started(command, stdout=PIPE, env=environment) as process:
        for line in process.stdout:
            if line.startswith("Validation accuracy"):
                said = time.monotonic()
        process.wait()
    assert process.returncode == 0
    assert time.monotonic() - said < 10  # Python would join the processes one by one, up to 5 s each
    assert list(short_path.iterdir()) == []


@pytest.mark.slow
def test_of_two_runs_started_at_once_one_goes_on_and_the_other_is_refused(whole, tmp_path):
    out = tmp_path / "run"
    with ExitStack() as stack:
        starting = [processes.started(command_of(RECIPE, out), stdout=PIPE, stderr=PIPE) for _ in range(2)]
        both = [stack.enter_context(start) for start in starting]
        errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    refused = errors[[process.returncode for process in both].index(2)]
    # The slower one may start when the other has ended.
    assert re.fullmatch(r"sret: error: \S+ (is in use by process \d+ on|already has a run) .*\n", refused), refused
    assert_same(out, whole)
    assert {path.name for path in out.iterdir()} == set(CONTENTS)


@pytest.mark.slow
def test_a_killed_run_is_resumed_at_once_although_its_loading_processes_end_later(whole, tmp_path):
    out = tmp_path / "run"
    with processes.started(command_of(RECIPE, out, "--num_workers", 2, "--save_every", 1)) as process:
        while not (out / LAST).exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie: its number is in use
        train(RECIPE, out, resume="auto")
    assert_same(out, whole)


def test_sigterm_ends_a_command_and_removes_its_temporary_files(tmp_path: Path, monkeypatch):
    def run(_: object) -> int:
        with replacing(tmp_path / "a"):
            (tmp_path / "b").touch()
            if os.fork() == 0:
                os.kill(os.getpid(), signal.SIGTERM)  # a process that loads images removes nothing
                time.sleep(60)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 128 + signal.SIGTERM
            (tmp_path / "b").rename(tmp_path / "c")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return 0

    monkeypatch.setattr("sret.cli.commands.info.run", run)
    with pytest.raises(SystemExit) as caught:
        main(["info"])
    assert caught.value.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
