"""Measures inference and training on a GPU, plain and with the Triton kernels, against DeiT, Swin and naive.

    python benchmarks/gpu_speed.py ceilings
    python benchmarks/gpu_speed.py compile          # fills Triton's cache, in several processes
    python benchmarks/gpu_speed.py speed --out speed.jsonl --seconds 150

`speed` measures group after group: the models of a group alternate in one process, so that their ratios are those of
one run on one card. A group is written to the file when it is complete, and a second run skips it; no group starts
after `--seconds`. Everything is in bfloat16: cast weights in inference, autocast in training. Weights are random, which
does not change the time. The first word of a model of sret says which path it takes, plain or triton; models of sret
are fused for inference. `graph` replays the whole call, or the whole step, as one CUDA graph.

On a CPU the same code runs in float32, without graphs; `--small` shrinks models and batches for that.
"""

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from naive import Naive
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sret
from sret.bench.timing import alternate, quartiles, ratio, roofline, turn
from sret.kernels.gpu.dispatch import triton_kernels
from sret.models.fuse import fuse
from sret.version import versions

ROUNDS = 7
IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
DTYPE = torch.bfloat16 if IS_CUDA else torch.float32  # Triton's interpreter has wrong products in bfloat16
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Group:
    """Contenders that alternate; the first groups are the most important ones."""

    mode: str
    engine: str
    batch: int


GROUPS = (
    Group("inference", "eager", 128),
    Group("training", "eager", 128),
    Group("inference", "graph", 128),
    Group("inference", "graph", 1),
    Group("training", "graph", 128),
    Group("inference", "graph", 512),
    Group("inference", "eager", 512),
    Group("inference", "eager", 1),
)
# Per family: the model that times are divided by, then the others of timm, then ours.
FAMILIES = {
    "t": ("deit_tiny_patch16_224", (), ("sret_t", "sret_t_unsliced")),
    "s": ("deit_small_patch16_224", ("swin_tiny_patch4_window7_224",), ("sret_s",)),
}
SMALL_STAGE: dict[str, Any] = {"embed_dim": 16, "num_heads": 1, "num_blocks": 1, "groups": (1,), "mlp_ratio": 1.0}
SMALL: dict[str, Any] = {"img_size": 32, "num_classes": 10}
SMALL_OTHERS: dict[str, dict[str, Any]] = {"deit": {"depth": 1}, "swin": {"depths": (1, 1, 1, 1), "window_size": 1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ceilings", "compile", "speed"))
    parser.add_argument("--out", type=Path, help="append the rows of complete groups to this file, as JSON lines")
    parser.add_argument("--seconds", type=float, default=150, help="no group starts after this time")
    parser.add_argument("--small", action="store_true", help="small models and batches, to try the script on a CPU")
    options = parser.parse_args()
    started = time.monotonic()
    if options.what == "ceilings":
        emit(ceilings(2.0 if IS_CUDA else 0.2), options.out)
        return
    if options.what == "compile":
        compile_kernels(options.small)
        return
    rows = read_rows(options.out)
    for group in GROUPS:
        if any(row["group"] == asdict(group) for row in rows) or (group.engine == "graph" and not IS_CUDA):
            continue
        if time.monotonic() - started > options.seconds:
            print(f"no time left for {group}")
            continue
        for row in measure(group, options.small):
            emit(row, options.out)


def emit(row: Mapping[str, Any], out: Path | None) -> None:
    """Prints a row, and appends it to the file."""
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file. An incomplete last line is ignored."""
    if path is None or not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


# ceilings ------------------------------------------------------------------------------------------------------------


def ceilings(seconds: float) -> dict[str, Any]:
    """The device, its fastest matrix products in bfloat16 and in float32 without TF32, and the rate of its memory."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {"what": "ceilings", **about()}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"{name}_tflops"] = roofline(DEVICE, dtype) / 1e12
    size = 2**30 if IS_CUDA else 2**24
    x, y = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    found["tb_per_s"] = 2 * size / fastest(lambda: y.copy_(x), seconds) / 1e12
    return found


def about() -> dict[str, Any]:
    """The device and the versions."""
    name = torch.cuda.get_device_name() if IS_CUDA else platform.processor() or platform.machine()
    packages = ("timm", "triton")
    found = {package: version(package) for package in packages if find_spec(package)}
    return {**versions(), **found, "device": name}


def fastest(run: Run, seconds: float) -> float:
    """The shortest time of a call, of as many as fit into `seconds`."""
    end = time.monotonic() + seconds
    best = min(turn(run, 1) for _ in range(3))
    while time.monotonic() < end:
        best = min(best, turn(run, 1))
    return best


# compilation ---------------------------------------------------------------------------------------------------------


def compile_kernels(is_small: bool) -> None:
    """Runs each model of sret once in each mode, in a process of its own, so that `speed` finds compiled kernels."""
    context = multiprocessing.get_context("spawn")
    tasks = [(mode, name) for mode in ("inference", "training") for *_, ours in FAMILIES.values() for name in ours[:1]]
    processes = [context.Process(target=run_once, args=(*task, is_small)) for task in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def run_once(mode: str, name: str, is_small: bool) -> None:
    """One call with each number of images that `speed` has in this mode."""
    for batch in sorted({group.batch for group in GROUPS if group.mode == mode}):
        _, make, _ = contenders(Group(mode, "eager", batch), is_small)[f"triton {name}"]
        with triton_kernels(True):
            make()()


# speed ---------------------------------------------------------------------------------------------------------------


def measure(group: Group, is_small: bool) -> list[dict[str, Any]]:
    """A row for each contender of a group; a contender that fails has a row with its error instead of times."""
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    for name, (family, make, kernels) in contenders(group, is_small).items():
        row = rows[name] = {"what": "speed", "group": asdict(group), "family": family, "model": name}
        try:
            started = time.perf_counter()
            with triton_kernels(kernels):
                run = make()
                outputs[name] = run().float()
                if IS_CUDA:
                    torch.cuda.synchronize()
            row["first_s"] = time.perf_counter() - started
            with triton_kernels(kernels):
                row["mib"] = memory(run)
            runs[name] = within(kernels, run)
        except Exception as error:
            row["error"] = " ".join(str(error).split())[:300] or type(error).__name__
    for name, row in rows.items():
        plain = outputs.get(name.replace("triton", "plain", 1))
        if name.startswith("triton") and name in runs and plain is not None:
            row["difference"] = ((outputs[name] - plain).abs().max() / plain.abs().max()).item()
    times = alternate(runs, 2 if is_small else ROUNDS)
    for name, seconds in times.items():
        low, median, high = quartiles(seconds)
        rows[name] |= {"ms": 1e3 * median, "iqr": (high - low) / median, "batch": group.batch}
        reference = times.get(FAMILIES[rows[name]["family"]][0])
        if reference:
            rows[name]["ratio"] = ratio(seconds, reference)
    return list(rows.values())


def contenders(group: Group, is_small: bool) -> dict[str, tuple[str, Callable[[], Run], bool]]:
    """By name: the family, what makes the call that is timed, and whether it may use the Triton kernels."""
    is_training = group.mode == "training"
    batch = min(group.batch, 2) if is_small else group.batch
    pixels = 32 if is_small else 224
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found: dict[str, tuple[str, Callable[[], Run], bool]] = {}

    def add(family: str, name: str, make: Callable[[], nn.Module], kernels: bool = False) -> None:
        ready = training if is_training else inference
        found[name] = family, lambda: ready(make(), images, group.engine == "graph"), kernels

    for family, (first, others, ours) in FAMILIES.items():
        for name in (first, *others):
            add(family, name, lambda name=name: create(name, is_small))  # type: ignore[misc]
        for name in ours:
            for kernels in (False, True):
                if is_training and name.endswith("_unsliced"):
                    continue
                label = f"{'triton' if kernels else 'plain'} {name}"
                add(family, label, lambda name=name: create(name, is_small), kernels)  # type: ignore[misc]
        if group.engine == "eager":
            add(family, f"naive sret_{family}", lambda f=family: Naive(create(f"sret_{f}", is_small)))  # type: ignore
    return found


def create(name: str, is_small: bool) -> nn.Module:
    """A model with the same random weights each time."""
    torch.manual_seed(0)
    if not is_small:
        return timm.create_model(name)
    if name.startswith("sret"):
        return sret.SReT(sret.ModelConfig(**SMALL, stages=(sret.StageConfig(**SMALL_STAGE),)))
    return timm.create_model(name, **SMALL, **SMALL_OTHERS[name[:4]])


def inference(model: nn.Module, images: Tensor, has_graph: bool) -> Run:
    """A call that returns the logits."""
    images = images.to(DTYPE)
    model = (fuse(model) if isinstance(model, sret.SReT) else model.eval()).to(DEVICE, DTYPE)

    @torch.inference_mode()
    def run() -> Tensor:
        return model(images)

    return graphed(run) if has_graph else run


def training(model: nn.Module, images: Tensor, has_graph: bool) -> Run:
    """A call that makes a step, forward, cross-entropy, backward and AdamW, and returns the loss."""
    model = model.to(DEVICE).train()
    labels = torch.arange(len(images), device=DEVICE) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=IS_CUDA, capturable=has_graph)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(DEVICE.type, DTYPE, enabled=IS_CUDA, cache_enabled=not has_graph):
            loss = cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return graphed(run) if has_graph else run


def graphed(run: Run) -> Run:
    """The same call as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def memory(run: Run) -> float | None:
    """MiB that a call takes beyond what is allocated before it; of a graph, nothing is known."""
    if not IS_CUDA:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def within(kernels: bool, run: Run) -> Run:
    def inner() -> Tensor:
        with triton_kernels(kernels):
            return run()

    return inner


if __name__ == "__main__":
    main()
