"""Compiles every Triton kernel for GPUs that are not here; prints a JSON line for each, with its resources.

Run in a process of its own, since `TRITON_INTERPRET` must not be set:

    python tests/triton_offline.py CAPABILITY DTYPE BC [BC ...]

Launches are recorded instead of run: the code that launches kernels is the one that users run.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelInterface

from sret.kernels.gpu.attention import PackedAttention, attention_residual
from sret.kernels.gpu.mlp import PackedMlp, mlp_residual
from sret.kernels.gpu.rest import whole_pass
from sret.kernels.gpu.slices import INDEXED, Slices

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
Launch = tuple[JITFunction, dict[str, Any]]
# Channels, heads, hidden channels of the MLP and of the projection, tokens: the stages of `sret_t` and `sret_s`.
STAGES = {
    16: (16, 2, 32, 16, 64),
    32: (32, 2, 128, 32, 64),
    64: (64, 2, 230, 64, 784),
    128: (126, 3, 378, 252, 784),
    256: (256, 8, 921, 256, 49),
    512: (504, 12, 1512, 1008, 49),
}


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Kernels do not run within this context; the list receives each launch with its arguments."""
    launches: list[Launch] = []
    original = KernelInterface.__getitem__

    def record(kernel: JITFunction, grid: Any) -> Any:
        return lambda *args, **options: launches.append(
            (kernel, dict(zip(kernel.arg_names, args, strict=False)) | options)
        )

    KernelInterface.__getitem__ = record
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = original


def launches_of_a_pass(channel_block: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of a pass in inference and of one in training, forward and backward."""
    C, H, hidden, last_hidden, N = STAGES[channel_block]
    norm, alpha = nn.LayerNorm(C), torch.ones(1, requires_grad=True)
    attention = PackedAttention.of(norm, nn.Linear(C, 3 * C), nn.Linear(C, C), H, None, dtype)
    mlp, last = (PackedMlp.of(norm, nn.Linear(C, h), nn.Linear(h, C), None, dtype) for h in (hidden, last_hidden))
    x, keep = torch.zeros(2, N, C, requires_grad=True), torch.ones(2)
    slices = Slices(2, INDEXED, torch.arange(N))
    with recorded_launches() as launches:
        with torch.no_grad():
            whole_pass(x.to(dtype), (attention, alpha), slices, (mlp, alpha), (last, alpha))
        mlp_residual(attention_residual(x, attention, slices, alpha, keep), mlp, alpha, keep).sum().backward()
    return launches


def compile_for(capability: int, kernel: JITFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compiles one launch; returns the bytes of stack and of shared memory, registers, and whether it has wgmma."""
    options = {name: arguments.pop(name) for name in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif kernel.params[i].is_constexpr or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "stack": int(found["STACK"]),
        "registers": int(found["REG"]),
        "shared": binary.metadata.shared,
        "wgmma": "wgmma" in binary.asm["ptx"],
    }


def main() -> None:
    capability, dtype, *blocks = sys.argv[1:]
    for block in map(int, blocks):
        for kernel, arguments in launches_of_a_pass(block, getattr(torch, dtype)):
            print(json.dumps({"channels": block, **compile_for(int(capability), kernel, arguments)}), flush=True)


if __name__ == "__main__":
    main()
