"""Measures the time of inference by kind of operation, and the rate of matrix products compared with the fastest one.

    python benchmarks/where.py [--batch-size 16] [MODEL...]

Models of sret are fused. All models run eagerly. Times are those of PyTorch's profiler, in which short kernels take a
little longer than without it.
"""

import argparse
import json
from collections import defaultdict

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sret
from sret.bench.timing import roofline
from sret.version import versions

CALLS = 5
KINDS = {  # by parts of a kernel's name; the first match counts
    "linear layers, bias and GELU within": ("linear_pointwise", "addmm", "aten::mm", "aten::linear"),
    "attention": ("attention", "bmm", "softmax"),
    "convolutions": ("conv",),
    "norms": ("layer_norm", "batch_norm"),
    "GELU, ReLU": ("gelu", "clamp_min", "relu"),
    "sums": ("aten::add", "addcmul", "aten::mul"),
    "copies": ("copy_", "aten::cat", "index_select", "clone"),
}
REST = "dispatch and the rest"
FLOPS_OF = {"addmm": "linear", "mm": "linear", "bmm": "attention", "baddbmm": "attention", "convolution": "conv"}


def seconds_by_kind(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds per call and kind of kernel, without the kernels that a kernel calls."""
    with torch.inference_mode():
        for _ in range(3):
            model(images)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(CALLS):
                model(images)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), REST)
        seconds[kind] += event.self_cpu_time_total * 1e-6 / CALLS
    return seconds


def flops_by_kind(model: nn.Module, image: Tensor) -> dict[str, int]:
    """FLOPs of one image by kind of product; the keys are prefixes of those of `KINDS`."""
    with (
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(image)
    flops: dict[str, int] = defaultdict(int)
    for operator, count in counter.get_flop_counts()["Global"].items():
        flops[FLOPS_OF[str(operator).rpartition(".")[2]]] += count
    return flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["sret_t", "sret_t_unsliced", "deit_tiny_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    rows = []
    print(f"batch {options.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        peak = roofline(torch.device("cpu"), dtype)
        for name in options.models:
            model = timm.create_model(name).eval().requires_grad_(False)
            flops = flops_by_kind(model, torch.randn(1, 3, 224, 224))
            model = sret.fuse(model) if isinstance(model, sret.SReT) else model
            seconds = seconds_by_kind(model.to(dtype), torch.randn(options.batch_size, 3, 224, 224).to(dtype))
            total = sum(seconds.values())
            whole = f"{1e3 * total / options.batch_size:.2f} ms per image"
            print(f"\n{name}, {dtype}: {whole}; roofline {peak / 1e9:.0f} GFLOP/s")
            for kind in (*KINDS, REST):
                count = next((count for start, count in flops.items() if kind.startswith(start)), 0)
                rate = count * options.batch_size / seconds[kind] if count and seconds[kind] else 0.0
                percent = f"{rate / 1e9:6.0f} GFLOP/s, {100 * rate / peak:4.1f} % of the roofline" if rate else ""
                milliseconds = 1e3 * seconds[kind] / options.batch_size
                print(f"  {kind:36} {milliseconds:6.3f} ms {100 * seconds[kind] / total:5.1f} %  {percent}")
                rows.append({"model": name, "dtype": str(dtype), "kind": kind, "ms": milliseconds, "flops": count})
    print(json.dumps({"benchmark": "where", **versions(), "batch_size": options.batch_size, "rows": rows}))


if __name__ == "__main__":
    main()
