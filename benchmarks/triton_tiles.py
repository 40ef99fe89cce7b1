"""Times candidates for the tiles of the Triton kernels on this GPU; prints the fastest ones as JSON.

    python benchmarks/triton_tiles.py --seconds 60 --out tiles.json

For each table of `sret.kernels.gpu.tiles` and each channel block, the kernels of a stage of `sret_t` or `sret_s` run
with each candidate, 128 images at a time in bfloat16. Candidates that do not fit, or that give other outputs than the
present tiles, are left out. Several processes compile at the same time, but only one at a time measures. What was
measured when the time is up counts: the present tiles come first, then those that differ in one value. To use the
result, copy `tables` to src/sret/kernels/gpu/tiles.py.

On a CPU, with TRITON_INTERPRET=1 and `--small`, the kernels run with the interpreter's own tiles: that tests this
script, and chooses nothing.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any

import torch
from gpu_speed import DEVICE, IS_CUDA, about, fastest
from torch import Tensor

from sret.kernels.gpu import tiles
from sret.kernels.gpu.dispatch import shared_packing, triton_kernels
from sret.kernels.gpu.tiles import Tiles
from sret.layers import Block, NonLinearProjection
from sret.layers.block import one_pass

TABLES = {"FORWARD": tiles.FORWARD, "BACKWARD": tiles.BACKWARD, "REST": tiles.REST}
# Channels, heads, MLP ratio, projection ratio, tokens, slices: the stages of `sret_t` and the last one of `sret_s`.
STAGES = {
    16: (16, 1, 1.0, 1.0, 16, 1),
    64: (64, 2, 3.6, 1.0, 784, 8),
    128: (128, 4, 3.6, 1.0, 196, 4),
    256: (256, 8, 3.6, 1.0, 49, 1),
    512: (504, 12, 3.0, 2.0, 49, 1),
}
SECONDS = 0.15  # of measuring a candidate
TOLERANCE = 0.05  # of the largest number, against the first candidate
Task = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=min(12, len(os.sched_getaffinity(0))))
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--small", action="store_true", help="few rows and candidates, to try the script on a CPU")
    options = parser.parse_args()
    end = time.time() + options.seconds
    blocks = [16] if options.small else [block for block in STAGES if block > 16]
    tasks = [(table, block) for table in TABLES for block in blocks]
    context = multiprocessing.get_context("spawn")
    lock, rows = context.Lock(), context.Queue()
    waiting = context.Queue()
    for task in tasks:
        waiting.put(task)
    processes = [
        context.Process(target=work, args=(waiting, rows, lock, end, options.small), daemon=True)
        for _ in range(min(options.processes, len(tasks)))
    ]
    for process in processes:
        process.start()
    found = list(collect(rows, processes, end))
    report = {"what": "tiles", **about(), "seconds": options.seconds, "tables": tables(found), "rows": found}
    print(as_text(found))
    text = json.dumps(report)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def collect(rows: Any, processes: list[Any], end: float) -> Iterator[dict[str, Any]]:
    """The rows that the processes put, until the time is up or all have ended."""
    while time.time() < end + 2:
        is_over = not any(process.is_alive() for process in processes)
        while not rows.empty():
            yield rows.get()
        if is_over:
            break
        time.sleep(0.1)
    for process in processes:
        if process.is_alive():
            process.kill()


def work(waiting: Any, rows: Any, lock: Lock, end: float, is_small: bool) -> None:
    """Measures tasks until there are no more, or the time is up."""
    torch.set_num_threads(1)
    while not waiting.empty():
        table, block = waiting.get()
        run, reference = kernels_of(table, block, 1 if is_small else 128), None
        for candidate in candidates(TABLES[table][block], block)[: 2 if is_small else None]:
            if time.time() > end:
                return
            TABLES[table][block] = candidate
            row = {"table": table, "block": block, "tiles": asdict(candidate)}
            try:
                output = run()  # compiles
                reference = output if reference is None else reference
                difference = ((output - reference).abs().max() / reference.abs().max()).item()
                if not difference <= TOLERANCE:
                    raise RuntimeError(f"differs by {difference:.1e} of the largest number")
                with lock:
                    row["ms"] = 1e3 * fastest(run, SECONDS if IS_CUDA else 0)
            except Exception as error:
                row["error"] = " ".join(str(error).split())[:120] or type(error).__name__
            rows.put(row)


def kernels_of(table: str, block: int, batch: int) -> Callable[[], Tensor]:
    """A call that runs the kernels of a table on a stage, and returns what they compute, as float32."""
    C, H, ratio, last_ratio, N, G = STAGES[block]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if IS_CUDA else torch.float32
    shared, projection = Block(C, H, ratio).to(DEVICE, dtype), NonLinearProjection(C, last_ratio).to(DEVICE, dtype)
    x = torch.randn(batch, N, C, device=DEVICE, dtype=dtype)
    if table == "REST":
        shared.eval()

        def rest() -> Tensor:
            with triton_kernels(True), torch.no_grad():
                return one_pass(shared, projection, x, G, None).float()

        return rest
    stream = x.requires_grad_()

    def forward() -> Tensor:
        with triton_kernels(True), shared_packing():
            return one_pass(shared, projection, stream, G, None)

    if table == "FORWARD":
        return lambda: forward().detach().float()
    direction, kept = torch.randn_like(x), forward()

    def backward() -> Tensor:
        inputs = [stream, *shared.parameters(), *projection.parameters()]
        return torch.autograd.grad(kept, inputs, direction, retain_graph=True)[0].float()

    return backward


def candidates(present: Tiles, block: int) -> list[Tiles]:
    """The present tiles, then those with one other value, then those with several; at most 128 KiB of float32 rows."""
    sizes = [
        Tiles(BM, BH, warps, stages)
        for BM in (16, 32, 64, 128)
        for BH in (16, 32, 64)
        for warps in (4, 8)
        for stages in (1, 2, 3)
        if BM * block * 4 <= 128 * 1024
    ]
    return sorted({present, *sizes}, key=lambda candidate: (changes(candidate, present), astuple(candidate)))


def changes(a: Tiles, b: Tiles) -> int:
    """How many values differ."""
    return sum(x != y for x, y in zip(astuple(a), astuple(b), strict=True))


def tables(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, int]]]:
    """The fastest tiles by table and channel block."""
    found: dict[str, dict[int, dict[str, int]]] = {name: {} for name in TABLES}
    for row in sorted((row for row in rows if "ms" in row), key=lambda row: -row["ms"]):
        found[row["table"]][row["block"]] = row["tiles"]
    return {name: dict(sorted(table.items())) for name, table in found.items()}


def as_text(rows: list[dict[str, Any]]) -> str:
    """A line for each table and channel block: the fastest tiles, and their time against the present ones'."""
    lines = ["table     block  measured  failed  present ms  fastest ms  ratio  fastest tiles"]
    for table in TABLES:
        for block in STAGES:
            group = [row for row in rows if (row["table"], row["block"]) == (table, block)]
            timed = [row for row in group if "ms" in row]
            if timed:
                best, present = min(timed, key=lambda row: row["ms"]), timed[0]
                lines.append(
                    f"{table:9} {block:5} {len(timed):9} {len(group) - len(timed):7} {present['ms']:11.4f} "
                    f"{best['ms']:11.4f} {best['ms'] / present['ms']:6.2f}  {best['tiles']}"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
