"""Measures the cost of depth: memory and time of a step with each checkpointing policy, of compilation, of exports.

    python benchmarks/depth_cost.py steps --out steps.jsonl [--img_size 224] [--batch_size 8] [--layers 20,108,1008]
    python benchmarks/depth_cost.py compile --out compile.jsonl
    python benchmarks/depth_cost.py export --out export.jsonl [--layers 20,108,1008]

All depths have the width of sret_deep_1008, so a pass has the same cost in all. A step is forward and backward; the
gradients of the step before are released first. Each peak is measured in a process of its own. The policies of a depth
alternate in one process, after a comparison of their gradients. A layer is one pass of attention and MLP.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from depth import add
from memory import peak_in_process, peak_on_cuda
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sret import ModelConfig, SReT
from sret.bench.timing import alternate, quartiles, ratio
from sret.checkpoints.card import Card
from sret.data.preprocess import Preprocessing
from sret.export.export import export_model
from sret.export.runtime import load_exported
from sret.models.deep import deep_config
from sret.models.variants import config_of
from sret.version import device_name, versions

WIDTH = 64
POLICIES = ("none", "pass", "nested", "reversible", "truncated:1")
CLOSE = 1e-3  # of float32 gradients, relative to the largest: sums have another order
MIB = 2**20
Step = Callable[[], None]


def config(layers: int, policy: str, img_size: int) -> ModelConfig:
    deep = deep_config(layers=layers, max_parameters=14_000_000, embed_dim=WIDTH, img_size=img_size)
    return replace(deep, memory=policy, reversible=policy == "reversible")


def step_of(model: SReT, images: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        model(images).logsumexp(1).mean().backward()

    return step


def peak(options: argparse.Namespace) -> None:
    """Prints the memory of a step in bytes. Runs in a process of its own."""
    torch.manual_seed(0)
    model = SReT(config(int(options.layers), options.policy, options.img_size)).to(options.device).train()
    images = make_images(options)
    step_of(model, images[:1])()  # allocates what only a first step needs
    model.zero_grad()
    step = step_of(model, images)
    print(peak_on_cuda(step, images.device) if images.is_cuda else peak_in_process(step, calls=1))


def make_images(options: argparse.Namespace) -> Tensor:
    return torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=options.device)


def steps(options: argparse.Namespace) -> None:
    size = [f"--{name}={getattr(options, name)}" for name in ("img_size", "batch_size", "device")]
    for layers in map(int, options.layers.split(",")):
        images = make_images(options)
        candidates, models = {}, {}
        for policy in POLICIES:
            torch.manual_seed(0)
            models[policy] = SReT(config(layers, policy, options.img_size)).to(options.device).train()
            candidates[policy] = step_of(models[policy], images)
        compare(models, candidates)
        peaks = {}
        for policy in POLICIES:
            command = [sys.executable, __file__, "peak", "--layers", str(layers), "--policy", policy, *size]
            peaks[policy] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"{layers} layers, {policy}: {peaks[policy] / MIB:,.0f} MiB", file=sys.stderr, flush=True)
        times = alternate(candidates, options.rounds, warm_up=1)
        for policy in POLICIES:
            low, median, high = quartiles(times[policy])
            line = {
                "kind": "step",
                "layers": layers,
                "policy": policy,
                "img_size": options.img_size,
                "batch_size": options.batch_size,
                "parameters": sum(p.numel() for p in models[policy].parameters()),
                "peak_mib": round(peaks[policy] / MIB, 1),
                "seconds": round(median, 4),
                "spread": round((high - low) / median, 3),
                "time_to_pass": round(ratio(times[policy], times["pass"]), 3),
                "device": f"{device_name(options.device)}, {torch.get_num_threads()} threads",
                **versions(),
            }
            add(options.out, line)
    show(options.out)


def compare(models: dict[str, SReT], candidates: dict[str, Step]) -> None:
    """Raises `AssertionError` if gradients of the exact policies differ."""
    candidates["none"]()
    expected = {name: p.grad for name, p in models["none"].named_parameters()}
    for policy in ("pass", "nested"):
        candidates[policy]()
        for name, parameter in models[policy].named_parameters():
            wanted = expected[name]
            assert wanted is not None
            assert parameter.grad is not None
            assert (parameter.grad - wanted).abs().max() <= CLOSE * wanted.abs().max() + 1e-9, (policy, name)
    for model in models.values():
        model.zero_grad()


def show(path: Path) -> None:
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "step"]
    base = next((r["peak_mib"] for r in rows if r["layers"] == 20 and r["policy"] == "pass"), None)
    table = Table(
        "layers",
        "policy",
        "parameters",
        "peak MiB",
        "peak / peak of 20 layers with pass",
        "seconds",
        "IQR",
        "time / time with pass",
    )
    for r in rows:
        to_base = f"{r['peak_mib'] / base:.2f}" if base else ""
        cells = [f"{r['layers']:,}", r["policy"], f"{r['parameters']:,}", f"{r['peak_mib']:,.0f}", to_base]
        table.add_row(*cells, f"{r['seconds']:.2f}", f"{r['spread']:.0%}", f"{r['time_to_pass']:.2f}")
    Console(width=120).print(table)


def first_step(options: argparse.Namespace) -> None:
    """Prints the seconds of the first and of the third compiled step. Runs in a process of its own."""
    torch.manual_seed(0)
    model = SReT(replace(config_of(f"sret_deep_{options.layers}_32"), memory=options.policy)).train()
    step = step_of(model, torch.randn(8, 3, 32, 32))
    model.compile()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    print(json.dumps([seconds[0], seconds[-1]]))


def compiling(options: argparse.Namespace) -> None:
    """Measures the compilation time: the first step of a compiled model with empty caches, minus a later step."""
    for layers in (20, 1008):
        for policy in ("none", "nested"):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, __file__, "first", "--layers", str(layers), "--policy", policy]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            first, later = json.loads(found.splitlines()[-1])
            print(
                f"{layers:5} layers, {policy:7} compiled in {first - later:.1f} s; a step takes {later:.2f} s",
                flush=True,
            )
            line = {"kind": "compile", "layers": layers, "policy": policy, "seconds": round(first - later, 2)}
            add(options.out, {**line, "step_seconds": round(later, 3), **versions()})


def exporting(options: argparse.Namespace) -> None:
    """Measures exported files: size, and time and memory of a new process for loading and a first prediction."""
    for layers in map(int, options.layers.split(",")):
        model = SReT(config_of(f"sret_deep_{layers}_32")).eval()
        preprocessing = Preprocessing(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
        card = Card(config=model.config, preprocessing=preprocessing)
        for suffix in (".onnx", ".xml"):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                made = export_model(model, card, Path(folder) / f"deep{suffix}")
                seconds = time.perf_counter() - started
                command = [sys.executable, __file__, "load", "--file", str(made.path)]
                found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            load_seconds, peak = json.loads(found.splitlines()[-1])
            print(
                f"{layers:5} layers for {made.engine:12} {made.size / MIB:6.1f} MiB, exported in {seconds:.0f} s; "
                f"loading and first prediction {load_seconds:.1f} s, {peak / MIB:,.0f} MiB",
                flush=True,
            )
            line = {"kind": "export", "layers": layers, "engine": made.engine, "mib": round(made.size / MIB, 2)}
            line |= {"seconds": round(seconds, 1), "load_seconds": round(load_seconds, 2)}
            add(options.out, {**line, "load_peak_mib": round(peak / MIB, 1), **versions()})


def load(options: argparse.Namespace) -> None:
    """Prints the seconds until the first prediction, and the memory in bytes. Runs in a process of its own."""
    seconds = 0.0

    def load_and_predict() -> None:
        nonlocal seconds
        started = time.perf_counter()
        model, card = load_exported(options.file)
        model(torch.zeros(1, 3, *card.preprocessing.img_size))
        seconds = time.perf_counter() - started

    peak = peak_in_process(load_and_predict, calls=1)
    print(json.dumps([seconds, peak]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = {"steps": steps, "peak": peak, "compile": compiling, "first": first_step, "export": exporting, "load": load}
    for name, run in runs.items():
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--layers", default="20,108,1008")
        command.add_argument("--policy", default="nested")
        command.add_argument("--img_size", type=int, default=224)
        command.add_argument("--batch_size", type=int, default=8)
        command.add_argument("--device", default="cpu")
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--file", type=Path)
        command.add_argument("--out", type=Path, required=name in ("steps", "compile", "export"))
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
