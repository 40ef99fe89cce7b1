"""Prints a summary of what benchmarks/gpu_round.sh measured.

python benchmarks/gpu_summary.py OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

from gpu_speed import read_rows


def main() -> None:
    out = Path(sys.argv[1])
    for text in (device(out), tests(out), speed(out), tiles(out), record(out), loading(out)):
        print(text + "\n")


def device(out: Path) -> str:
    """The device, its ceilings and the versions."""
    rows = read_rows(out / "ceilings.jsonl")
    if not rows:
        return "Device: not measured"
    row = rows[-1]
    packages = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "timm") if name in row)
    return (
        f"Device: {row['device']}; {packages}; sret {row['commit'][:7]}\n"
        f"Ceilings: {row['bf16_tflops']:.0f} TFLOP/s in bf16, {row['fp32_tflops']:.1f} in fp32, "
        f"{row['tb_per_s']:.2f} TB/s"
    )


def tests(out: Path) -> str:
    """The last line of the tests, and those that failed."""
    path = out / "tests.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([f"Tests: {lines[-1] if lines else 'not run'}", *failed])


def speed(out: Path) -> str:
    """A table for each group: time, ratio to the group's DeiT, memory, difference of the outputs."""
    rows, lines = read_rows(out / "speed.jsonl"), ["Speed"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        group = row["group"]
        groups.setdefault(f"{group['mode']}, {group['engine']}, batch {group['batch']}", []).append(row)
    for name, members in groups.items():
        lines.append(f"\n{name:34}       ms   IQR %  / DeiT      MiB  difference")
        for row in members:
            if "error" in row:
                lines.append(f"  {row['model']:32} {row['error'][:80]}")
                continue
            memory = "-" if row["mib"] is None else f"{row['mib']:,.0f}"
            difference = f"{row['difference']:.1e}" if "difference" in row else ""
            lines.append(
                f"  {row['model']:32} {row['ms']:8.3f} {100 * row['iqr']:7.1f} {row.get('ratio', float('nan')):7.2f} "
                f"{memory:>8}  {difference}"
            )
    return "\n".join(lines) if rows else "Speed: not measured"


def tiles(out: Path) -> str:
    """The table that triton_tiles.py printed."""
    path = out / "tiles.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    shown = [line for line in lines if line.startswith(("table ", "FORWARD", "BACKWARD", "REST"))]
    return "\n".join(["Tiles", *shown]) if shown else "Tiles: not measured"


def record(out: Path) -> str:
    """The accuracy of each seed that has finished, and how far the others are."""
    lines = []
    for path in sorted((out / "cifar10").glob("seed*.json")):
        row = json.loads(path.read_text())
        lines.append(
            f"  seed {row['seed']}: test {row['test_top1']:.2f} %, validation {row['val_top1']:.2f} %, "
            f"{row['epochs']} epochs, {row['minutes']:.2f} minutes of training, {row['wall']:.2f} in all"
        )
    for path in sorted((out / "cifar10").glob("seed*/metrics.jsonl")):
        if not path.parent.with_suffix(".json").exists() and (rows := read_rows(path)):
            lines.append(f"  {path.parent.name}: not finished, epoch {rows[-1]['epoch']}: {rows[-1]}")
    return "\n".join(["CIFAR-10", *lines]) if lines else "CIFAR-10: no epoch finished"


def loading(out: Path) -> str:
    """Photos a second, with the augmentation in the loading processes and on the device."""
    rows = read_rows(out / "loading.txt")
    if not rows:
        return "Loading: not measured"
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in rows[-1]["images_per_second"].items())
    return f"Loading, photos a second with {rows[-1]['num_workers']} processes: {rates}"


if __name__ == "__main__":
    main()
