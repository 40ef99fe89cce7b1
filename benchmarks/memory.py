"""Measures the peak memory of inference or of a training step, each model in a process of its own.

    python benchmarks/memory.py sret_t deit_tiny_patch16_224 [--train] [--engine fused] [--dtype bfloat16]

The peak is without weights and optimizer state. On a CPU it is what the process grows by during a call (on Linux), on
CUDA what PyTorch allocates. The last line of the output is JSON with the same data.
"""

import argparse
import ctypes
import gc
import json
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from sret.bench.candidates import Source, make_subject
from sret.version import versions

MIB = 2**20
RESET_PEAK = "5"  # written to clear_refs, it sets the peak of the resident memory to the present value


def peak_mib(
    source: Source, engine: str, dtype: str, batch_size: int, size: tuple[int, int] | None, device: str, train: bool
) -> float:
    """MiB of one model, measured in a new process. A function as the source must be at the top of a module."""
    arguments = (source, engine, dtype, batch_size, size, device, train, torch.get_num_threads())
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measure, *arguments).result() / MIB


def _measure(
    source: Source,
    engine: str,
    dtype: str,
    batch_size: int,
    size: tuple[int, int] | None,
    device: str,
    train: bool,
    threads: int,
) -> int:
    torch.set_num_threads(threads)
    subject = make_subject("model", source, batch_size, size, torch.device(device))
    run = (subject.training if train else subject.predicting)(engine, dtype)
    if engine not in ("onnxruntime", "openvino"):  # these keep what the first call allocates
        run()
        run()
    return peak_on_cuda(run, torch.device(device)) if device == "cuda" else peak_in_process(run)


def peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates at most, in addition to those allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_in_process(run: Callable[[], object], calls: int = 3) -> int:
    """Bytes by which this process grows at most during some calls.

    The process must do nothing else: calls can use memory that was freed before without growth. Needs Linux.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: returns free pages to the system
        trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status("VmRSS")
    for _ in range(calls):
        run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes; the kernel writes KiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--train", action="store_true", help="a training step instead of inference")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "models"}
    peaks = {}
    for model in options.models:
        peaks[model] = peak_mib(model, size=None, **settings)
        print(f"{model}: {peaks[model]:,.0f} MiB", flush=True)
    print(json.dumps({"benchmark": "memory", **versions(), **settings, "peak_mib": peaks}))


if __name__ == "__main__":
    main()
