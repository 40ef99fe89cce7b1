"""Running out of memory in training: noticed, in part before it happens, and answered with what would fit."""

import ctypes
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sret.config import ModelConfig
from sret.errors import InputError, InputWarning
from sret.footprint import FEW, MANY, Piece, Precision, measure, needed, state_per_byte, thinned
from sret.layers.memory import EXACT, Memory
from sret.model import SReT
from sret.recipe import Launch, TrainConfig
from sret.run import LAST

# What is recommended fits, be its estimate so much too low: glibc leaves gaps that were measured to double small steps.
MARGIN, MARGIN_ON_CPU = 1.25, 2.5
# The words of torch's allocators for Linux and Windows, of C++, of oneDNN, of MPS, of CUDA's libraries.
MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive",
    "out of memory",
    "ALLOC_FAILED",
)


def free_memory(device: torch.device) -> tuple[float, str]:
    """Bytes that this process may still take on a device, and of what."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, "of the GPU's memory"
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    free = [(psutil.virtual_memory().available / sharing, "of the machine's memory")]
    if psutil.LINUX:
        process, trim = psutil.Process(), getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc: free pages go back to the system
            trim(0)
        if (limit := process.rlimit(psutil.RLIMIT_AS)[0]) != psutil.RLIM_INFINITY:
            free.append((limit - process.memory_info().vms, "of the process's address space (ulimit -v)"))
        free += [(left / sharing, "of the control group's memory") for left in cgroups_free()]
    least, what = min(free)
    return max(0.0, least), what


def cgroups_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left in this process's control group and in those above it, as far as they have limits."""
    for line in own.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        old = controllers == "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        group = root / controllers / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and all((folder / file).is_file() for file in names):
                limit, used = ((folder / file).read_text().strip() for file in names)
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                if limit.isdigit():  # not "max"; files read long ago make way
                    yield int(limit) - int(used) + int(stat.get("inactive_file", 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch says that it found no memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in MESSAGES)
    )


def bound(config: ModelConfig, batch: int) -> int:
    """More bytes than the forward of a batch can keep: three times what a plain pass of float32 does."""
    height, width = config.input_size
    numbers = height * width * config.stages[0].embed_dim  # of the stem
    for stage, (rows, columns) in zip(config.stages, config.grids(), strict=True):
        hidden = stage.mlp_ratio + (stage.projection_ratio or 0)
        numbers += round(stage.depth * rows * columns * stage.embed_dim * 3 * (8 + hidden))
    return 4 * batch * numbers


class Headroom:
    """What a run would take under any policy and batch, and what was free before its first step.

    Args:
        optimizer: as it stands before the first step, fresh or resumed.
        autocast: the context of the run's precision.
        out: the folder of the run.
    """

    def __init__(
        self,
        model: SReT,
        optimizer: Optimizer,
        config: TrainConfig,
        launch: Launch,
        num_ranks: int,
        autocast: Precision,
        out: Path,
    ) -> None:
        self.model, self.config, self.launch, self.num_ranks, self.out = model, config, launch, num_ranks, out
        self.device = next(model.parameters()).device
        self.autocast, self.optimizer = autocast, optimizer
        self.free, self.what = free_memory(self.device)

    @cached_property
    def _measured(self) -> tuple[dict[Any, Piece], float]:
        """The pieces of the model, and the bytes of gradients and of what the optimizer has yet to take."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            thin = thinned(self.model)
            states = 0.0 if self.optimizer.state else state_per_byte(thin, self.config)
            pieces = self._measure(thin.to(self.device))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        local = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trained)
        return pieces, local * (1 + states)

    def _measure(self, thin: SReT) -> dict[Any, Piece]:
        """With smaller batches where there is little memory."""
        batch = self.batch
        while True:
            try:
                return measure(thin, batch, self.autocast)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if batch <= 2 * FEW:
                    raise InputError(
                        f"out of memory: {_size(self.free)} {self.what} were free before the first step, and what is "
                        f"left is not enough for a pass of {2 * FEW} pictures; take a smaller model, smaller pictures "
                        "or more memory"
                    ) from error
            batch = min(batch, MANY[-1]) // 2

    @property
    def batch(self) -> int:
        """Pictures at a time: of one part of a step in one process."""
        return self.config.batch_size // (self.num_ranks * self.launch.accumulation)

    def need(self, policy: str, batch: int) -> float:
        """Bytes of a step beyond those that the process held before the first one."""
        pieces, states = self._measured
        return needed(self.model, pieces, policy, batch) + states

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Within this context running out of memory is an `InputError`, which says what would fit."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
            raise InputError(
                f"out of memory: {self._request()} were free before the first step; {self.advice()}; the last saved "
                "state is whole, and --resume auto goes on from it; exact policies and accumulation may change"
            ) from error

    def warn(self) -> None:
        """Warns of a step that will not fit on a CPU, where systems end a process instead of refusing memory.

        Only where it may be: measuring takes as long as a step.
        """
        if self.device.type != "cpu" or bound(self.model.config, self.batch) < self.free:
            return
        if self.need(self.model.config.memory, self.batch) > self.free:
            text = f"{self._request()} are free, so that the system may end the run; {self.advice()}"
            warnings.warn(text, InputWarning, stacklevel=2)

    def _request(self) -> str:
        policy, num_bytes = self.model.config.memory, self.need(self.model.config.memory, self.batch)
        return (
            f"memory {policy!r} with {self.batch} pictures at a time (per process and part of a step) takes about "
            f"{_size(num_bytes)}, and {_size(self.free)} {self.what}"
        )

    def advice(self) -> str:
        """The nearest that would fit, in options of the command line: another policy, or fewer pictures at a time."""
        now = self.model.config.memory
        # The policies that give the same gradients, the fastest first.
        same = ["none", "reversible"] if self.model.config.reversible else ["none", "pass", "nested"]
        policies = same if Memory.parse(now).kind in EXACT else [now]
        margin = MARGIN_ON_CPU if self.device.type == "cpu" else MARGIN
        room = min(self.free, self.need(now, self.batch)) / margin  # what did not fit is more than there is
        for policy in policies:
            if (num_bytes := self.need(policy, self.batch)) <= room:
                return f"--model.memory {policy} would take about {_size(num_bytes)}"

        lean = min([*policies, now], key=lambda policy: self.need(policy, self.batch))
        fewer = self._fewer()
        if fits := {how: size for how, n in fewer.items() if (size := self.need(lean, n)) <= room}:
            by_option: dict[str, str] = {}
            for how, size in fits.items():  # the most pictures of each option come first
                text = f"{how} would take about {_size(size)}"
                by_option.setdefault(how.split()[0], text if lean == now else f"--model.memory {lean} {text}")
            return ", or ".join(by_option.values())
        fewest = min([self.batch, *fewer.values()])
        return (
            f"not even {fewest} at a time would fit, which take about {_size(self.need(lean, fewest))} with memory "
            f"{lean!r}; take a smaller model, smaller pictures or more memory"
        )

    def _fewer(self) -> dict[str, int]:
        """Options that make a batch smaller, those with the most pictures at a time first, and how many these are."""
        batch_size, num_parts = self.config.batch_size, self.num_ranks * self.launch.accumulation
        most = batch_size // (2 * self.num_ranks)  # every part holds pairs of pictures
        parts = [n for n in range(self.launch.accumulation + 1, most + 1) if batch_size % (2 * self.num_ranks * n) == 0]
        fewer = {f"--accumulation {n}": batch_size // (self.num_ranks * n) for n in parts}
        if not (self.out / LAST).exists():  # else a run is begun, whose batch size is decided
            unit = 2 * num_parts if num_parts > 1 else 2 if self.config.mixes else 1
            unit = lcm(unit, self.config.augmentation.repeats)
            sizes = range((batch_size - 1) // unit * unit, 0, -unit)
            fewer |= {f"--batch_size {size}": size // num_parts for size in sizes}
        return fewer


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
