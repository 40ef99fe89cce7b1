"""How much memory a step of training takes, measured on one pass of each stage, and what to change if it is too much.

    peak = max over recursions r of  ( kept before r  +  kept by r  +  work of one pass of r )
           + gradients + what the optimizer keeps

    kept by a recursion of R passes:  none: all of R passes     pass: R inputs     nested: fewer inputs
                                      reversible: two streams   truncated:k: all of k passes

None of these numbers is guessed: a thin model of the same parts runs forward and backward, piece by piece, at two batch
sizes, while every tensor that comes into being is counted until it is freed. What kernels take for themselves is not
seen, nor what an allocator leaves between tensors.
"""

import ctypes
import os
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sret.config import ModelConfig
from sret.errors import InputError, InputWarning
from sret.layers import Recursion
from sret.layers.memory import EXACT, Memory
from sret.measure import can_measure_memory, peak_in_process, peak_on_cuda
from sret.model import SReT, Stage
from sret.optim import make_optimizer
from sret.recipe import Launch, TrainConfig
from sret.run import LAST

Precision = Callable[[], AbstractContextManager[Any]]  # such as an accelerator's autocast

FEW, MANY = 2, (8, 32)  # pictures that are tried: of few, weights take the most; BatchNorm needs more than one value
MARGIN = 1.25  # what is recommended fits, be its estimate so much too low
# The words of torch's allocators for Linux and Windows, of C++, of oneDNN, of MPS, of CUDA's libraries.
MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive",
    "out of memory",
    "ALLOC_FAILED",
)


# measured ------------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Within this context the bytes of all tensors made since its beginning: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), is_new=False)  # what was there before, such as a weight whose view is taken
        answer = func(*args, **(kwargs or {}))
        self._note(answer, is_new=True)
        return answer

    def _note(self, tree: Any, is_new: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self._known:
                num_bytes = storage.nbytes() if is_new else 0
                self._known.add(key)
                self.now += num_bytes
                weakref.finalize(storage, self._free, key, num_bytes)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


class Curve(NamedTuple):
    """Bytes as a function of the pictures in a batch: measured ones, and straight lines through neighbours.

    A peak is the largest of several sums, each a line, so that the curve can only bend upwards: the highest line is it.
    """

    batches: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, batch: int) -> float:
        lines = pairwise(zip(self.batches, self.sizes, strict=True))
        return max(y0 + (y1 - y0) * (batch - x0) / (x1 - x0) for (x0, y0), (x1, y1) in lines)


class Piece(NamedTuple):
    """What a piece of a model keeps for backward, its answer included, and the peak of its forward and backward."""

    kept: Curve
    work: Curve


def thinned(model: SReT) -> SReT:
    """A new model with the parts of this one: one block for a stage, one pass for each number of slices, one more.

    `model` may be sharded, compiled or listened to, and is left alone.
    """
    stages = []
    for stage in model.config.stages:
        kinds = tuple(dict.fromkeys(stage.groups))
        stages.append(replace(stage, num_blocks=1, groups=(*kinds, kinds[0])[: stage.num_passes]))
    thin = SReT(replace(model.config, stages=tuple(stages), memory=_leanest(model.config)))
    for name, parameter in thin.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return thin


def measure(thin: SReT, batch: int, autocast: Precision = nullcontext) -> dict[Any, Piece]:
    """The pieces of a model: "stem", (stage, "pool"), (stage, "input"), (stage, kind of memory, slices), "head".

    `batch` is the largest that is tried, if it is not larger than others that tell enough.
    """
    batches = tuple(sorted({FEW, *(min(max(batch, 2 * FEW), many) for many in MANY)}))
    runs = [_run(thin, n, autocast) for n in batches]
    pieces = {key: Piece(*(Curve(batches, y) for y in zip(*(r[key] for r in runs), strict=True))) for key in runs[0]}
    overhead = Curve((0, batches[-1]), (0, _overhead(thin, batches[-1], autocast)))
    return pieces | {"overhead": Piece(overhead, overhead)}


def _overhead(thin: SReT, batch: int, autocast: Precision) -> int:
    """Bytes that a step takes beyond its tensors: on a CPU the gaps that glibc leaves, on a GPU what kernels take."""
    weight = thin.pos_embed.weight

    def step() -> None:
        with autocast():
            y = thin(weight.new_zeros(batch, thin.in_chans, *thin.config.input_size))
        y.backward(torch.ones_like(y))
        thin.zero_grad()

    with Live() as live:
        if weight.is_cuda:
            peak = peak_on_cuda(step, weight.device)
        elif can_measure_memory():
            peak = peak_in_process(step, calls=1)
        else:
            return 0
    return max(0, peak - live.peak)


def _run(thin: SReT, batch: int, autocast: Precision) -> dict[Any, tuple[int, int]]:
    """(bytes kept, bytes at the peak) of each piece."""
    found: dict[Any, tuple[int, int]] = {}
    device = thin.pos_embed.weight.device

    def run(key: Any, piece: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with Live() as live:
            with autocast():
                y = piece(x)
            kept = live.now
            if y.requires_grad:
                y.backward(torch.ones_like(y))
        found[key] = (kept, live.peak)
        thin.zero_grad()
        return y.detach().requires_grad_(y.requires_grad)

    shape = (batch, thin.in_chans, *thin.config.input_size)
    x = run("stem", lambda _: thin.pos_embed(thin.stem(torch.zeros(shape, device=device))), torch.empty(0))
    for i, (stage, (H, W)) in enumerate(zip(thin.stages, thin.config.grids(), strict=True)):
        assert isinstance(stage, Stage)
        x = run((i, "pool"), stage.pool, x)
        x = x.detach().flatten(2).transpose(1, 2).requires_grad_(x.requires_grad)  # (B, N, C)
        found[i, "input"] = (x.nbytes, x.nbytes)
        (recursion,) = stage.recursions
        assert isinstance(recursion, Recursion)
        for j, num_groups in enumerate(recursion.groups):
            one = type(recursion)(recursion.block, (num_groups,), [recursion.projections[j]])
            drawn = thin.permuter(H * W, num_groups, device, is_training=True) if recursion.is_permuted(j) else None
            for kind in ("none", _leanest(thin.config)):
                one.memory = Memory.parse(kind)
                y = run((i, kind, num_groups), lambda x, one=one, drawn=drawn: one(x, [drawn]), x)  # type: ignore[misc]
        x = y.transpose(1, 2).unflatten(2, (H, W)).detach().requires_grad_(y.requires_grad)
    run("head", thin.forward_head, x)
    return found


def _leanest(config: ModelConfig) -> str:
    """The kind of memory that keeps least of one pass."""
    return "reversible" if config.reversible else "nested"


def needed(model: SReT, pieces: Mapping[Any, Piece], policy: str, batch: int) -> float:
    """Bytes that forward and backward of a batch take at their peak, under a policy of memory."""
    memory, lean = Memory.parse(policy), _leanest(model.config)
    held = peak = 0.0

    def step(kept: float, work: float) -> None:
        nonlocal held, peak
        held += kept
        peak = max(peak, held + work)

    def whole(piece: Piece) -> None:
        step(piece.kept(batch), piece.work(batch) - piece.kept(batch))

    whole(pieces["stem"])
    for i, stage in enumerate(model.stages):
        assert isinstance(stage, Stage)
        whole(pieces[i, "pool"])
        for recursion in stage.recursions:
            assert isinstance(recursion, Recursion)
            kind = "none" if memory.kind in ("none", "truncated") else lean
            passes = [pieces[i, kind, num_groups] for num_groups in recursion.groups[-(memory.passes or 0) :]]
            kept = [piece.kept(batch) for piece in passes]
            work = max(piece.work(batch) - piece.kept(batch) for piece in passes)
            if kind == "none":
                step(sum(kept), work)
            elif kind == "reversible":
                step(max(kept), work)
            else:
                size = pieces[i, "input"].kept(batch)
                step(memory.slots(len(passes), int(size), recursion.memory_share) * size, work + max(kept))
    whole(pieces["head"])
    return peak + pieces["overhead"].work(batch)


def state_per_byte(thin: SReT, config: TrainConfig) -> float:
    """Bytes that the optimizer takes in its first step, most of which it keeps, for each byte that is trained."""
    trained = [parameter for parameter in thin.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(thin, config)
    with Live() as live:
        optimizer.step()
    thin.zero_grad()
    return live.peak / sum(parameter.nbytes for parameter in trained)


# there ---------------------------------------------------------------------------------------------------------------


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


# compared ------------------------------------------------------------------------------------------------------------


class Headroom:
    """What a run would take under any policy and batch, and what was free before its first step.

    Args:
        optimizer: as it stands before the first step, fresh or resumed.
        autocast: the context of the run's precision.
        out: the folder of the run.

    Takes a fraction of a second, some memory for a moment, and no random numbers. Raises `InputError` if not even
    that memory is there.
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
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            thin = thinned(model)
            states = 0.0 if optimizer.state else state_per_byte(thin, config)
            self.pieces = self._measure(thin.to(self.device), autocast)
        del thin
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        local = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trained)
        self.states = local * (1 + states)  # gradients, and what the optimizer keeps
        self.free, self.what = free_memory(self.device)  # last: libraries have been loaded meanwhile

    def _measure(self, thin: SReT, autocast: Precision) -> dict[Any, Piece]:
        """With smaller batches where there is little memory."""
        batch = self.batch
        while True:
            try:
                return measure(thin, batch, autocast)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if batch <= 2 * FEW:
                    free, what = free_memory(self.device)
                    raise InputError(
                        f"out of memory before the first step: {_size(free)} {what} are free, which is not enough for "
                        f"a pass of {2 * FEW} pictures; take a smaller model, smaller pictures or more memory"
                    ) from error
            batch = min(batch, MANY[-1]) // 2

    @property
    def batch(self) -> int:
        """Pictures at a time: of one part of a step in one process."""
        return self.config.batch_size // (self.num_ranks * self.launch.accumulation)

    def need(self, policy: str, batch: int) -> float:
        """Bytes of a step beyond those that the process held before the first one."""
        return needed(self.model, self.pieces, policy, batch) + self.states

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
        """Warns of a step that will not fit on a CPU, where systems end a process instead of refusing memory."""
        if self.device.type == "cpu" and self.need(self.model.config.memory, self.batch) > self.free:
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
        room = min(self.free, self.need(now, self.batch)) / MARGIN  # what did not fit is more than there is
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
