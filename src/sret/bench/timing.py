"""Instruments: times in alternating rounds, multiply-adds, the roofline of a matrix product, peak memory.

Contenders take turns in one process, so that what slows the machine for a while slows all of them. Their order is drawn
anew for every second round, and reversed in the next: none is favoured by its place. Ratios are taken within rounds.
"""

import copy
import ctypes
import gc
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TURN = 0.02  # seconds that a turn lasts at least
PAUSE = 0.005  # seconds between turns: the threads of some engines wait for work a while, and take a core meanwhile
WARM_UP = 3  # calls
MOST_CALLS = 10_000  # per turn
ROOFLINE_SIDE = {"cpu": 2048, "cuda": 8192}
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # to clear_refs: the peak resident size becomes the present one


def nothing() -> None:
    """What a CPU needs to have finished its work."""


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    synchronise: Callable[[], None] = nothing,
    seed: int = 0,
    turn: float = TURN,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round.

    Args:
        contenders: what is timed, by name.
        rounds: in each of them every contender has one turn; `seed` draws their order.
        synchronise: waits for work that a call has only begun; called once per turn, within the time.
        warm_up: calls of each first, which do not count.
        turn: seconds. Shorter calls are repeated until a turn lasts so long, and their mean is taken.
    """
    calls = {}
    for name, run in contenders.items():
        quickest = min(_turn(run, 1, synchronise) for _ in range(warm_up))
        calls[name] = min(MOST_CALLS, math.ceil(turn / max(quickest, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    generator, order = random.Random(seed), list(contenders)
    for i in range(rounds):
        order = order[::-1] if i % 2 else generator.sample(order, len(order))
        for name in order:
            time.sleep(PAUSE)
            seconds[name].append(_turn(contenders[name], calls[name], synchronise))
    return seconds


def _turn(run: Callable[[], object], calls: int, synchronise: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise()
    return (time.perf_counter() - started) / calls


def ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def spread(times: Sequence[float]) -> float:
    """The interquartile range as a share of the median; 0 for a single round."""
    if len(times) < 2:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / median


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds for one image (1, C, H, W): convolutions, linear layers, attention products."""
    # PyTorch's counter knows attention only in its plain form, and oneDNN's fused products not at all; where parameters
    # have gradients, it stumbles over modules that hand on tuples.
    model = copy.deepcopy(model).requires_grad_(False)
    with (
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(image)
    return counter.get_total_flops() // 2


def roofline(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP/s of the fastest square matrix product found, its side doubled from 256 to `side` (2048; CUDA: 8192)."""
    wait = synchroniser(device)
    most, best = side or ROOFLINE_SIDE[device.type], 0.0
    size = min(256, most)
    while size <= most:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        wait()
        seconds = min(_turn(lambda a=a, b=b: a @ b, 1, wait) for _ in range(5))  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > 1:  # a dtype that the machine has no kernels for
            break
        size *= 2
    return best


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done what it was told."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else nothing


# memory --------------------------------------------------------------------------------------------------------------


def can_measure_memory() -> bool:
    """Whether this system lets a process ask for its own peak since a moment: Linux does."""
    return CLEAR_REFS.exists()


def peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call takes for a while, beyond what is allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_in_process(run: Callable[[], object], calls: int = 3) -> int:
    """Bytes by which this process grows at most while some calls are made.

    Only a process that does nothing else gives a number worth having: what neighbours have freed can be used again
    unseen. Raises `OSError` where the system has no such measure.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: free pages go back to the system
        trim(0)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _status("VmRSS")
    for _ in range(calls):
        run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes; the kernel tells KiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])
